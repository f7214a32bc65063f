"""What `flash_kda.fwd` promises, on every path: the same checks for CPU and CUDA tensors."""

import random

import pytest
import torch

import flash_kda
from problems import D, GATES, MANY_HEADS, check, error, long_reference, make, reference, run, same_bits

# Few tokens scatter more, and without decay nothing of a rounding error is forgotten (CUDA bounds only).
SHORT = NO_DECAY = 1.5
# With one key repeated the residual v - S k is the small difference of large numbers, and S k is a bf16 product.
REPEATED = 4.0

# The planner's choice, the serial order, and segments whatever the GPU is. The CPU path has one order, whichever is named.
any_order = pytest.mark.parametrize("num_segments", [None, 1, 3])


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("gate", GATES)
def test_accuracy(device, gate):
    x = make([700, 33, 1000, 5], gate=gate, device=device)
    check(x, *run(x), slack=NO_DECAY if gate == "none" else 1.0)


@pytest.mark.parametrize("gate", GATES)
def test_repeated_key(device, gate):
    x = make([300, 40], gate=gate, device=device, seed=1)
    x.k[:] = x.k[:, :1]
    check(x, *run(x), slack=REPEATED)


@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 257, 1000])
@pytest.mark.parametrize("gate", ["mixed", "hardest"])
def test_every_length(device, T, gate):
    x = make([T], packed=False, gate=gate, seed=T, device=device)
    check(x, *run(x), slack=SHORT)


def test_more_tokens_than_the_cpu_path_prepares_at_once(device):
    x = make([1024 + 1024 + 5], packed=False, heads=2, seed=2, device=device)
    check(x, *run(x))


@pytest.mark.parametrize("B,T,H", [(3, 17, 2), (2, 64, 5), (5, 1, 3), (2, 200, 1), (17, 3, 4)])
def test_batch(device, B, T, H):
    x = make([T] * B, packed=False, heads=H, seed=B, device=device)
    check(x, *run(x), slack=SHORT)


@pytest.mark.parametrize("H", [1, 3, 12, 67])
def test_heads(device, H):
    x = make([35, 18], heads=H, seed=H, device=device)
    check(x, *run(x), slack=SHORT)


@pytest.mark.parametrize("lens", [
    [0, 20, 33],
    [20, 0, 33],
    [20, 33, 0],
    [0, 0, 5, 0, 0, 40, 0],
    [0, 0, 0],
    [0],
    [64],
    [1] * 40,
    [16, 32, 48],
    [15, 17, 31, 1, 64, 3],
], ids=str)
@any_order
def test_pack(device, lens, num_segments):
    x = make(lens, seed=len(lens), device=device)
    out, state = run(x, num_segments=num_segments)
    check(x, out, state, slack=SHORT)
    for n, length in enumerate(lens):
        if length == 0:
            assert same_bits(state[n], x.initial_state[n])


@pytest.mark.parametrize("scale_q,scale_k", [(1e4, 1e4), (1e-4, 1e-4), (1e4, 1e-4), (1e-3, 1e-20)])
def test_magnitude_of_q_and_k(device, scale_q, scale_k):
    # 1e-4 is where the 1e-6 under the root decides; at 1e-20 the squares underflow fp32.
    x = make([50, 17], seed=3, device=device)
    x = x.replace(q=x.q * scale_q, k=x.k * scale_k)
    out, state = run(x)
    check(x, out, state, slack=SHORT)


@pytest.mark.parametrize("scale_v", [1e-10, 1e10])
def test_magnitude_of_v(device, scale_v):
    x = make([50, 17], seed=4, state=None, device=device)
    x = x.replace(v=x.v * scale_v)
    check(x, *run(x), slack=SHORT)


def test_zero_vectors(device):
    x = make([50, 17], seed=5, device=device)
    x.q[:, 3:7] = 0
    x.k[:, 5:25] = 0
    x.v[:, 30:] = 0
    out, state = run(x)
    assert (out[:, 3:7] == 0).all()
    check(x, out, state, slack=SHORT)


def test_all_zero_keys_only_decay_the_state(device):
    x = make([40], gate="slow", seed=6, device=device)
    x.k.zero_()
    check(x, *run(x), slack=SHORT)


