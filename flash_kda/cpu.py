"""The CPU path: chunks of 16 tokens in fp32 PyTorch.

The algorithm is the chunkwise form of the gated delta rule (Yang et al., "Gated Delta Networks", 2024) with the
per-channel decay of Kimi Delta Attention (Kimi Team, "Kimi Linear", 2025): inside a chunk the rank-one updates are
gathered by one triangular solve, so that the state is touched by matrix products once a chunk.

Sequences are run one by one, never batched: a batched product may round differently with the size of the batch, and
a sequence's bits must not depend on its neighbours.
"""

import torch
import torch.nn.functional as F

CHUNK = 16  # g >= -5 a token, so a chunk's decay and its inverse stay within e^-80 and e^80: inside fp32
SPAN = 64 * CHUNK  # tokens prepared at a time: bounds the memory taken for a long sequence


@torch.inference_mode()  # so that `out` and `final_state` may be inference tensors wherever the call is made
def fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens) -> None:
    """`flash_kda.fwd` for checked CPU tensors."""
    B, T, H, K = q.shape
    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        offsets = cu_seqlens.tolist()
        sequences = [(0, begin, end) for begin, end in zip(offsets, offsets[1:])]

    with torch.autocast("cpu", enabled=False):  # or the caller's autocast would run the products in bf16
        for n, (b, begin, end) in enumerate(sequences):
            if initial_state is None:
                S = torch.zeros(H, K, K, dtype=torch.float32, device="cpu")
            else:
                S = initial_state[n].to(torch.float32, copy=True)
            for t in range(begin, end, SPAN):
                rows = (b, slice(t, min(t + SPAN, end)))
                chunks = prepare(q[rows], k[rows], v[rows], g[rows], beta[rows], A_log, dt_bias, lower_bound)
                out[rows] = scale * recur(S, *chunks)[: rows[1].stop - t]
            if final_state is not None:
                final_state[n] = S


def prepare(q, k, v, g, beta, A_log, dt_bias, lower_bound):
    """Everything of L tokens that needs no state, in chunks: what `recur` takes.

    Returns fp32 W, qd, kr [n, H, C, K], U0 [n, H, C, V], Z [n, H, C, C] and E [n, H, 1, K], for C = CHUNK and
    n = ceil(L / C).
    """
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    g = lower_bound * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias))
    beta = torch.sigmoid(beta)[..., None]
    # Padding comes after the activations: a token past the end has k = 0, beta = 0 and no decay.
    q, k, v, g, beta = (to_chunks(x) for x in (q, k, v, g, beta))

    G = g.cumsum(-2)
    E, decay = G[..., -1:, :].exp(), G.exp()
    kd, ki, qd, kr = k * decay, k * (-G).exp(), q * decay, k * (G[..., -1:, :] - G).exp()
    L = beta * (kd @ ki.mT)  # read below its diagonal only
    Z = (qd @ ki.mT).tril()
    right = beta * torch.cat((kd, v), -1)
    W, U0 = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True).chunk(2, -1)
    return W, qd, kr, U0, Z, E


def to_chunks(x):
    """[L, H, D] -> [ceil(L / CHUNK), H, CHUNK, D], padded with zeros."""
    x = F.pad(x, (0, 0, 0, 0, 0, -len(x) % CHUNK))
    return x.unflatten(0, (len(x) // CHUNK, CHUNK)).transpose(1, 2).contiguous()


def recur(S, W, qd, kr, U0, Z, E):
    """Run the chunks in turn: S [H, V, K] in place; returns the output before `scale`, [n * CHUNK, H, V]."""
    O = torch.empty_like(U0)
    for n in range(len(O)):
        R = torch.baddbmm(U0[n], W[n], S.mT, alpha=-1)  # [H, C, V]
        torch.baddbmm(qd[n] @ S.mT, Z[n], R, out=O[n])
        S.mul_(E[n]).baddbmm_(R.mT, kr[n])
    return O.transpose(1, 2).flatten(0, 1)
