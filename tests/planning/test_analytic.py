"""The analytic model against what was measured and compiled, and the search that stands on it."""

import dataclasses
import json
import pathlib

import pytest

from maxlm.config import MeshConfig, RunConfig
from maxlm.hardware import chip_of
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import axis_sizes
from maxlm.planning import analytic, search, work
from maxlm.planning.plan import plan
from maxlm.planning.topology import find_target
from maxlm.planning.torus import axis_links
from maxlm.schema import ConfigError, from_dict

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ONE = axis_sizes(MeshConfig(), 1)


def recipe(name):
    return load_config(ROOT / "configs" / f"{name}.py")


def of_record(name):
    record = json.loads((RESULTS / name).read_text())
    return record, from_dict(RunConfig, record["config"]), chip_of(record["device_kind"])


@pytest.mark.parametrize("name", ["llama3_2_1b_h200_bf16.json", "llama3_2_1b_h100_bf16.json",
                                  "olmoe_layer_h100_bf16.json", "olmoe_layer_h100_fp8.json"])
def test_steps_that_were_measured(name, monkeypatch):
    """Steps like those that the rates are calibrated on come out; at the chip's peaks, the twin, they do not."""
    record, config, chip = of_record(name)
    measured = record["step_seconds"]["median"]
    found = analytic.estimate(config, chip, ONE)
    assert found.seconds == pytest.approx(measured, rel=0.05)
    assert found.memory_bytes == pytest.approx(record["bytes_per_chip"], rel=0.06)
    assert found.mfu == pytest.approx(record["mfu"], rel=0.05)
    monkeypatch.setattr("maxlm.planning.rates.HOPPER", ())
    assert analytic.estimate(config, chip, ONE).seconds < 0.85 * measured


@pytest.mark.parametrize(("precision", "pieces", "bytes_each"), [("bf16", 1, 29), ("fp8", 1, 29), ("float32", 1, 34),
                                                                   ("bf16", 2, 34 + 2 * 12)])
def test_an_update_moves_gradients_as_they_are_stored(precision, pieces, bytes_each):
    """In 16 bits, but for float32's and those that are added up, of which a microbatch reads two and writes one."""
    given = [f"precision.recipe={precision}", f"train.grad_accumulation={pieces}"]
    config = apply_overrides(recipe("llama3_2_1b"), given)
    share = work.share_of(config, ONE)
    update = next(part for part in work.update_parts(config, share) if part.name == "update")
    assert update.forward_bytes == bytes_each * work.stored_parameters(config, share)


def test_what_crosses_the_mesh():
    """llama3_70b on 4 x 8 x 8 v5p with tensor=4, beside the compiler's own figures (docs/PODS.md)."""
    config = recipe("llama3_70b")
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=64, tensor=4),
                                 train=dataclasses.replace(config.train, grad_accumulation=4))
    target = find_target("v5p:4x8x8")
    axes = axis_sizes(config.mesh, 256)
    links = axis_links(target, axes)
    assert links == {"fsdp": 4.0, "tensor": 2.0}
    found = analytic.estimate(config, target.chip, axes, links)
    parameters = 70.55e9
    assert found.wire_bytes["fsdp"] == pytest.approx(4 * 3 * 2 * parameters / 4 * 63 / 64, rel=0.05)
    assert set(found.wire_bytes) == {"fsdp", "tensor"}
    assert found.memory_by_kind["parameters"] == pytest.approx(4 * parameters / 256, rel=0.01)


def test_the_search_keeps_what_is_trained():
    config, target = recipe("llama3_8b"), find_target("v6e:4x4")
    found = search.candidates(config, target)
    assert found == sorted(found, key=lambda c: c.expected.seconds)
    for candidate in found:
        data, fsdp, expert, context, tensor = candidate.mesh
        assert data * fsdp * expert * context * tensor == 16
        assert context == 1 or candidate.rows == 1, "rows are split where a device has no second"
        train = candidate.config.train
        assert train.global_batch_size == config.train.global_batch_size
        assert train.global_batch_size == candidate.rows * data * fsdp * train.grad_accumulation
    assert len({candidate.values for candidate in found}) == len(found)