@pytest.mark.parametrize("logit", [-30.0, 30.0, -1e4, 1e4])
def test_saturated_beta(device, logit):
    x = make([50, 17], gate="slow", seed=7, device=device)
    x.beta.fill_(logit)
    check(x, *run(x), slack=REPEATED)


@pytest.mark.parametrize("logit", [-1e4, 1e4, 3e38])
def test_saturated_gate_logits(device, logit):
    x = make([50, 17], seed=8, device=device)
    x.g[..., ::2] = logit
    check(x, *run(x), slack=NO_DECAY)


@pytest.mark.parametrize("A_log", [-10.0, 5.0, 88.5, 100.0])
def test_extreme_A_log(device, A_log):
    x = make([50, 17], seed=9, device=device)
    x.A_log.fill_(A_log)
    check(x, *run(x), slack=NO_DECAY)


@pytest.mark.parametrize("A_log", [-1.0, 100.0])
def test_infinite_dt_bias(device, A_log):
    x = make([50, 17], seed=9, device=device)
    x.A_log.fill_(A_log)
    x.dt_bias[:, ::3], x.dt_bias[:, 1::3] = float("inf"), -float("inf")
    check(x, *run(x), slack=NO_DECAY)


@pytest.mark.parametrize("lower_bound", [-5, -5.0, -2.5, -1.0, -1e-3, 0, 0.0])
def test_lower_bound(device, lower_bound):
    x = make([50, 100], seed=10, device=device).replace(lower_bound=lower_bound)
    check(x, *run(x), slack=NO_DECAY)


@pytest.mark.parametrize("scale", [1, 1.0, -0.5, 1e-12, 1e12, 128 ** -0.5])
def test_scale(device, scale):
    x = make([50, 17], seed=11, device=device).replace(scale=scale)
    check(x, *run(x), slack=SHORT)


def test_scale_zero(device):
    x = make([50, 17], seed=11, device=device)
    out, state = run(x.replace(scale=0.0))
    assert (out == 0).all()
    assert same_bits(state, run(x)[1])


@pytest.mark.parametrize("draw", range(8))
def test_fresh_problem(device, draw):
    """Another one in every run. A failure shows its seed."""
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)
    rand = random.Random(seed)
    lens = [rand.choice([0, 16, rand.randint(20, 300)]) for _ in range(rand.randint(0, 4))] + [rand.randint(20, 700)]
    rand.shuffle(lens)
    state = rand.choice([torch.float32, torch.bfloat16, None])
    x = make(lens, heads=rand.randint(1, 5), gate=rand.choice(GATES), state=state, seed=seed, device=device)
    x = x.replace(lower_bound=rand.uniform(-5, 0), scale=rand.uniform(-2, 2))
    check(x, *run(x, num_segments=rand.choice([None, 1, rand.randint(2, 12)])), slack=NO_DECAY)


# ---------------------------------------------------------------- states


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("state,final", [
    (None, None),
    (None, torch.float32),
    (None, torch.bfloat16),
    (torch.float32, None),
    (torch.float32, torch.float32),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16),
])
@any_order
def test_states(device, packed, state, final, num_segments):
    x = make([37, 0, 70] if packed else [37, 37], packed=packed, state=state, seed=12, device=device)
    out, found = run(x, final=final, num_segments=num_segments)
    assert (found is None) == (final is None)
    check(x, out, found, slack=SHORT)


