"""The public function: check the arguments, then run the path of the tensors' device."""

from typing import Optional

from torch import Tensor

from flash_kda import cpu, cuda
from flash_kda.checks import check


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    out: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float,
    initial_state: Optional[Tensor] = None,
    final_state: Optional[Tensor] = None,
    cu_seqlens: Optional[Tensor] = None,
    num_segments: Optional[int] = None,
) -> None:
    """Kimi Delta Attention, forward only. Writes `out` and, if given, `final_state`; returns None.

    Per head, with the state `S` [V, K] in fp32 through a sequence, token by token:

        q' = q * rsqrt(sum(q^2) + 1e-6)       k' = k * rsqrt(sum(k^2) + 1e-6)       b = sigmoid(beta)
        a  = exp(lower_bound * sigmoid(exp(A_log) * (g + dt_bias)))                 one per key channel, in (0, 1]
        S  = S * diag(a);   u = b * (v - S k');   S = S + u k'^T;   out = scale * S q'

    Each row of the batch is one sequence; with `cu_seqlens` each packed sequence is one. A sequence may have any
    length, 0 included (its state is copied through). A sequence's result depends on no other sequence's contents, and
    the same inputs give the same bits on every run. A sequence may be split into several calls, chained by the states.

    Values and states may be of any size from about 1e-27, components of q and k up to about 1e8. A NaN or infinity in
    k, v, g or beta may reach, besides all later tokens, up to 15 earlier ones of its sequence.

    On CUDA tensors this launches on the current stream of `q.device`, does not synchronise and can be captured in a
    CUDA graph. On CPU tensors it runs a chunked fp32 PyTorch path.

    Args:
        q, k: bf16 [B, T, H, K], K = 128. Raw: they are L2-normalised here.
        v: bf16 [B, T, H, V], V = 128.
        g: bf16 [B, T, H, K], gate logits.
        beta: bf16 [B, T, H], logits.
        scale: factor on the output, finite in fp32; usually K ** -0.5.
        out: bf16 [B, T, H, V], written in place. May share memory with no other argument.
        A_log: fp32 [H].
        dt_bias: fp32 [H, K].
        lower_bound: lower bound of a token's log-decay, in [-5, 0] (natural logarithm).
        initial_state: bf16 or fp32 [N, H, V, K], N = B or the number of packed sequences; None starts from zero.
        final_state: same shape, and same dtype as `initial_state`, written in place; None if not wanted. It may be
            the very tensor `initial_state`, and may share memory with nothing else.
        cu_seqlens: int64 [N + 1] on q's device: packed sequence n holds tokens cu_seqlens[n] to cu_seqlens[n + 1].
            Then B = 1 and T is the total. Its contents (first 0, never falling, last T) are validated on CPU
            tensors. On CUDA that would cost a synchronisation, so it is done only with FLASH_KDA_CHECK=1 in the
            environment, and not while a CUDA graph is captured; otherwise wrong contents give wrong results, but
            nothing outside the tensors is touched.
        num_segments: on CUDA, into how many segments, done side by side, each sequence is cut in time: 1 to 1024. Where
            few heads leave the GPU idle this is several times faster; no assumption about the gates is made, and the
            error stays inside the same bound, but for elements of the state that are 1e5 times smaller than others of
            their row and outlive them; other numbers of segments give other last bits. None goes by T, N, H and the
            GPU; 1 is the serial order, in which a sequence's bits are the same in every batch and pack; n cuts
            sequences of more than 32 (n - 1) tokens into n, shorter ones into fewer. Segments are about equal, but the
            last may be half as long as the others, and with six or more each may be a few 16-token chunks longer than
            the one before it. The CPU path has the serial order only.

    All tensors are contiguous and on one device; on CUDA, q, k, v, g, out and the states start on a multiple of 16
    bytes. Bad input raises before anything is written or launched.

    Raises:
        TypeError: an argument is not a tensor or number where one is wanted, or has the wrong dtype.
        ValueError: wrong shape, range, device, layout, alignment or overlap; bad `cu_seqlens` contents, where
            they are validated.
        RuntimeError: a tensor requires grad while grad mode is on (use torch.inference_mode()); on CUDA, the
            kernels are not built, or not for this device's compute capability, or the launch failed.
    """
    num_sequences, tokens, heads = check(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
        num_segments,
    )
    if q.is_cuda:
        cuda.fwd(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
            num_segments, num_sequences, tokens, heads,
        )
    else:
        cpu.fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
