"""What a position sees: its own document, the past, and as far back as its layers' windows reach."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.tiny_model import furthest, hidden, packed, tiny_model, tokens_of

ROUNDING, LENGTH = 1e-5, 16


def test_a_packed_document_is_what_it_is_alone():
    model = tiny_model(layer_pattern=("local", "global"), sliding_window=5)
    tokens, cuts = tokens_of(2, LENGTH), (0, 5, 12, LENGTH)
    segments = jnp.asarray(np.repeat([1, 2, 3], np.diff(cuts)))
    positions = jnp.concatenate([jnp.arange(b - a) for a, b in zip(cuts, cuts[1:], strict=False)])
    row = lambda a: jnp.broadcast_to(a, tokens.shape)  # noqa: E731
    together = packed(model, tokens, row(positions), row(segments))
    unseparated = packed(model, tokens, row(positions), jnp.ones_like(tokens))
    for first, last in zip(cuts, cuts[1:], strict=False):
        alone = hidden(model, tokens[:, first:last])
        assert furthest(together[:, first:last], alone) < ROUNDING
        if first:
            assert furthest(unseparated[:, first:last], alone) > 0.01, "the comparison sees a missing boundary"


def test_padding_changes_nothing_before_it():
    model, tokens = tiny_model(), tokens_of(1, LENGTH)
    segments = jnp.where(jnp.arange(LENGTH) < 9, 1, 0)[None]
    padded = packed(model, tokens, jnp.arange(LENGTH)[None] * segments, segments)
    assert furthest(padded[:, :9], hidden(model, tokens[:, :9])) < ROUNDING
    assert np.isfinite(np.asarray(padded)).all()


def reach(model, length, changed):
    """Positions whose hidden state changes when the token at `changed` does."""
    tokens = tokens_of(1, length)
    other = tokens.at[0, changed].add(1)
    return np.flatnonzero(np.abs(hidden(model, tokens) - hidden(model, other)).max(axis=(0, 2)) > 1e-4).tolist()


def test_the_future_is_not_seen():
    assert reach(tiny_model(), LENGTH, 6) == list(range(6, LENGTH))


@pytest.mark.parametrize(("layers", "window"), [(1, 4), (2, 4), (2, 1)])
def test_local_layers_reach_as_far_as_their_windows_add_up(layers, window):
    model = tiny_model(num_layers=layers, layer_pattern=("local",), sliding_window=window)
    furthest_reader = 3 + layers * (window - 1)
    assert reach(model, LENGTH, 3) == list(range(3, furthest_reader + 1))


def test_one_global_layer_in_the_pattern_sees_everything():
    model = tiny_model(layer_pattern=("local", "global"), sliding_window=2)
    assert reach(model, LENGTH, 0) == list(range(LENGTH))
