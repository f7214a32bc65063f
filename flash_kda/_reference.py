"""The recurrence as written, token by token in fp64: the truth that the fast paths are tested against."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from flash_kda.checks import check_cu_seqlens_contents


@torch.no_grad()
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float,
    initial_state: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Kimi Delta Attention in fp64, by the formulas in `flash_kda.fwd`'s docstring.

    For tests: slow (a handful of PyTorch calls a token; sequences and heads side by side). Any device with fp64,
    any floating dtype, any K and V.

    Args:
        q, k, g: [B, T, H, K].
        v: [B, T, H, V].
        beta: [B, T, H].
        scale, lower_bound: numbers.
        A_log: [H].
        dt_bias: [H, K].
        initial_state: [N, H, V, K], or None for zero.
        cu_seqlens: int64 [N + 1], with B = 1, or None. Read on the host.

    Returns:
        out, fp64 [B, T, H, V], and the final state, fp64 [N, H, V, K], both new.

    Raises:
        ValueError: cu_seqlens with B != 1, or contents that do not rise from 0 to T (equal allowed).
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    if cu_seqlens is None:
        spans = [(b * T, (b + 1) * T) for b in range(B)]
    else:
        if B != 1:
            raise ValueError("q: expected B = 1 with cu_seqlens, got shape {}".format(list(q.shape)))
        check_cu_seqlens_contents(cu_seqlens, T)
        offsets = cu_seqlens.tolist()
        spans = list(zip(offsets, offsets[1:]))

    q, k, v, g, beta, A_log, dt_bias = (x.double() for x in (q, k, v, g, beta, A_log, dt_bias))
    q = scale * q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    a = torch.exp(lower_bound * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias)))
    q, k, v, a = (x.flatten(0, 1)[..., None] for x in (q, k, v, a))  # [tokens, H, K or V, 1]
    b = torch.sigmoid(beta).flatten(0, 1)[..., None, None]

    # Longest sequence first: those still running at step t are then the first few, and share every call.
    order = sorted(range(len(spans)), key=lambda n: spans[n][0] - spans[n][1])
    begin = torch.tensor([spans[n][0] for n in order], dtype=torch.long, device=q.device)
    length = [spans[n][1] - spans[n][0] for n in order]
    final = torch.zeros(len(spans), H, V, K, dtype=torch.float64, device=q.device)
    if initial_state is not None:
        final.copy_(initial_state)
    S, out = final[order], torch.empty_like(v)
    running = len(order)
    for t in range(length[0] if length else 0):
        while length[running - 1] <= t:
            running -= 1
        i, s = begin[:running] + t, S[:running]
        s *= a[i].mT
        u = b[i] * (v[i] - s @ k[i])
        s += u * k[i].mT
        out[i] = s @ q[i]
    final[order] = S
    return out.view(B, T, H, V), final
