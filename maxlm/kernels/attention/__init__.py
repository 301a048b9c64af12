"""Causal self-attention over packed rows, by the kernel each platform is fast with.

    name, reason = choose_attention(config.compute.attention, platform="gpu", head_dim=64, ...)
    out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT=..., window=None, softcap=0.0, implementation=name)

Dims: B batch, T query length, S key length, H query heads, G kv heads, R = H/G query heads per kv head, K head dim.
"""

from __future__ import annotations

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from maxlm.kernels.attention.choose import choose_across, choose_attention
from maxlm.kernels.attention.gathered import exchanged_attention, gathered_attention
from maxlm.kernels.attention.reference import reference_attention
from maxlm.kernels.attention.ring import ring_attention
from maxlm.parallel.sharding import free_axes

__all__ = ["attention", "choose_across", "choose_attention"]


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segment_ids_BT: jax.Array,
    window: int | None,
    softcap: float,
    implementation: str,
    across: str = "ring",
    scale: float | None = None,
) -> jax.Array:
    """softmax(softcap(scale * q k^T) + mask) v, as out_BTHK in q's dtype.

    Query t sees key s where s <= t, t - s < window (if given) and both are of one segment. H is a multiple of G;
    query head h reads kv head h // (H/G). S equals T: this is training's attention, generation has its own cache.
    segment_ids_BT: int32, documents of a row numbered from 1 in increasing order, 0 for padding; what comes out at
    padding is finite and otherwise unspecified. scale defaults to K**-0.5. softcap 0 means none (arXiv:2408.00118).
    implementation: a name from `choose_attention`; across: one from `choose_across`, where `context` splits the rows.

    What a remat policy must save for the backward pass not to run the kernel again (the result, and the softmax
    statistics of the fast paths) is named "attention" in here; naming the result once more would save it twice.

    Under a mesh of explicit axes every device attends to the rows and heads it holds, in a `shard_map` over the
    sharding of q (batch and heads may be sharded, T over `context` alone, K not at all). Raises ValueError where k, v
    or the segment ids are laid out differently.
    """
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    how = {"window": window, "softcap": softcap, "scale": scale}
    local = partial(_local, implementation=implementation, **how)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return local(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT)
    batch, length, heads, depth = jax.typeof(q_BTHK).sharding.spec
    if length not in (None, "context") or depth is not None:
        raise ValueError(f"attention needs whole heads on a device, and whole rows or parts along mesh.context, q_BTHK "
                         f"is {jax.typeof(q_BTHK)}")
    qkv = P(batch, length, heads, None)
    arguments, specs = (q_BTHK, k_BSGK, v_BSGK, segment_ids_BT), (qkv, qkv, qkv, P(batch, length))
    if length is not None and mesh.shape[length] > 1:
        if across == "all_gather" and implementation == "splash":
            from maxlm.kernels.attention.tpu import gathered_splash, laid_out_kernel

            kernel, layout = laid_out_kernel(q_BTHK, k_BSGK, window=window, softcap=softcap)
            local, arguments, specs = partial(gathered_splash, scale=scale), (kernel, *arguments), (layout, *specs)
        elif across == "all_to_all":
            local = partial(exchanged_attention, attend=local)
        else:
            local = partial(ring_attention if across == "ring" else gathered_attention, **how)
    return jax.shard_map(
        local, in_specs=specs, out_specs=qkv, axis_names=free_axes(),
        check_vma=False,  # the kernels' outputs do not say over which axes they vary
    )(*arguments)


def _local(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, *, window, softcap, implementation, scale):
    if implementation == "reference":
        out_BTHK = reference_attention(
            q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window=window, softcap=softcap, scale=scale
        )
        return checkpoint_name(out_BTHK, "attention")
    if implementation in ("cudnn", "cudnn_deterministic"):
        from maxlm.kernels.attention.gpu import cudnn_attention

        assert not softcap, "choose_attention keeps soft caps away from cuDNN"
        return cudnn_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window=window, scale=scale,
                               deterministic=implementation == "cudnn_deterministic")
    if implementation == "splash":
        from maxlm.kernels.attention.tpu import splash_attention  # Pallas is slow to import

        return splash_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window=window, softcap=softcap, scale=scale)
    raise ValueError(f"attention implementation {implementation!r} is not one of 'reference', 'cudnn', "
                     "'cudnn_deterministic', 'splash'")
