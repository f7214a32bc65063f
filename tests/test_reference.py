"""`flash_kda.reference` against the formulas written with plain Python numbers, and the tests' form of it for long sequences against it."""

import math

import pytest
import torch

import flash_kda
from problems import GATES, error, long_reference, make, reference


def scalar_recurrence(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, S):
    """One sequence of one head, lists of floats: q, k, g [T][K], v [T][V], S [V][K]. Returns (out [T][V], S)."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    unit = lambda x: [y / math.sqrt(sum(z * z for z in x) + 1e-6) for y in x]
    out = []
    for t in range(len(q)):
        qt, kt, b = unit(q[t]), unit(k[t]), sigmoid(beta[t])
        decay = [math.exp(lower_bound * sigmoid(math.exp(A_log) * (y + z))) for y, z in zip(g[t], dt_bias)]
        row = []
        for i in range(len(S)):
            decayed = [s * a for s, a in zip(S[i], decay)]
            u = b * (v[t][i] - sum(s * y for s, y in zip(decayed, kt)))
            S[i] = [s + u * y for s, y in zip(decayed, kt)]
            row.append(scale * sum(s * y for s, y in zip(S[i], qt)))
        out.append(row)
    return out, S


def inputs(B, T, H, K, V, N, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return dict(
        q=normal(B, T, H, K), k=normal(B, T, H, K), v=normal(B, T, H, V), g=normal(B, T, H, K), beta=normal(B, T, H),
        scale=0.7, A_log=normal(H), dt_bias=normal(H, K), lower_bound=-3.0, initial_state=normal(N, H, V, K),
    )


@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 7], [0, 0, 1, 7], [0, 6, 7, 7]])
@pytest.mark.parametrize("with_state", [True, False])
def test_reference_matches_the_scalar_formulas(offsets, with_state):
    B, T, H, K, V = (2 if offsets is None else 1), 7, 2, 3, 4
    N = B if offsets is None else len(offsets) - 1
    x = inputs(B, T, H, K, V, N, seed=1)
    if not with_state:
        x["initial_state"] = None
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    out, final = flash_kda.reference(cu_seqlens=cu_seqlens, **x)
    assert out.dtype == final.dtype == torch.float64
    assert out.shape == (B, T, H, V) and final.shape == (N, H, V, K)
    for n in range(N):
        b, rows = (n, slice(0, T)) if offsets is None else (0, slice(offsets[n], offsets[n + 1]))
        for h in range(H):
            S = x["initial_state"][n, h].tolist() if with_state else [[0.0] * K for _ in range(V)]
            tokens = [x[name][b, rows, h].tolist() for name in ("q", "k", "v", "g", "beta")]
            o, S = scalar_recurrence(
                *tokens, x["scale"], x["A_log"][h].item(), x["dt_bias"][h].tolist(), x["lower_bound"], S
            )
            torch.testing.assert_close(out[b, rows, h], torch.tensor(o, dtype=torch.float64).view(-1, V))
            torch.testing.assert_close(final[n, h], torch.tensor(S, dtype=torch.float64))


def test_reference_leaves_its_inputs_alone():
    x = inputs(1, 5, 2, 3, 3, 1, seed=2)
    before = {name: y.clone() for name, y in x.items() if isinstance(y, torch.Tensor)}
    flash_kda.reference(**x)
    for name, y in before.items():
        assert torch.equal(x[name], y), name


@pytest.mark.parametrize("T,N", [(0, 2), (4, 0)])
def test_reference_of_nothing(T, N):
    x = inputs(N, T, 2, 3, 3, N, seed=3)
    out, final = flash_kda.reference(**x)
    assert out.shape == (N, T, 2, 3)
    assert torch.equal(final, x["initial_state"])


def test_reference_rejects_bad_packs():
    x = inputs(2, 4, 1, 3, 3, 2, seed=4)
    with pytest.raises(ValueError, match="B = 1"):
        flash_kda.reference(cu_seqlens=torch.tensor([0, 4]), **x)
    x = inputs(1, 4, 1, 3, 3, 2, seed=4)
    with pytest.raises(ValueError, match="^cu_seqlens"):
        flash_kda.reference(cu_seqlens=torch.tensor([0, 2, 3]), **x)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lens,packed,state", [
    ([300, 0, 1, 64, 63, 129], True, torch.float32), ([130, 130], False, torch.bfloat16), ([65], False, None),
], ids=str)
def test_long_reference(device, gate, lens, packed, state):
    x = make(lens, heads=2, gate=gate, packed=packed, state=state, device=device)
    for found, true in zip(long_reference(x), reference(x)):
        assert found.dtype == torch.float64 and error(found, true) <= 1e-12


def test_long_reference_of_one_key(device):
    x = make([300], heads=2, gate="none", device=device)
    x.k[:] = x.k[:, :1]
    for found, true in zip(long_reference(x), reference(x)):
        assert error(found, true) <= 1e-12
