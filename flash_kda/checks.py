"""Validation of `flash_kda.fwd`'s arguments.

It is on the host path of every CUDA call, so a good call must pass in a few microseconds: messages are
built only when something is wrong.
"""

import numbers
import os
from typing import Tuple

import torch
from torch import Tensor

HEAD_DIM = 128  # K and V
ALIGNMENT = 16  # bytes; the CUDA kernels move these tensors by TMA
MOST_SEGMENTS = 1024  # as csrc/plan.h has it
FP32_MAX = torch.finfo(torch.float32).max

BF16, FP32, INT64, STRIDED = torch.bfloat16, torch.float32, torch.int64, torch.strided


def _fail_type(name, expected, x):
    got = "a tensor of dtype {}".format(x.dtype) if isinstance(x, Tensor) else type(x).__name__
    raise TypeError("{}: expected {}, got {}".format(name, expected, got))


def _fail(name, expected, got):
    raise ValueError("{}: expected {}, got {}".format(name, expected, got))


def _tensor(name, x, dtype, shape, dims, device):
    if not isinstance(x, Tensor) or x.dtype is not dtype:
        _fail_type(name, "a {} tensor of shape {}".format(dtype, dims), x)
    if x.shape != shape:
        _fail(name, "shape {} = {}".format(dims, list(shape)), list(x.shape))
    if x.device != device:
        _fail(name, "a tensor on {}, where q is".format(device), "one on {}".format(x.device))
    if x.layout is not STRIDED or not x.is_contiguous():
        _contiguous(name, x)


def _contiguous(name, x):
    if x.layout is not STRIDED:
        _fail(name, "a contiguous tensor", "one of layout {}".format(x.layout))
    if not x.is_contiguous():
        _fail(name, "a contiguous tensor", "strides {} for shape {}".format(x.stride(), list(x.shape)))


def _number(name, x, low, high, expected):
    # float first: isinstance against the abstract class costs more than all the rest of this function.
    if type(x) is not float and (isinstance(x, bool) or not isinstance(x, numbers.Real)):
        _fail_type(name, expected, x)
    if not low <= x <= high:  # so written that a NaN fails too
        _fail(name, expected, x)


def _integer(name, x, low, high):
    expected = "an integer from {} to {}, or None".format(low, high)
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        _fail_type(name, expected, x)
    if not low <= x <= high:
        _fail(name, expected, x)


