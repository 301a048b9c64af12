"""However the layers are split over stages, the same model is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.checkpoint import Checkpointer
from maxlm.cli import main
from maxlm.config import MeshConfig
from maxlm.parallel import pipeline
from maxlm.parallel.mesh import check_divisible, make_mesh, pipeline_told
from maxlm.parallel.pipeline import bubble_share, pipelined
from maxlm.parallel.sharding import BATCH
from maxlm.schema import ConfigError
from maxlm.training.state import abstract_state, init_state
from tests.training import tiny
from tests.training.runs import prepared, rows_of, train, write_config
from tests.training.tiny import LENGTH, ROWS, furthest, host_batch, leaves, loops_of_gradient, run_steps, tiny_config

# float32, ten steps at learning rate 1e-3: at 1e-2 these models part after five steps on any mesh, by a router's tie or
# because sixteen layers of weights like these blow rounding up
ROUNDING = 5e-5
STEPS = 10
DEEP = dict(num_layers=8, layer_pattern=["global"])
FLAT = dict(num_layers=16, layer_pattern=["global"], hidden_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=32)
SIZES = dict(num_layers=4, layer_pattern=["global"], num_experts=8, experts_per_token=2, expert_dim=16)
DEEPSEEK = dict(scores="sigmoid", bias_rate=1e-2, num_groups=4, groups_per_token=2, weight_scale=2.5, shared_experts=1,
                balance_loss=1e-3, balance_over="sequence")
MODELS = {
    "pattern": {},
    "deep": DEEP,
    "flat": FLAT,
    "deepseek": SIZES | {"moe": DEEPSEEK},
    "dense first": SIZES | {"num_layers": 5, "moe": DEEPSEEK | {"dense_layers": 1}},
    "jitter": SIZES | {"moe": dict(expert_bias=True, jitter=0.2, balance_loss=0.02, router_z_loss=1e-3)},
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


# The schedule by itself, on layers that tell who met whom


def affine(weights, rows, shared, place):
    """Layers x -> w x + 1 + microbatch / 10 + y, which do not commute. Sums: what passed each layer."""
    x, y = rows
    passed = []
    for weight in weights:
        x = weight * x + shared + place.microbatch / 10 + y
        passed.append(x.sum())
    return x, jnp.stack(passed)


def schedule(stages, repeats, microbatches, rows=16, layers=16):
    """(results, sums, gradients of weights and rows) through the pipeline, and one row and layer after another."""
    weights = np.linspace(0.5, 1.5, layers, dtype=np.float32)
    x = np.linspace(-1, 1, rows * 2, dtype=np.float32).reshape(rows, 2)
    y = np.linspace(1, 2, rows, dtype=np.float32)[:, None]
    mesh = make_mesh(MeshConfig(stage=stages), jax.devices()[: min(8, 2 * stages)])

    def loss(weights, x, y):
        out, sums = pipelined(affine, weights, (x, y), jnp.float32(1.0), microbatches, repeats)
        return (out**2).sum(), (out, sums)

    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, p)) for a, p in (
            (weights, P("stage")), (x, P(BATCH)), (y, P(BATCH)))]
        (_, found), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*placed)
    slots = microbatches // stages
    stage, local = np.divmod(np.arange(rows), rows // stages)
    number = (local % slots) * stages + stage  # of each row's microbatch

    def plain(weights, x):
        sums = []
        for weight in weights:
            x = weight * x + 1 + number[:, None] / 10 + y
            sums.append(x.sum())
        return (x**2).sum(), (x, jnp.stack(sums))

    (_, expected), expected_gradients = jax.value_and_grad(plain, (0, 1), has_aux=True)(
        jnp.asarray(weights), jnp.asarray(x))
    return (*found, *gradients), (*expected, *expected_gradients)


def away(found, expected):
    return max(float(np.abs(np.asarray(a) / np.asarray(b) - 1).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("stages", "repeats", "microbatches"), [
    (4, 2, 8), (1, 1, 4), slow(2, 1, 2), slow(2, 1, 8), slow(2, 4, 4), slow(2, 8, 2), slow(4, 4, 4), slow(4, 1, 8),
    slow(8, 2, 8), slow(8, 1, 16)])
def test_every_row_meets_every_layer_once_and_in_order(stages, repeats, microbatches):
    found, expected = schedule(stages, repeats, microbatches)
    assert away(found, expected) < 1e-4


@pytest.mark.parametrize("repeats", [2, slow(3)])
def test_chunks_find_their_stage(repeats):
    """Also where repeats and stages have no or some factor in common."""
    found, expected = schedule(stages=4, repeats=repeats, microbatches=4, layers=24)
    assert away(found, expected) < 1e-4


def test_the_schedule_without_its_deal_is_another_model(monkeypatch):
    monkeypatch.setattr(pipeline, "_dealt", lambda layers, R: layers.reshape(R, -1))
    found, expected = schedule(4, 2, 8)
    assert away(found, expected) > 1e-2


# Training


def settings(model, **sections):
    return tiny_config(**{"model": MODELS[model], "train": {"z_loss": 0.0}, "optimizer": {"learning_rate": 1e-3},
                          **sections})


@functools.cache
def fresh(model):
    config = settings(model)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return leaves(init_state(config, mesh))


@functools.cache
def single_device(model):
    """Ten steps from weights of the size of trained ones: fresh ones have gradients so small that Adam makes steps of
    their rounding."""
    start = [10 * a if a.ndim > 2 and a.dtype == np.float32 else a for a in fresh(model)]
    return run_steps(settings(model), devices=1, steps=STEPS, start=start)


def compare(model, devices, expected=None, **sections):
    """How far losses and state after ten steps are from those of one device."""
    expected = expected or single_device(model)
    run = run_steps(settings(model, **sections), devices, steps=STEPS, start=expected.first)
    return max(furthest(run.last, expected.last), float(np.abs(np.subtract(run.losses, expected.losses)).max()))


@pytest.mark.parametrize(("model", "mesh", "how"), [
    ("pattern", dict(stage=2, tensor=2), dict(remat=dict(policy="full"))),
    slow("pattern", dict(stage=2, fsdp=2, tensor=2), {}),
    slow("pattern", dict(stage=2, data=2, fsdp=2), dict(train=dict(grad_accumulation=2, z_loss=0.0))),
    slow("deep", dict(stage=4, fsdp=2), dict(compute=dict(pipeline_repeats=2))),
    slow("deep", dict(stage=4, tensor=2), dict(compute=dict(pipeline_microbatches=4, layer_unroll="all"))),
    slow("deep", dict(stage=2, data=4, fsdp=1), dict(compute=dict(pipeline_repeats=4), remat=dict(policy="names"))),
    slow("deep", dict(stage=8, fsdp=1), dict(compute=dict(pipeline_microbatches=8))),
    slow("flat", dict(stage=8, fsdp=1), dict(compute=dict(pipeline_repeats=2))),
    slow("deepseek", dict(stage=2, expert=2, tensor=2), dict(compute=dict(pipeline_repeats=2))),
    slow("deepseek", dict(stage=4, expert=2, fsdp=1), {}),
    slow("deepseek", dict(stage=2, expert=2, data=2, fsdp=1), dict(train=dict(grad_accumulation=2, z_loss=0.0))),
    slow("dense first", dict(stage=4, fsdp=2), {}),
])
def test_stages_train_like_one_device(model, mesh, how):
    count = int(np.prod(list(({"fsdp": 1} | mesh).values())))
    assert compare(model, count, mesh=mesh, **how) < ROUNDING


def as_accumulated(batch, stages, slots):
    """The batch whose microbatches one after another are those of `stages` stages."""
    return {name: a.reshape(stages, -1, slots, a.shape[1]).transpose(1, 2, 0, 3).reshape(a.shape)
            for name, a in batch.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "microbatches"), [
    (dict(stage=2, expert=2, data=2, fsdp=1), 4), (dict(stage=4, expert=2, fsdp=1), 4)], ids=str)
def test_microbatches_in_a_pipeline_are_those_of_accumulation(mesh, microbatches, monkeypatch):
    """Balance over each microbatch, and jitter from its key."""
    single_device("jitter")  # of the batch as it is
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "host_batch", lambda seed: as_accumulated(
            host_batch(seed), mesh["stage"], microbatches // mesh["stage"]))
        expected = run_steps(settings("jitter", train=dict(grad_accumulation=microbatches, z_loss=0.0)), devices=1,
                             steps=STEPS, start=single_device("jitter").first)
    how = dict(mesh=mesh, compute=dict(pipeline_microbatches=microbatches))
    assert compare("jitter", 8, expected, **how) < ROUNDING
    whole = compare("jitter", 8, single_device("jitter"), **how)
    assert whole > 3 * ROUNDING, "the twin: a batch in one piece is balanced and shaken otherwise"


@pytest.mark.slow
def test_the_comparison_sees_layers_in_another_order(monkeypatch):
    """The twin of the tests above."""
    monkeypatch.setattr(pipeline, "_dealt", lambda layers, R: jax.tree.map(
        lambda a: a.reshape(R, -1, *a.shape[1:], out_sharding=P(None, *jax.typeof(a).sharding.spec)), layers))
    assert compare("deep", 2, mesh=dict(stage=2), compute=dict(pipeline_repeats=2)) > 3 * ROUNDING


@pytest.mark.slow
def test_a_checkpoint_restores_onto_other_stages(tmp_path):
    kept, saved = {}, None
    for stage in (4, 2, 1):
        config = settings("dense first", mesh=dict(stage=stage))
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            if saved is None:
                saved = init_state(config, mesh)
                split = saved.params.layers_0.attention.qkv[...].sharding.spec
                assert split[0] == "stage", "the layers are stored on their stages"
                with Checkpointer(tmp_path, keep_last=1) as checkpointer:
                    checkpointer.save(1, saved, {})
            like = abstract_state(config, mesh)
            with Checkpointer(tmp_path, keep_last=1) as checkpointer:
                kept[stage] = leaves(checkpointer.restore(1, like))
    for stage in kept:
        assert all((a == b).all() for a, b in zip(kept[stage], fresh("dense first"), strict=True)), stage


@pytest.mark.slow
def test_a_run_goes_on_with_other_stages(tmp_path, capsys):
    """Through the command line: evaluation, sample, checkpoints, digests; `maxlm eval` of what came out."""
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    stages = ("mesh.stage=2", "mesh.fsdp=2", "mesh.data=2", "compute.pipeline_repeats=2")
    shape = ("model.num_layers=4", "model.hidden_dim=32", "schedule.name=constant")
    assert train(config, tmp_path / "staged", *shape, *stages, "train.num_steps=4") == 0
    assert "2 stages of 2 parts each, 2 microbatches, 20.0% of a step idle" in capsys.readouterr().err
    assert train(config, tmp_path / "staged", *shape, "mesh.fsdp=8", "compute.offload_optimizer=true") == 0
    assert train(config, tmp_path / "plain", *shape) == 0
    staged, plain = ({row["step"]: row["loss"] for row in rows_of(tmp_path / run) if "loss" in row}
                     for run in ("staged", "plain"))
    assert staged == pytest.approx(plain, abs=1e-4) and len(staged) == 6
    assert main(["eval", "--run-dir", str(tmp_path / "staged"), "--step", "4"]) == 0


def kept_by_ticks(policy, ticks, **compute):
    """Bytes, of all devices of a stage, that the loop over ticks keeps for the backward pass."""
    config = settings("deep", mesh=dict(stage=2), remat=dict(policy=policy), compute=compute)
    kept = [[a for a in given if a.shape[:1] == (ticks,)] for given in loops_of_gradient(config, 2, ticks)]
    return max(sum(a.size * a.dtype.itemsize for a in stacked) for stacked in kept)  # the others are carried on


@pytest.mark.parametrize(("policy", "layers"), [("stage", 1), ("full", 2)])
def test_a_tick_keeps_inputs_and_no_weights(policy, layers):
    """Of a chunk of two layers, each 10,000 weights."""
    rows, ticks = 4, 2 * 4 + 1
    kept = kept_by_ticks(policy, ticks, pipeline_repeats=2, pipeline_microbatches=4)
    assert kept == pytest.approx(ticks * layers * rows * LENGTH * 32 * 4, rel=0.1)


# What a user is told


def test_the_idle_share_is_told():
    assert bubble_share(4, 8) == 3 / 11 and bubble_share(4, 8, 2) == 3 / 19 and bubble_share(1, 8) == 0
    config = settings("deep", mesh=dict(stage=4), compute=dict(pipeline_repeats=2))
    told = pipeline_told(config, make_mesh(config.mesh))
    assert told == "; pipeline: 4 stages of 2 parts each, 8 microbatches, 15.8% of a step idle"
    config = settings("deep")
    assert pipeline_told(config, make_mesh(config.mesh)) == ""


@pytest.mark.parametrize(("sections", "words"), [
    (dict(mesh=dict(stage=3)), "= 4 is not a multiple of mesh.stage * compute.pipeline_repeats"),
    (dict(mesh=dict(stage=2), compute=dict(pipeline_microbatches=3)), "must be a multiple of mesh.stage=2"),
    (dict(mesh=dict(stage=2), precision=dict(recipe="fp8", plain_last_layers=2)), "plain_last_layers=2 cut the layers"),
    (dict(mesh=dict(stage=2), resilience=dict(corruption_check_every_steps=5)), "does not compare stages"),
    (dict(mesh=dict(stage=2), compute=dict(pipeline_microbatches=8)), "compute.pipeline_microbatches = 32"),
])
def test_what_does_not_divide_is_refused_in_a_line(sections, words):
    with pytest.raises(ConfigError, match="^[^\n]*$") as caught:
        config = tiny_config(**sections)
        check_divisible(make_mesh(config.mesh), config)
    assert words in str(caught.value)
    assert ROWS % 32
