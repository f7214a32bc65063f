"""Problems for the tests: inputs by gate regime, runs with poisoned and guarded outputs, and error bounds."""

import dataclasses
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import flash_kda

D = 128  # K and V

# Relative Frobenius errors against fp64: out, fp32 state, bf16 state. Rounding to bf16 alone is 1.7e-3. The CPU path
# computes in fp32; the CUDA path multiplies in bf16.
BOUNDS = {"cpu": (2.5e-3, 1e-5, 2.5e-3), "cuda": (5.5e-3, 4e-3, 4.5e-3)}
GUARD = 1 << 16  # elements on either side of an output; more than a chunk of 16 tokens of any problem here
GUARD_VALUE = 7.0
MANY_HEADS = 48  # of three sequences or more: more chains than an H200 has SMs, so that some are cut to share the work out evenly

GATES = ("random", "slow", "mixed", "none", "hardest")


def gate_parameters(gate, heads, rand):
    """A_log [H] and dt_bias [H, K] of a regime; `rand` makes uniform numbers in [0, 1)."""
    forgetful, slow = rand(heads, D), -4 - 4 * rand(heads, D)
    if gate == "random":  # mean log-decay about -3.5 a token: forgets within a few tokens
        return rand(heads), forgetful
    if gate == "slow":  # log-decay between about -0.09 and -0.002 a token
        return torch.zeros(heads), slow
    if gate == "mixed":  # either kind of channel within each head
        return rand(heads), torch.where(rand(heads, D) < 0.5, forgetful, slow)
    if gate == "none":  # no decay at all
        return rand(heads), torch.full((heads, D), -60.0)
    if gate == "hardest":  # saturated: every token decays by lower_bound, the widest range a chunk can have
        return rand(heads), torch.full((heads, D), 60.0)
    raise ValueError(gate)


@dataclasses.dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float
    initial_state: Optional[Tensor]
    cu_seqlens: Optional[Tensor]
    lens: List[int]

    def arguments(self):
        """What `fwd` and `reference` both take."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "lens"}

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def clone(self):
        return self.replace(**{n: x.clone() for n, x in self.arguments().items() if isinstance(x, Tensor)})

    def rows(self, n):
        """Where sequence n lies in q."""
        if self.cu_seqlens is None:
            return (n, slice(None))
        begin = sum(self.lens[:n])
        return (0, slice(begin, begin + self.lens[n]))

    def alone(self, n, begin=0, end=None):
        """Sequence n, or its tokens begin to end, as a problem of one batch row."""
        cut = lambda x: x[self.rows(n)][begin:end].unsqueeze(0).contiguous()
        tokens = {name: cut(getattr(self, name)) for name in ("q", "k", "v", "g", "beta")}
        state = None if self.initial_state is None else self.initial_state[n : n + 1].clone()
        return self.replace(initial_state=state, cu_seqlens=None, lens=[tokens["q"].shape[1]], **tokens)


def make(lens, heads=4, gate="mixed", packed=True, state=torch.float32, seed=0, device="cpu"):
    """Random problem. `lens`: tokens of each sequence, packed along T or, all equal, as batch rows."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    A_log, dt_bias = gate_parameters(gate, heads, lambda *shape: torch.rand(*shape, generator=generator))
    lens = list(lens)
    if packed:
        shape, offsets = (1, sum(lens), heads), [sum(lens[:n]) for n in range(len(lens) + 1)]
        cu_seqlens = torch.tensor(offsets, dtype=torch.int64, device=device)
    else:
        assert len(set(lens)) <= 1
        shape, cu_seqlens = (len(lens), lens[0] if lens else 16, heads), None
    tokens = {name: normal(*shape, D).bfloat16().to(device) for name in ("q", "k", "v", "g")}
    return Problem(
        beta=normal(*shape).bfloat16().to(device),
        scale=D ** -0.5,
        A_log=A_log.to(device),
        dt_bias=dt_bias.to(device),
        lower_bound=-5.0,
        initial_state=None if state is None else (normal(len(lens), heads, D, D) * 0.1).to(state).to(device),
        cu_seqlens=cu_seqlens,
        lens=lens,
        **tokens,
    )


