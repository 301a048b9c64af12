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


def choose_across(requested: str, kernel: str, reason: str, *, seq_len: int, context: int, kv_heads: int,
                  named: bool) -> tuple[str, str, str]:
    """(way, kernel, reason) where `mesh.context`, above 1, splits the rows: how queries meet keys of other devices, and
    the implementation that `attention` is then given.

    requested: `compute.context_attention` of the config; kernel, reason: from `choose_attention`; kv_heads: those of a
    device; named: whether the config asked for the kernel by name. 'auto' takes the way in which the kernel can serve:
    gathered keys for splash, exchanged heads for cuDNN, a ring of plain JAX else. Raises ConfigError where heads cannot
    be exchanged, or a kernel asked for by name cannot serve.
    """
    splits_heads = kv_heads % context == 0
    if requested == "all_to_all" and not splits_heads:
        raise ConfigError(f"compute.context_attention='all_to_all' cannot run: the {kv_heads} key heads of a device "
                          f"are not a multiple of mesh.context={context}: set it to 'auto', or change either")
    if requested != "auto":
        way = requested
    elif kernel == "splash":
        way = "all_gather"
    else:
        way = "all_to_all" if kernel.startswith("cudnn") and splits_heads else "ring"
    obstacle = _obstacle_in_parts(way, kernel, seq_len, context)
    if obstacle and named:
        raise ConfigError(f"compute.attention={kernel!r} cannot run with mesh.context={context}: {obstacle}; set it to "
                          "'auto' or 'reference'")
    if obstacle:
        kernel, reason = "reference", f"{kernel} attention is not used because {obstacle}"
        way = "ring" if requested == "auto" else way
    told = {"ring": "in a ring of", "all_gather": "with keys gathered from", "all_to_all": "with heads exchanged by"}
    return way, kernel, f"{reason}, {told[way]} {context} devices"


def _obstacle_in_parts(way: str, kernel: str, seq_len: int, context: int) -> str | None:
    if kernel == "reference" or way == "all_to_all":
        return None
    if kernel == "splash" and way == "all_gather":
        if seq_len % (256 * context):
            return f"it takes a train.seq_len in multiples of 256 * mesh.context = {256 * context} then, not {seq_len}"
        return None
    if kernel == "splash":
        return "it has no backward pass over a part of the keys, which a ring takes (compute.context_attention)"
    return ("it has no mask for a part of a row: that takes compute.context_attention='all_to_all', and key heads of a "
            f"device in multiples of mesh.context={context}")


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
