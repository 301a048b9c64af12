"""Attention written out in float64 numpy, with its gradients: slow, obvious, and independent of JAX."""

import numpy as np


def seen_BTS(segment_ids_BT, window=None):
    """Which key each query sees: not later, not further than the window, of the same document."""
    segments = np.asarray(segment_ids_BT)
    distance = np.arange(segments.shape[1])[:, None] - np.arange(segments.shape[1])[None]
    near = (distance >= 0) & (distance < (window or segments.shape[1]))
    return near[None] & (segments[:, :, None] == segments[:, None, :])


def naive_attention(q_BTHK, k_BSGK, v_BSGK, seen, *, scale, softcap=0.0, dout_BTHK=None, bias=0.0):
    """(out, lse_BHT, (dq, dk, dv) or None)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTHK, k_BSGK, v_BSGK))
    B, T, H, K = q.shape
    G = k.shape[2]
    out, lse = np.zeros(q.shape), np.zeros((B, H, T))
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for h in range(H):
        g = h // (H // G)
        raw = scale * np.einsum("btk,bsk->bts", q[:, :, h], k[:, :, g]) + bias
        score = softcap * np.tanh(raw / softcap) if softcap else raw
        score = np.where(seen, score, -np.inf)
        peak = score.max(axis=-1, keepdims=True)
        weight = np.exp(score - peak)
        total = weight.sum(axis=-1, keepdims=True)
        p, lse[:, h] = weight / total, (peak + np.log(total))[..., 0]
        out[:, :, h] = np.einsum("bts,bsk->btk", p, v[:, :, g])
        if dout_BTHK is None:
            continue
        dout = np.asarray(dout_BTHK, np.float64)[:, :, h]
        dp = np.einsum("btk,bsk->bts", dout, v[:, :, g])
        draw = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
        if softcap:
            draw *= 1 - np.tanh(raw / softcap) ** 2
        dq[:, :, h] = scale * np.einsum("bts,bsk->btk", draw, k[:, :, g])
        dk[:, :, g] += scale * np.einsum("bts,btk->bsk", draw, q[:, :, h])
        dv[:, :, g] += np.einsum("bts,btk->bsk", p, dout)
    return out, lse, None if dout_BTHK is None else (dq, dk, dv)
