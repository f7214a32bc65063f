"""Inputs and clocks: seeded problems, GPU time by CUDA-graph replay, host time, copy bandwidth, error."""
import statistics
import sys
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from rows import HEAD_DIM, Row

REPEATS, UNTIMED = 20, 4
LEAD_CYCLES = 2_000_000  # of the GPU's clock: a millisecond
HOST_CALLS = 50
LOWER_BOUND = -5.0


def require_cuda(script: str) -> None:
    """Exits where there is nothing to measure."""
    if not torch.cuda.is_available():
        sys.exit("%s measures GPU time: PyTorch finds no CUDA device here." % script)


class Problem(NamedTuple):
    """The arguments of one call. Tokens of all sequences lie in one batch row; cu_seqlens is None for one sequence."""
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    scale: float
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    lower_bound: float
    initial_state: torch.Tensor
    cu_seqlens: Optional[torch.Tensor]


def problem(row: Row, gate: str, device: str = "cuda", seed: int = 0) -> Problem:
    """Fresh inputs for a row.

    gate "random": logits and parameters of order one, so that a head forgets within a few tokens;
    gate "slow": biases between -8 and -4, so that it remembers tens to hundreds of tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    tokens, heads, sequences = row.tokens, row.heads, len(row.lens)
    q, k, v, g = (normal(1, tokens, heads, HEAD_DIM).bfloat16() for _ in range(4))
    if gate == "random":
        A_log, dt_bias = uniform(heads), uniform(heads, HEAD_DIM)
    elif gate == "slow":
        A_log, dt_bias = torch.zeros(heads, device=device), -4.0 - 4.0 * uniform(heads, HEAD_DIM)
    else:
        raise ValueError("no such gate: %r" % (gate,))
    cu_seqlens = None
    if sequences > 1:
        bounds = torch.tensor((0,) + row.lens).cumsum(0)
        cu_seqlens = bounds.to(device=device, dtype=torch.int64)
    return Problem(q=q, k=k, v=v, g=g, beta=normal(1, tokens, heads).bfloat16(), scale=HEAD_DIM ** -0.5, A_log=A_log,
                   dt_bias=dt_bias, lower_bound=LOWER_BOUND,
                   initial_state=0.1 * normal(sequences, heads, HEAD_DIM, HEAD_DIM), cu_seqlens=cu_seqlens)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def accuracy(call: Callable, p: Problem) -> Dict[str, float]:
    """Relative errors {"out", "state"} of call(p) against `flash_kda.reference`, the fp64 recurrence."""
    import flash_kda
    out, state = call(p)
    want_out, want_state = flash_kda.reference(p.q, p.k, p.v, p.g, p.beta, p.scale, p.A_log, p.dt_bias, p.lower_bound,
                                               initial_state=p.initial_state, cu_seqlens=p.cu_seqlens)
    return {"out": relative_error(out, want_out), "state": relative_error(state, want_state)}


def _cold_times_us(run: Callable[[], None]) -> List[float]:
    """GPU microseconds of each of REPEATS runs, every one after a flush of the L2 cache.

    The flush is a memset larger than L2; the lines it leaves dirty are written back during the run, on everybody's
    account alike. A run is queued while the GPU spins in front of the flush: where the host has taken longer, as it does
    now and then, the clock may have seen the launch, and the run does not count. UNTIMED runs come first.

    Raises RuntimeError where the host is too slow time and again.
    """
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    flush = torch.empty(max(128 << 20, 2 * l2), dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(10 * (UNTIMED + REPEATS)):
        lead = torch.cuda.Event()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(LEAD_CYCLES)
        lead.record()
        flush.zero_()
        start.record()
        run()
        stop.record()
        queued_ahead = not lead.query()
        torch.cuda.synchronize()
        if queued_ahead:
            times.append(1e3 * start.elapsed_time(stop))
        if len(times) == UNTIMED + REPEATS:
            return times[UNTIMED:]
    raise RuntimeError("the host does not queue a run within %d cycles of the GPU" % LEAD_CYCLES)


def device_us(call: Callable[[], object]) -> Tuple[float, List[float]]:
    """Median and quartiles of a call's GPU microseconds, replayed from a CUDA graph with a cold L2 cache."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    low, median, high = statistics.quantiles(_cold_times_us(graph.replay), n=4)
    return median, [low, high]


def host_us(call: Callable[[], object]) -> float:
    """Host microseconds to issue a call, its output tensors' allocation included: the best mean of three loops."""
    means = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        means.append(1e6 * (time.perf_counter() - start) / HOST_CALLS)
    torch.cuda.synchronize()
    return min(means)


def copy_tbps() -> float:
    """Terabytes a second, read plus written, of a 1 GiB device-to-device copy with a cold L2 cache."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / (statistics.median(_cold_times_us(lambda: target.copy_(source))) * 1e6)