def check_cu_seqlens_contents(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless `cu_seqlens` starts at 0, never falls and ends at `tokens`. Synchronises on CUDA."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        _fail("cu_seqlens", "cu_seqlens[0] = 0", offsets[0])
    for n in range(len(offsets) - 1):
        if offsets[n + 1] < offsets[n]:
            got = "cu_seqlens[{}] = {} after {}".format(n + 1, offsets[n + 1], offsets[n])
            _fail("cu_seqlens", "offsets that never fall", got)
    if offsets[-1] != tokens:
        _fail("cu_seqlens", "the last offset to be T = {}".format(tokens), offsets[-1])


def check_alignment(name: str, address: int) -> None:
    """Raise ValueError unless `address`, the first byte of tensor `name`, suits the CUDA kernels."""
    if address % ALIGNMENT:
        _fail(name, "data on a multiple of {} bytes".format(ALIGNMENT), "address {:#x}".format(address))


def _spans(tensors):
    # The address is 0 where there are no elements, so that an empty tensor overlaps nothing.
    return [(name, x.data_ptr(), x.nbytes) for name, x in tensors]


def _check_overlap(written, others):
    name, begin, size = written
    end = begin + size
    for other, other_begin, other_size in others:
        if other_begin < end and begin < other_begin + other_size:
            _fail(name, "memory of its own", "a tensor that shares memory with {}".format(other))


def check(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
    num_segments,
) -> Tuple[int, int, int]:
    """Raise as `flash_kda.fwd` says for bad arguments. Returns (N, T, H): sequences, tokens of a row, heads."""
    if not isinstance(q, Tensor) or q.dtype is not BF16:
        _fail_type("q", "a torch.bfloat16 tensor of shape [B, T, H, K]", q)
    shape, device = q.shape, q.device
    if len(shape) != 4 or shape[3] != HEAD_DIM:
        _fail("q", "shape [B, T, H, K] with K = {}".format(HEAD_DIM), list(shape))
    if device.type != "cuda" and device.type != "cpu":
        _fail("q", "a tensor on a CUDA device or the CPU", "one on {}".format(device))
    B, T, H, _ = shape
    _contiguous("q", q)
    _tensor("k", k, BF16, shape, "[B, T, H, K]", device)
    _tensor("v", v, BF16, shape, "[B, T, H, V]", device)
    _tensor("g", g, BF16, shape, "[B, T, H, K]", device)
    _tensor("beta", beta, BF16, shape[:3], "[B, T, H]", device)
    _tensor("out", out, BF16, shape, "[B, T, H, V]", device)
    _tensor("A_log", A_log, FP32, (H,), "[H]", device)
    _tensor("dt_bias", dt_bias, FP32, (H, HEAD_DIM), "[H, K]", device)
    _number("scale", scale, -FP32_MAX, FP32_MAX, "a number, finite in fp32")
    _number("lower_bound", lower_bound, -5.0, 0.0, "a number in [-5, 0]")
    if num_segments is not None:
        _integer("num_segments", num_segments, 1, MOST_SEGMENTS)

    read = [("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("A_log", A_log), ("dt_bias", dt_bias)]
    N = B
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype is not INT64:
            _fail_type("cu_seqlens", "a torch.int64 tensor of shape [N + 1], or None", cu_seqlens)
        packed = cu_seqlens.shape
        if len(packed) != 1 or packed[0] == 0:
            _fail("cu_seqlens", "shape [N + 1], at least [1]", list(packed))
        N = packed[0] - 1
        _tensor("cu_seqlens", cu_seqlens, INT64, packed, "[N + 1]", device)
        if B != 1:
            _fail("q", "B = 1 with cu_seqlens (packed sequences lie along T)", "shape {}".format(list(shape)))
        read.append(("cu_seqlens", cu_seqlens))
    states = []
    for name, x in (("initial_state", initial_state), ("final_state", final_state)):
        if x is not None:
            if not isinstance(x, Tensor) or (x.dtype is not FP32 and x.dtype is not BF16):
                _fail_type(name, "a torch.float32 or torch.bfloat16 tensor of shape [N, H, V, K], or None", x)
            _tensor(name, x, x.dtype, (N, H, HEAD_DIM, HEAD_DIM), "[N, H, V, K]", device)
            states.append((name, x))
    if len(states) == 2 and final_state.dtype is not initial_state.dtype:
        _fail_type("final_state", "the dtype of initial_state, {}".format(initial_state.dtype), final_state)

    if torch.is_grad_enabled():
        for name, x in read + states + [("out", out)]:
            if x.requires_grad:
                raise RuntimeError(
                    "{}: requires grad, but flash_kda.fwd is forward only and records no gradient; "
                    "call it under torch.inference_mode()".format(name)
                )

    spans, out_span, state_spans = _spans(read), ("out", out.data_ptr(), out.nbytes), _spans(states)
    _check_overlap(out_span, spans + state_spans)
    if final_state is not None:
        final = state_spans[-1]
        _check_overlap(final, spans)
        # The same tensor twice is the in-place update; any other overlap is a mistake.
        if initial_state is not None and final[1] != state_spans[0][1]:
            _check_overlap(final, state_spans[:1])
    if device.type == "cuda":
        for name, begin, _ in spans[:4] + [out_span] + state_spans:  # spans[:4]: q, k, v, g
            check_alignment(name, begin)

    if cu_seqlens is not None and (
        device.type == "cpu"
        # A graph capture cannot synchronise, and the contents at capture are not those of a replay.
        or (os.environ.get("FLASH_KDA_CHECK") == "1" and not torch.cuda.is_current_stream_capturing())
    ):
        check_cu_seqlens_contents(cu_seqlens, T)
    return N, T, H
