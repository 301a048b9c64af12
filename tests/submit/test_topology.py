"""What a topology is called, and how much of everything is in it."""

import pytest

from maxlm.submit.topology import parse_topology


@pytest.mark.parametrize(
    "text, hosts, chips, devices, accelerator, machine, accelerator_type",
    [
        ("v4:4x4x4", 16, 64, 64, "tpu-v4-podslice", "ct4p-hightpu-4t", "v4-128"),
        ("v5e:1x1", 1, 1, 1, "tpu-v5-lite-podslice", "ct5lp-hightpu-1t", "v5litepod-1"),
        ("v5e:2x4", 1, 8, 8, "tpu-v5-lite-podslice", "ct5lp-hightpu-8t", "v5litepod-8"),
        ("v5e:16x16", 64, 256, 256, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v5litepod-256"),
        ("v5p:2x2x1", 1, 4, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-8"),
        ("v5p:4x4x8", 32, 128, 128, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-256"),
        ("v6e:4x4", 4, 16, 16, "tpu-v6e-slice", "ct6e-standard-4t", "v6e-16"),
        ("tpu7x:4x4x4", 16, 64, 128, "tpu7x", "tpu7x-standard-4t", "tpu7x-128"),
        ("7x:2x2x4", 4, 16, 32, "tpu7x", "tpu7x-standard-4t", "tpu7x-32"),
    ],
)
def test_slices(text, hosts, chips, devices, accelerator, machine, accelerator_type):
    place = parse_topology(text)
    assert (place.platform, place.hosts, place.chips, place.devices) == ("tpu", hosts, chips, devices)
    assert (place.gke_accelerator, place.machine_type, place.accelerator_type) == (
        accelerator, machine, accelerator_type)


def test_hosts_of_gpus_and_cpus():
    gpus = parse_topology("h200:4x8")
    assert (gpus.platform, gpus.hosts, gpus.chips_per_host, gpus.devices) == ("gpu", 4, 8, 32)
    assert gpus.gke_accelerator == "nvidia-h200-141gb" and gpus.chip.name == "H200 SXM"
    cpus = parse_topology("cpu:1x2")
    assert (cpus.platform, cpus.hosts, cpus.devices, cpus.chip) == ("cpu", 1, 2, None)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("v5q:4x4x8", "did you mean 'v5p'"),
        ("v5p", "must be like v5p:4x4x8"),
        ("v5p:4x0x8", "must be like v5p:4x4x8"),
        ("v5p:4x8", "has 3 sizes"),
        ("v5p:8x4x4", "ascending order"),
        ("v5p:2x2x8", "ascending order"),
        ("v6e:4x16", "slices of v6e are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("h100:8", "must be like h100:4x8"),
        ("h100:4x8x1", "must be h100:HOSTSxGPUS"),
    ],
)
def test_what_cannot_be_asked_for(text, complaint):
    with pytest.raises(ValueError, match=complaint) as raised:
        parse_topology(text)
    assert "\n" not in str(raised.value)
