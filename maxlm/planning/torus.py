"""Where a mesh's axes lie in a slice's torus, without a compiler: JAX's own assignment of devices, on stand-ins."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from types import SimpleNamespace

from jax.experimental import mesh_utils

from maxlm.planning.topology import Target, find_target, links


def axis_links(target: Target, axes: Mapping[str, int]) -> dict[str, float]:
    """Links of a chip that each axis of 2 or more keeps busy in one direction. `axes`: devices along each on one slice.

    A ring over several axes (a gather over fsdp and expert) has the links of all of them, which this does not say.
    """
    return _axis_links(target.name, tuple(axes.items()))


@functools.lru_cache(maxsize=4096)
def _axis_links(name: str, axes: tuple[tuple[str, int], ...]) -> dict[str, float]:
    target = find_target(name)
    devices = _stand_ins(target)
    try:
        layout = mesh_utils.create_device_mesh(tuple(size for _, size in axes), devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):  # a shape that JAX cannot lay out: any order, as bad as it may be
        layout = mesh_utils.np.asarray(devices, object).reshape([size for _, size in axes])
    found = {}
    for place, (name, size) in enumerate(axes):
        if size > 1:
            group = layout[tuple(slice(None) if axis == place else 0 for axis in range(layout.ndim))]
            found[name] = links(target.chip, target, [device.coords for device in group])
    return found


def _stand_ins(target: Target) -> list[SimpleNamespace]:
    per_chip = target.chip.devices_per_chip
    shape = (*target.shape, *(1,) * (3 - len(target.shape)))
    coords = ((x, y, z) for z, y, x in itertools.product(*(range(size) for size in reversed(shape))))
    return [SimpleNamespace(id=index * per_chip + core, coords=place, core_on_chip=core, platform="tpu",
                            device_kind=target.chip.device_kinds[0], process_index=0, slice_index=0)
            for index, place in enumerate(coords) for core in range(per_chip)]