@pytest.mark.parametrize("heads", [4, MANY_HEADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@any_order
def test_states_in_place(device, heads, dtype, num_segments):
    x = make([37, 0, 70, 16], heads=heads, state=dtype, seed=13, device=device)
    out, state = run(x, num_segments=num_segments)
    out_in_place, state_in_place = run(x, in_place=True, num_segments=num_segments)
    assert same_bits(out, out_in_place)
    assert same_bits(state, state_in_place)


@any_order
def test_no_initial_state_is_a_zero_one(device, num_segments):
    x = make([37, 0, 70], seed=14, device=device)
    expected = run(x.replace(initial_state=torch.zeros_like(x.initial_state)), num_segments=num_segments)
    found = run(x.replace(initial_state=None), num_segments=num_segments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (found[1][1] == 0).all()


@any_order
def test_final_state_does_not_change_the_output(device, num_segments):
    x = make([37, 0, 70], seed=15, device=device)
    without, _ = run(x, final=None, num_segments=num_segments)
    assert same_bits(without, run(x, num_segments=num_segments)[0])


def test_bf16_state_is_kept_in_fp32_inside_a_sequence(device):
    # A state rounded to bf16 at every chunk would be off by far more than one rounding.
    x = make([1000], gate="none", state=torch.bfloat16, heads=2, seed=16, device=device)
    _, state = run(x)
    out, state_fp32 = run(x.replace(initial_state=x.initial_state.float()))
    assert same_bits(state, state_fp32.bfloat16())
    check(x, out, state_fp32)


@pytest.mark.parametrize("gate", ["slow", "mixed", "random"])
@pytest.mark.parametrize("cuts", [[100], [1, 2, 3], [16, 48], [5, 5, 37, 64, 64, 199], list(range(1, 40))], ids=str)
def test_chained_calls(device, gate, cuts):
    T = 200
    x = make([T], packed=False, gate=gate, heads=2, seed=17, device=device)
    state, outs = x.initial_state.clone(), []
    for begin, end in zip([0] + cuts, cuts + [T]):
        part = x.alone(0, begin, end).replace(initial_state=state)
        out, state = run(part, in_place=len(outs) % 2 == 0)
        outs.append(out)
    check(x, torch.cat(outs, 1), state, slack=SHORT)


def test_token_by_token(device):
    x = make([30] * 3, packed=False, heads=2, seed=18, device=device)
    state, outs = x.initial_state, []
    for t in range(30):
        step = {name: getattr(x, name)[:, t : t + 1].contiguous() for name in ("q", "k", "v", "g", "beta")}
        out, state = run(x.replace(initial_state=state, lens=[1] * 3, **step))
        outs.append(out)
    check(x, torch.cat(outs, 1), state, slack=SHORT)


# ---------------------------------------------------------------- segments

SEGMENTS = pytest.mark.parametrize("num_segments", [2, 3, 7, 50])


@pytest.mark.parametrize("gate", GATES)
@SEGMENTS
def test_accuracy_in_segments(device, gate, num_segments):
    x = make([805, 0, 333, 1, 57, 1000], heads=2, gate=gate, seed=36, device=device)  # two are long enough for 50
    check(x, *run(x, num_segments=num_segments), truth=long_reference(x), slack=SHORT)


@SEGMENTS
def test_batch_in_segments(device, num_segments):
    x = make([131] * 3, packed=False, heads=5, seed=35, device=device)
    check(x, *run(x, num_segments=num_segments), slack=SHORT)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65, 257])
@SEGMENTS
def test_every_length_in_segments(device, T, num_segments):
    x = make([T], packed=False, heads=2, gate="slow", seed=T, device=device)
    check(x, *run(x, num_segments=num_segments), slack=SHORT)


@pytest.mark.parametrize("gate", ["slow", "mixed", "random"])
@SEGMENTS
def test_chained_calls_in_segments(device, gate, num_segments):
    bounds = [0, 1, 260, 261, 300, 500]
    x = make([bounds[-1]], packed=False, gate=gate, heads=2, seed=36, device=device)
    state, outs = x.initial_state.clone(), []
    for begin, end in zip(bounds, bounds[1:]):
        part = x.alone(0, begin, end).replace(initial_state=state)
        out, state = run(part, in_place=len(outs) % 2 == 0, num_segments=num_segments)
        outs.append(out)
    check(x, torch.cat(outs, 1), state, slack=SHORT)


@SEGMENTS
def test_repeated_key_in_segments(device, num_segments):
    x = make([300, 40], gate="slow", heads=2, device=device, seed=37)
    x.k[:] = x.k[:, :1]
    check(x, *run(x, num_segments=num_segments), slack=REPEATED)


def test_segments_show_in_the_last_bits_on_cuda_alone(device):
    # Or nothing here would tell whether num_segments is heeded.
    x = make([500], gate="none", heads=2, seed=38, device=device)
    states = [run(x, num_segments=num_segments)[1] for num_segments in (1, 3, 7, 50)]
    for i in range(len(states)):
        for j in range(i):
            assert same_bits(states[i], states[j]) == (device == "cpu")


# ---------------------------------------------------------------- nothing to do


@pytest.mark.parametrize("final", [None, torch.float32])
@pytest.mark.parametrize("B,T,H", [(2, 0, 3), (0, 0, 3), (0, 16, 3), (2, 16, 0), (2, 0, 0), (0, 0, 0)])
def test_empty_batch(device, B, T, H, final):
    x = make([T] * B, packed=False, heads=H, device=device)
    if B == 0:
        x = x.replace(**{name: getattr(x, name)[:, :T] for name in ("q", "k", "v", "g", "beta")})
    out, state = run(x, final=final)
    if final is not None:
        assert same_bits(state, x.initial_state)
        assert (run(x.replace(initial_state=None))[1] == 0).all()


@pytest.mark.parametrize("lens", [[0, 0, 0], [0, 0, 0, 100]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@any_order
def test_zero_length_sequences_copy_their_state_bit_for_bit(device, lens, dtype, num_segments):
    x = make(lens, state=dtype, device=device)
    x.initial_state[1, 0, 0, 0] = float("inf")
    x.initial_state[1, 0, 0, 1] = 3e38
    x.initial_state[1, 0, 0, 2] = 1e-40  # subnormal
    for in_place in (False, True):
        _, state = run(x, in_place=in_place, num_segments=num_segments)
        assert same_bits(state[:3], x.initial_state[:3])


def test_pack_of_no_sequences(device):
    x = make([], device=device)
    out, state = run(x)
    assert out.shape == (1, 0, 4, D) and state.shape == (0, 4, D, D)


# ---------------------------------------------------------------- independence


@pytest.mark.parametrize("heads,num_segments", [(4, None), (MANY_HEADS, 1), (4, 3), (4, 50)])
def test_same_bits_run_after_run(device, all_threads, heads, num_segments):
    x = make([300, 0, 41, 7], heads=heads, device=device, seed=19)
    first = run(x, num_segments=num_segments)
    for _ in range(3):
        for a, b in zip(first, run(x, num_segments=num_segments)):
            assert same_bits(a, b)


PACKS = {
    "mixed": [40, 0, 70, 16, 33, 1, 129],
    "one much longer": [5, 0, 16, 3, 300, 17, 1],
    "long and few": [300, 333],
}


# In the serial order, that is: what the planner chooses depends on the batch.
@pytest.mark.parametrize("lens", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("heads", [4, MANY_HEADS])
def test_packed_sequence_equals_itself_alone(device, all_threads, lens, heads):
    x = make(lens, heads=heads, seed=20, device=device)
    out, state = run(x, num_segments=1)
    for n in range(len(x.lens)):
        alone_out, alone_state = run(x.alone(n), num_segments=1)
        assert same_bits(out[x.rows(n)], alone_out[0]), n
        assert same_bits(state[n], alone_state[0]), n


@pytest.mark.parametrize("B,heads", [(3, 4), (3, MANY_HEADS), (7, MANY_HEADS)])
def test_batch_row_equals_itself_alone(device, B, heads):
    x = make([133] * B, heads=heads, packed=False, seed=21, device=device)
    out, state = run(x, num_segments=1)
    for n in range(B):
        alone_out, alone_state = run(x.alone(n), num_segments=1)
        assert same_bits(out[n], alone_out[0]), n
        assert same_bits(state[n], alone_state[0]), n


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("content,heads,num_segments", [
    *((content, 4, None) for content in (float("nan"), float("inf"), -float("inf"), 3e38, 0.0, "random")),
    *((float("nan"), *order) for order in ((4, 1), (MANY_HEADS, 1), (4, 2), (4, 3), (4, 50))),
])
def test_neighbours_contents_do_not_matter(device, packed, content, heads, num_segments):
    lens = [40, 23, 70, 0, 33, 1] if packed else [39] * 6
    x = make(lens, heads=heads, packed=packed, seed=22, device=device)
    out, state = run(x, num_segments=num_segments)
    other = make(lens, heads=heads, packed=packed, seed=23, device=device)
    for kept in (1, 2, 4):
        y = x.clone()
        for n in set(range(6)) - {kept}:
            for name in ("q", "k", "v", "g", "beta"):
                rows = y.rows(n)
                getattr(y, name)[rows] = getattr(other, name)[rows] if content == "random" else content
            y.initial_state[n] = other.initial_state[n] if content == "random" else content
        out_y, state_y = run(y, num_segments=num_segments)
        assert same_bits(out_y[y.rows(kept)], out[x.rows(kept)]), kept
        assert same_bits(state_y[kept], state[kept]), kept


@any_order
def test_heads_do_not_mix(device, num_segments):
    x = make([50, 17], seed=24, device=device)
    out, state = run(x, num_segments=num_segments)
    y = x.clone()
    for name in ("q", "k", "v", "g", "beta"):
        getattr(y, name)[:, :, [0, 1, 3]] = float("nan")
    y.A_log[[0, 1, 3]] = float("nan")
    y.dt_bias[[0, 1, 3]] = float("nan")
    y.initial_state[:, [0, 1, 3]] = float("nan")
    out_y, state_y = run(y, num_segments=num_segments)
    assert same_bits(out_y[:, :, 2].contiguous(), out[:, :, 2].contiguous())
    assert same_bits(state_y[:, 2].contiguous(), state[:, 2].contiguous())


@pytest.mark.parametrize("num_segments", [None, 1, 2, 3, 6])
def test_a_later_chunk_does_not_touch_an_earlier_one(device, num_segments):
    x = make([96], seed=25, device=device)
    out, _ = run(x, num_segments=num_segments)
    y = x.clone()
    for name in ("q", "k", "v", "g", "beta"):
        getattr(y, name)[:, 64:] = float("nan")
    assert same_bits(run(y, num_segments=num_segments)[0][:, :64], out[:, :64])


@any_order
def test_inputs_are_not_written(device, num_segments):
    x = make([40, 0, 23], seed=26, device=device)
    before = x.clone()
    run(x, num_segments=num_segments)
    for name, y in before.arguments().items():
        if isinstance(y, torch.Tensor):
            assert torch.equal(getattr(x, name), y), name


# ---------------------------------------------------------------- inside PyTorch


def test_ambient_settings_do_not_matter(device):
    x = make([50, 17], seed=27, device=device)
    out, state = run(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = [run(x)]
    torch.set_default_dtype(torch.float64)
    try:
        results.append(run(x))
        results.append(run(x.replace(initial_state=None)))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        results.append(run(x))
    expected = [(out, state), (out, state), run(x.replace(initial_state=None)), (out, state)]
    for found, wanted in zip(results, expected):
        assert same_bits(found[0], wanted[0]) and same_bits(found[1], wanted[1])


def test_parameters_under_no_grad_and_inference_mode(device):
    x = make([20], seed=28, device=device)
    expected, _ = run(x)
    x.A_log.requires_grad_()
    x.q.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same_bits(run(x)[0], expected)


def test_outputs_made_in_inference_mode(device):
    x = make([20], seed=29, device=device)
    expected, expected_state = run(x)
    with torch.inference_mode():
        out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    flash_kda.fwd(out=out, final_state=state, **x.arguments())
    assert same_bits(out, expected) and same_bits(state, expected_state)


def test_autograd_notices_the_writes(device):
    x = make([20], seed=30, device=device)
    weight = torch.ones_like(x.v, requires_grad=True)
    out, state = torch.zeros_like(x.v), torch.zeros_like(x.initial_state)
    before = out._version, state._version
    loss = (weight * out).sum()  # saves `out` for backward
    flash_kda.fwd(out=out, final_state=state, **x.arguments())
    assert out._version > before[0] and state._version > before[1]
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_positional_arguments(device):
    x = make([20, 5], seed=31, device=device)
    expected, expected_state = run(x)
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    flash_kda.fwd(
        x.q, x.k, x.v, x.g, x.beta, x.scale, out, x.A_log, x.dt_bias, x.lower_bound,
        x.initial_state, state, x.cu_seqlens,
    )
    assert same_bits(out, expected) and same_bits(state, expected_state)


def test_one_tensor_for_several_inputs(device):
    x = make([20], seed=32, device=device)
    x = x.replace(k=x.q, v=x.q, g=x.q)
    check(x, *run(x), slack=REPEATED)


def test_truth_is_not_met_by_accident(device):
    # The bounds above mean something only if a small slip breaks them: a decay off by 2 % does.
    x = make([200], gate="slow", seed=33, device=device)
    slip = x.replace(lower_bound=-4.9)
    assert error(run(x)[0], reference(slip)[0]) > 2 * error(run(x)[0], reference(x)[0])
