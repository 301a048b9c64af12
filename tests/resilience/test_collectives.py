"""Collectives by mesh axis, in each of the ways in which XLA writes groups of devices."""

import pytest

from maxlm.resilience.collectives import collectives

AXES = {"data": 2, "fsdp": 2, "tensor": 2}


def line(groups, kind="all-reduce"):
    return (f'  %op.1 = f32[8,4]{{1,0}} {kind}(%x), channel_id=1, {groups}, use_global_device_ids=true, '
            'metadata={op_name="jit(train_step)/psum" stack_frame_id=3}')


@pytest.mark.parametrize(("groups", "over"), [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ["tensor"]),
    ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ["fsdp"]),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ["data"]),
    ("replica_groups={{0,2,4,6},{1,3,5,7}}", ["data", "fsdp"]),
    ("replica_groups={}", ["data", "fsdp", "tensor"]),
    ("replica_groups=[4,2]<=[8]", ["tensor"]),
    ("replica_groups=[4,2]<=[4,2]T(1,0)", ["fsdp"]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ["data"]),
    ("replica_groups=[1,8]<=[8]", ["data", "fsdp", "tensor"]),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", ["data", "fsdp"]),
    ("replica_groups=mesh['a'=1,'b'=2,'c'=2,'d'=2], device_ids=([2,2,2]T(2,1,0)) {'c'}", ["fsdp"]),
    ("replica_groups=mesh['a'=1,'b'=2,'c'=2,'d'=2], device_ids=([2,4]T(1,0)) {'b'}", ["fsdp"]),
    ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", None),
])
def test_groups_are_axes(groups, over):
    found = collectives("ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n" + line(groups), AXES)
    assert [row["over"] for row in found] == ([over] if over else [])
    assert all(row["source"] == "jit(train_step)/psum" and row["type"] == "f32[8,4]{1,0}" for row in found)


def test_order_places_and_kinds():
    text = "\n".join([
        "%body.3 (p: f32[2]) -> f32[2] {", line("source_target_pairs={{0,1},{1,0}}", "collective-permute-start"), "}",
        "ENTRY %main.9 (x: f32[8]) -> f32[8] {", line("replica_groups={{0,4}}", "all-gather-start"),
        line("replica_groups={{0,4}}", "all-gather-done"), line("replica_groups={}", "reduce-scatter"), "}",
    ])
    assert [(row["kind"], row["over"], row["computation"]) for row in collectives(text, AXES)] == [
        ("collective-permute", ["tensor"], "body.3"), ("all-gather", ["data"], "ENTRY"),
        ("reduce-scatter", ["data", "fsdp", "tensor"], "ENTRY"),
    ]
