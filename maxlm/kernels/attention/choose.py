"""Which attention kernel a run uses, decided before anything is traced."""

from __future__ import annotations

from maxlm.schema import ConfigError

_HOME = {"cudnn": "gpu", "splash": "tpu"}  # the platform each fast path runs on
_FAST = {platform: name for name, platform in _HOME.items()}
DETERMINISTIC_BLOCK = 64  # positions that gpu_backward.py's kernels take at a time


def choose_attention(
    requested: str, *, platform: str, head_dim: int, seq_len: int, softcap: float, compute_dtype: str,
    compute_capability: str | None = None, deterministic: bool = False,
) -> tuple[str, str]:
    """(name, reason): the implementation to pass to `attention`, and in words why it was chosen.

    requested: `compute.attention` of the config. platform: 'cpu', 'gpu' or 'tpu', the one compiled for;
    compute_capability: of an NVIDIA GPU, such as '9.0', where it is known.
    deterministic: the gradient must have the same bits every time; cuDNN's has not, and 'cudnn_deterministic' has.
    'auto' takes the platform's fast path, or 'reference' with the obstacle as the reason. Raises ConfigError
    where a kernel asked for by name cannot run.
    """
    wanted = _FAST.get(platform, "reference") if requested == "auto" else requested
    obstacle = _obstacle(wanted, platform, head_dim, seq_len, softcap, str(compute_dtype), compute_capability)
    if obstacle is None and wanted == "cudnn" and deterministic:
        wanted = "cudnn_deterministic"
        if seq_len % DETERMINISTIC_BLOCK:
            obstacle = ("its deterministic backward pass (compute.deterministic) takes a train.seq_len in multiples "
                        f"of {DETERMINISTIC_BLOCK}, not {seq_len}")
    if obstacle is None:
        return wanted, f"the fast path of {platform}" if requested == "auto" else "as compute.attention asks"
    if requested == "auto":
        return "reference", f"{wanted} attention is not used because {obstacle}"
    raise ConfigError(f"compute.attention={requested!r} cannot run: {obstacle}; set it to 'auto' or 'reference'")


def choose_across(requested: str, kernel: str, reason: str, *, seq_len: int, context: int,
                  named: bool) -> tuple[str, str, str]:
    """(way, kernel, reason) where `mesh.context`, above 1, splits the rows: how queries meet keys of other devices, and
    the implementation that `attention` is then given.

    requested: `compute.context_attention` of the config; kernel, reason: from `choose_attention`; named: whether the
    config asked for the kernel by name. 'auto' gathers where splash then serves whole rows, and is a ring of plain JAX
    elsewhere. Raises ConfigError where a kernel asked for by name cannot serve.
    """
    obstacle = None
    if kernel == "splash" and requested == "ring":
        obstacle = "it has no backward pass over a part of the keys, which a ring takes (compute.context_attention)"
    elif kernel == "splash" and seq_len % (256 * context):
        obstacle = (f"it takes train.seq_len in multiples of 256 * mesh.context = {256 * context} then, not {seq_len}")
    elif kernel.startswith("cudnn"):
        obstacle = "it has no mask for rows in parts"
    if obstacle and named:
        raise ConfigError(f"compute.attention={kernel!r} cannot run with mesh.context={context}: {obstacle}; set it to "
                          "'auto' or 'reference'")
    if obstacle:
        kernel, reason = "reference", f"{kernel} attention is not used because {obstacle}"
    way = {"splash": "all_gather", "reference": "ring"}[kernel] if requested == "auto" else requested
    where = f"in a ring of {context} devices" if way == "ring" else f"with keys gathered from {context} devices"
    return way, kernel, f"{reason}, {where}"


def _obstacle(name, platform, head_dim, seq_len, softcap, compute_dtype, compute_capability) -> str | None:
    if name == "reference":
        return None
    if platform != _HOME[name]:
        return f"it runs on {_HOME[name]} and this run is on {platform}"
    if name == "cudnn":
        if compute_capability is not None and float(compute_capability) < 9:
            return f"cuDNN takes packed documents from compute capability 9.0 (Hopper) on, not on {compute_capability}"
        if compute_dtype not in ("bfloat16", "float16"):
            return f"cuDNN attention takes bfloat16 or float16, not {compute_dtype} (precision.recipe)"
        if head_dim % 8 or head_dim > 128:
            return f"cuDNN attention takes a model.head_dim up to 128 in multiples of 8, not {head_dim}"
        if softcap:
            return f"cuDNN attention has no soft cap (model.attention_softcap={softcap})"
    if name == "splash" and seq_len % 128:
        return f"splash attention takes a train.seq_len in multiples of 128, not {seq_len}"
    return None