def test_context_is_planned_where_rows_are_fewer_than_devices():
    config, target = recipe("llama3_8b"), find_target("v5p:4x4x4")
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=16, seq_len=65_536))
    best = search.candidates(few, target)[0]
    data, fsdp, _, context, tensor = best.mesh
    assert data * fsdp <= 16 and context > 1, best.overrides(few)
    keys = 2 * 8 * 128 / tensor * 65_536 / context * 16 / (data * fsdp) * 2  # bytes that a device has of a layer's
    trips = 2 if best.config.remat.policy == "none" else 3
    assert best.expected.wire_bytes["context"] == pytest.approx(32 * trips * keys * (context - 1))


def test_the_host_is_asked_where_nothing_else_fits(monkeypatch):
    """llama3_405b on 256 v6e: 33 GB a chip, of which parameters and moments alone take 19."""
    config, target, told = recipe("llama3_405b"), find_target("v6e:16x16"), []

    def compiled(config, target):
        fits = config.remat.policy == "full_offload"
        return {"fits": fits, "bytes_per_chip": 3e10 if fits else 4.2e10, "hbm_bytes": target.usable_bytes,
                "step_seconds_estimate": 1.0, "tokens_per_second_per_chip_estimate": 1.0, "mfu_estimate": 0.4,
                "dominating_term": "", "compile_seconds": 1.0, "cached": False}

    monkeypatch.setattr("maxlm.planning.plan.compile_report", compiled)
    found = plan(config, target, confirm=1, jobs=1, tell=told.append)
    assert any("the host's memory" in line for line in told)
    given = found[0].candidate.overrides(config)
    assert "--set remat.policy=full_offload --set compute.offload_optimizer=true" in given
    assert found[0].fits and not any(c.fits for c in found[1:])


def test_slices_are_split_by_data_alone():
    found = search.candidates(recipe("llama3_8b"), find_target("v5e:4x4", 2))
    assert {candidate.mesh[0] % 2 for candidate in found} == {0}
    assert all(c.expected.wire_bytes["data"] > 0 for c in found)


@pytest.mark.parametrize(("changes", "topology", "told"), [
    ({}, "v5e:2x2", r"needs at least about .* GB a chip .* v5e:2x2 has 17: take v5e:2x4 or more chips"),
    ({"global_batch_size": 7}, "v5e:16x16", "train.global_batch_size=7 must be a multiple of"),
])
def test_what_cannot_be_is_refused_with_what_could(changes, topology, told):
    config = recipe("llama3_8b")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=2048, **changes))
    with pytest.raises(ConfigError, match=told):
        plan(config, find_target(topology))


def test_a_plan_is_confirmed_by_compiles(monkeypatch):
    """The compiler has the last word: what it finds too large goes behind, and a leaner layout of the mesh is tried."""
    config, target = recipe("llama3_8b"), find_target("v5p:4x4x4")
    asked = []

    def compiled(config, target):
        asked.append(config)
        fits = config.remat.policy != "none"
        size = target.usable_bytes * (0.9 if fits else 1.3)
        seconds = 1.0 + len(asked) / 100
        return {"fits": fits, "bytes_per_chip": size, "hbm_bytes": target.usable_bytes, "mfu_estimate": 0.5,
                "step_seconds_estimate": seconds, "tokens_per_second_per_chip_estimate": 1.0, "dominating_term": "",
                "compile_seconds": 1.0, "cached": False}

    monkeypatch.setattr("maxlm.planning.plan.compile_report", compiled)
    found = plan(config, target, confirm=3, jobs=1)
    assert [c.fits for c in found] == sorted((c.fits for c in found), reverse=True)
    assert sum(c.fits for c in found) == 3 and len(found) <= 10
    fitting = [c.record["step_seconds_estimate"] for c in found if c.fits]
    assert fitting == sorted(fitting)
    assert "--set remat.policy=" in found[0].candidate.overrides(recipe("llama3_8b")) or (
        found[0].candidate.config.remat == config.remat)
