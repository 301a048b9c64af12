"""Which grouped product a run uses, decided before anything is traced."""

from __future__ import annotations

import jax

from maxlm.schema import ConfigError

IN_8_BITS = ("mosaic_gpu", "mosaic_tpu")  # what multiplies 8-bit operands as such
_FAST = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}


def choose_grouped_matmul(
    requested: str, *, platform: str, width: int, expert_dim: int, compute_dtype: str,
    compute_capability: str | None = None, eight_bit: bool = False,
) -> tuple[str, str]:
    """(name, reason): the implementation to pass to `grouped_matmul`, and in words why it was chosen.

    requested: `compute.grouped_matmul` of the config. width, expert_dim: the sizes of an expert's matrices on one
    device. platform, compute_capability: as for `choose_attention`. eight_bit: whether operands are 8-bit floats.

    TPU and Hopper: Mosaic kernels of ours. Elsewhere 'blocks', which takes 64 rows
    after the other: `lax.ragged_dot` multiplies every row with every matrix on CPUs (and in part on TPUs), and on GPUs
    it takes 91 ms where torch takes 2 (measured on an H100, docs/MOE.md).
    Raises ConfigError where a kernel asked for by name cannot run.
    """
    wanted = _FAST.get(platform, "blocks") if requested == "auto" else requested
    obstacle = _obstacle(wanted, platform, width, expert_dim, str(compute_dtype), compute_capability, eight_bit)
    if obstacle is None:
        reason = f"the fast path of {platform}" if platform in _FAST else f"the reference, on {platform}"
        return wanted, ("as compute.grouped_matmul asks" if requested != "auto" else reason) + _bits(wanted, eight_bit)
    if requested == "auto":
        return "blocks", f"slow: {wanted} is not used because {obstacle}{_bits('blocks', eight_bit)}"
    raise ConfigError(f"compute.grouped_matmul={requested!r} cannot run: {obstacle}; set it to 'auto' or 'blocks'")


def _bits(name: str, eight_bit: bool) -> str:
    if not eight_bit:
        return ""
    return ", in 8 bits" if name in IN_8_BITS else ", which multiplies 8-bit values as bfloat16"


def _obstacle(name, platform, width, expert_dim, compute_dtype, compute_capability, eight_bit) -> str | None:
    if name == "mosaic_tpu" and platform != "tpu":
        return f"it runs on tpu and this run is on {platform}"
    if name != "mosaic_gpu":
        return None
    if platform != "gpu":
        return f"it runs on gpu and this run is on {platform}"
    if compute_capability is not None and compute_capability != "9.0":
        return f"it is made for compute capability 9.0 (Hopper), not {compute_capability}"
    if compute_dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, not {compute_dtype} (precision.recipe)"
    if width % 128 or expert_dim % 128:
        return f"it takes matrices in multiples of 128, not {width} x {expert_dim} (model.hidden_dim, model.expert_dim)"
    if eight_bit and jax.__version_info__ < (0, 11):
        return (f"JAX {jax.__version__} multiplies E5M2 with E4M3 in no kernel (install 0.11, or leave 'experts' "
                "out of precision.fp8_sites)")
    return None