def tasks_of(length, least_chunks, most):
    """As csrc/sm90/sharing.h has it."""
    return min(max(-(-length // 16) // least_chunks - 1, 1), most)


def handovers_of(lens, heads, tasks, least_chunks=1):
    """How many the kernel fills for sequences of these lengths."""
    cut = [n for n in (tasks_of(length, least_chunks, tasks) for length in lens) if n > 1]
    return heads * sum(2 * (n // 2) + 1 for n in cut)


class Guarded:
    """A NaN-filled tensor inside a larger buffer; `check` tells whether anything was written around it."""

    def __init__(self, shape, dtype, device):
        numel = torch.Size(shape).numel()
        self.buffer = torch.full((numel + 2 * GUARD,), GUARD_VALUE, dtype=dtype, device=device)
        self.tensor = self.buffer[GUARD : GUARD + numel].view(shape).fill_(float("nan"))

    def check(self):
        around = torch.cat((self.buffer[:GUARD], self.buffer[len(self.buffer) - GUARD :]))
        assert (around == GUARD_VALUE).all(), "written outside the tensor"


def run(x, final=torch.float32, in_place=False, fwd=flash_kda.fwd, **options):
    """`fwd` of problem x: (out, final state). `final`: dtype of the final state, where x has no initial one. `options` are for `fwd`."""
    out = Guarded(x.v.shape, torch.bfloat16, x.v.device)
    state, arguments = None, x.arguments()
    if final is not None:
        dtype = final if x.initial_state is None else x.initial_state.dtype
        state = Guarded((len(x.lens), x.v.shape[2], D, D), dtype, x.v.device)
        if in_place:
            arguments["initial_state"] = state.tensor.copy_(x.initial_state)
    result = fwd(out=out.tensor, final_state=state and state.tensor, **arguments, **options)
    assert result is None
    out.check()
    if state:
        state.check()
    return out.tensor, state and state.tensor


def reference(x):
    return flash_kda.reference(**x.arguments())


def long_reference(x):
    """`reference` in chunks of tokens, for sequences too long to go through one by one: it differs by fp64's rounding alone."""
    C, H = 64, x.v.shape[2]  # g >= -5 a token, so a chunk's decay stays above e^-320: inside fp64
    out = torch.empty(x.v.shape, dtype=torch.float64, device=x.v.device)
    final = torch.zeros(len(x.lens), H, D, D, dtype=torch.float64, device=x.v.device)
    if x.initial_state is not None:
        final.copy_(x.initial_state)
    A_log, dt_bias = x.A_log.double(), x.dt_bias.double()
    for n, L in enumerate(x.lens):
        if L == 0:
            continue
        count = -(-L // C)
        chunks = lambda y: F.pad(y, (0, 0, 0, 0, 0, count * C - L)).unflatten(0, (count, C)).transpose(1, 2)
        unit = lambda y: y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)
        q, k, v, g, beta = (getattr(x, name)[x.rows(n)].double() for name in ("q", "k", "v", "g", "beta"))
        g = chunks(x.lower_bound * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias)))
        q, k, v, b = chunks(x.scale * unit(q)), chunks(unit(k)), chunks(v), chunks(torch.sigmoid(beta)[..., None])
        decay = g.cumsum(-2).exp()  # from the chunk's beginning
        kd, qd, ki = k * decay, q * decay, k / decay
        # u + b tril(kd ki^T, -1) u = b (v - kd S^T): the residuals of a chunk's tokens, with S as before the chunk
        W, U = torch.linalg.solve_triangular(
            b * (kd @ ki.mT), b * torch.cat((kd, v), -1), upper=False, unitriangular=True
        ).chunk(2, -1)
        Z = (qd @ ki.mT).tril()
        S, o = final[n], torch.empty_like(v)
        for c in range(count):
            u = U[c] - W[c] @ S.mT
            o[c] = qd[c] @ S.mT + Z[c] @ u
            S = (S + u.mT @ ki[c]) * decay[c, :, -1:]
        out[x.rows(n)] = o.transpose(1, 2).flatten(0, 1)[:L]
        final[n] = S
    return out, final


def error(found, truth):
    """Relative error in the Frobenius norm; absolute where the truth is zero."""
    size = truth.norm().item()
    return (found.double() - truth).norm().item() / (size if size > 0 else 1.0)


def worst_row_error(found, truth):
    """The largest error of a vector along the last dimension, over its own or, if larger, the typical norm."""
    norms = truth.norm(dim=-1)
    typical = norms.square().mean().sqrt().item() if norms.numel() else 0.0
    if not typical > 0:
        return error(found, truth)
    return ((found.double() - truth).norm(dim=-1) / norms.clamp(min=typical)).max().item()


def check(x, out, state, truth=None, slack=1.0, path=None):
    """Hold the results of problem x against fp64: as a whole, each sequence by itself, and row by row.

    `slack` widens the CUDA bounds where bf16 products are known to lose more than in the plain regimes. `path` is whose bounds
    hold, if not those of the tensors' device.
    """
    true_out, true_state = reference(x) if truth is None else truth
    device = path or x.q.device.type
    out_bound, fp32_bound, bf16_bound = BOUNDS[device]
    slack = slack if device == "cuda" else 1.0
    pairs = [("out", out, true_out, out_bound * slack, [x.rows(n) for n in range(len(x.lens))])]
    if state is not None:
        bound = fp32_bound if state.dtype == torch.float32 else bf16_bound
        pairs.append(("state", state, true_state, bound * slack, range(len(x.lens))))
    for name, found, true, bound, parts in pairs:
        assert found.isfinite().all(), name
        assert error(found, true) <= bound, name
        for n, part in enumerate(parts):
            # Over few tokens the error scatters, hence half as much again.
            assert error(found[part], true[part]) <= 1.5 * bound, "{} of sequence {}".format(name, n)
        # A stray element in a row of 128 is off by about 0.09 of the row's norm.
        assert worst_row_error(found, true) <= 8 * bound, name


def same_bits(a, b):
    integers = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
    return a.shape == b.shape and torch.equal(a.view(integers[a.dtype]), b.view(integers[b.dtype]))
