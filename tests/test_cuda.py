"""What `flash_kda.fwd` promises on CUDA tensors only: long sequences, streams, graphs, sizes, and staying inside its tensors."""

import pytest
import torch

import flash_kda
from problems import (
    D, MANY_HEADS, Guarded, check, error, gate_parameters, long_reference, make, reference, run, same_bits, worst_row_error,
)

pytestmark = pytest.mark.gpu

BUSY_CYCLES = 10 ** 9  # about half a second of a stream kept busy

# In all but the first the CTAs hand states on through a workspace: across the cuts of chains, or as segments' summaries.
ORDERS = [(4, None), (MANY_HEADS, 1), (4, 3), (4, 50)]
every_order = pytest.mark.parametrize("heads,num_segments", ORDERS)


def copy_inputs(to, source):
    for name, x in to.arguments().items():
        if isinstance(x, torch.Tensor):
            x.copy_(getattr(source, name))


def large(shape):
    """Random tokens made on the GPU: q, k, v, g."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator) for _ in range(4)]


# ---------------------------------------------------------------- accuracy

LONG_GATES = ("random", "slow", "none", "mixed")  # a head each
OUT_BOUND, STATE_BOUND = 5.1e-3, 3.9e-3  # promised of every length, gate and number of segments


def long_sequence(T, generator, beta):
    """A head each of LONG_GATES."""
    heads = len(LONG_GATES)
    q, k, v, g = large((1, T, heads, D))
    parameters = [gate_parameters(gate, 1, lambda *shape: torch.rand(*shape, generator=generator)) for gate in LONG_GATES]
    A_log, dt_bias = (torch.cat(y).cuda() for y in zip(*parameters))
    x = make([1], heads=heads, packed=False, device="cuda")
    return x.replace(q=q, k=k, v=v, g=g, beta=beta.bfloat16().cuda(), A_log=A_log, dt_bias=dt_bias, lens=[T])


@pytest.fixture(scope="module", params=[(4096, reference), (131072, long_reference)], ids=["4096", "131072"])
def long_problem(request):
    """A sequence of many tokens, and its truth."""
    T, truth = request.param
    generator = torch.Generator().manual_seed(T)
    x = long_sequence(T, generator, beta=torch.randn(1, T, len(LONG_GATES), generator=generator))
    return x, truth(x)


@pytest.mark.parametrize("num_segments", [None, 1, 2, 3, 17, 67, 1024])
def test_long_sequence(long_problem, num_segments):
    x, (true_out, true_state) = long_problem
    out, state = run(x, num_segments=num_segments)
    for name, found, true, bound in (
        ("out", out.unbind(2), true_out.unbind(2), OUT_BOUND),
        ("state", state.unbind(1), true_state.unbind(1), STATE_BOUND),
    ):
        for head, gate in enumerate(LONG_GATES):
            assert found[head].isfinite().all(), (name, gate)
            assert error(found[head], true[head]) <= bound, (name, gate)
            # What is wrong with a few tokens alone would be lost among so many.
            assert worst_row_error(found[head], true[head]) <= 8 * bound, (name, gate)


@pytest.mark.parametrize("num_segments", [None, 1, 3, 8, 70])
@pytest.mark.parametrize("gate", ["slow", "mixed"])
@pytest.mark.parametrize("lens", [
    [3000, 1, 0, 17, 900, 33, 2, 500, 64, 15],
    [20] * 17 + [2000] + [33, 0] * 20 + [1111],  # more sequences than a warp has lanes
], ids=["few", "many"])
def test_uneven_pack(lens, gate, num_segments):
    x = make(lens, heads=2, gate=gate, device="cuda")
    check(x, *run(x, num_segments=num_segments), truth=long_reference(x), slack=1.5)


@pytest.mark.parametrize("gate", ["slow", "mixed", "none"])
@pytest.mark.parametrize("batch, T, heads", [(1, 2050, 24), (1, 1900, 40), (2, 2050, 12)])
def test_pairs_left_over_have_a_segment_of_each_chain(batch, T, heads, gate):
    _C = pytest.importorskip("flash_kda._C")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    if _C.plan(batch, T, heads, False, 0, sms).spare_pairs == 0:
        pytest.skip("on this GPU none is left over")
    x = make([T] * batch, packed=False, heads=heads, gate=gate, device="cuda")
    out, state = run(x)
    check(x, out, state, truth=long_reference(x), slack=1.5)
    again, again_state = run(x, in_place=True)
    assert same_bits(out, again) and same_bits(state, again_state)


FORGOTTEN = 2.0 ** -28  # of a state that no value joins: what is so much smaller need not be found


@pytest.mark.parametrize("num_segments", [2, 3, 6])
def test_state_that_is_forgotten_within_a_segment(num_segments):
    """Outputs that come of nothing but the state before their segment, until no correction asks for it any more."""
    T, values = 14000, 2000
    x = long_sequence(T, torch.Generator().manual_seed(3), beta=torch.zeros(1, T, len(LONG_GATES)))
    x.v[:, values:] = 0
    (true, _), (out, _) = long_reference(x), run(x, num_segments=num_segments)
    found, true = (y[0].unflatten(0, (-1, 100)).transpose(1, 2).flatten(2) for y in (out.double(), true))
    errors, norms = (found - true).norm(dim=-1), true.norm(dim=-1)
    assert (errors <= 2e-2 * norms + FORGOTTEN * norms[: values // 100].mean(0)).all()


def test_graph_replay_of_segments_that_forget():
    x = make([9000], heads=4, gate="random", device="cuda")
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    graph = capture(lambda: flash_kda.fwd(out=out, final_state=state, num_segments=2, **x.arguments()))
    for gate in ("random", "none", "slow", "random"):  # what is to be corrected changes between replays
        copy_inputs(x, y := make([9000], heads=4, gate=gate, seed=7, device="cuda"))
        out.fill_(float("nan"))
        graph.replay()
        check(y, out, state, truth=long_reference(y), slack=1.5)


@pytest.mark.parametrize("num_segments", [None, 1, 3])
def test_many_short_sequences(num_segments):
    x = make([37 * n % 41 for n in range(300)], heads=8, device="cuda")
    check(x, *run(x, num_segments=num_segments), slack=1.5)


# ---------------------------------------------------------------- graphs and streams


def capture(call):
    """A graph of what `call` launches."""
    call()  # the first call may load the module
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("packed", [True, False])
@every_order
def test_graph_replay_with_new_inputs(packed, heads, num_segments):
    lens = [40, 0, 70, 16, 33] if packed else [50] * 3
    x = make(lens, heads=heads, packed=packed, device="cuda")
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    graph = capture(lambda: flash_kda.fwd(out=out, final_state=state, num_segments=num_segments, **x.arguments()))
    # Lengths may change between replays as long as their number and total stay.
    others = [lens[::-1], [159, 0, 0, 0, 0], [0, 1, 100, 2, 56]] if packed else [lens] * 3
    for seed, new_lens in enumerate([lens, *others, lens], start=100):
        y = make(new_lens, heads=heads, packed=packed, seed=seed, device="cuda")
        copy_inputs(x, y)
        out.fill_(float("nan"))
        state.fill_(float("nan"))
        graph.replay()
        expected_out, expected_state = run(y, num_segments=num_segments)
        assert same_bits(out, expected_out) and same_bits(state, expected_state)
        check(y, out, state, slack=1.5)


@pytest.mark.parametrize("graphs", [False, True])
def test_calls_in_place_on_several_streams_at_once(graphs):
    """Six calls a stream, each on the state that the last one left; as graphs, two of them replayed three times."""
    def calls(x, out, state, count, num_segments):
        arguments = dict(x.arguments(), initial_state=state, final_state=state, num_segments=num_segments)
        for _ in range(count):
            flash_kda.fwd(out=out, **arguments)

    expected, found, launches = [], [], []
    for seed, (heads, num_segments) in enumerate(ORDERS):
        x = make([400, 0, 177], heads=heads, seed=seed, device="cuda")
        expected.append((torch.empty_like(x.v), x.initial_state.clone()))
        calls(x, *expected[-1], 6, num_segments)
        out, state = torch.empty_like(x.v), x.initial_state.clone()
        if graphs:
            graph = capture(lambda: calls(x, out, state, 2, num_segments))
            launches.append(lambda graph=graph, x=x: [graph.replay() for _ in range(3)])  # which reads x
        else:
            launches.append(lambda arguments=(x, out, state, 6, num_segments): calls(*arguments))
        out.fill_(float("nan"))
        state.copy_(x.initial_state)
        found.append((out, state))
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)  # until all have been issued
    start = torch.cuda.Event()
    start.record()
    for launch in launches:
        side = torch.cuda.Stream()
        side.wait_event(start)
        with torch.cuda.stream(side):
            launch()
    torch.cuda.synchronize()
    for (out, state), (expected_out, expected_state) in zip(found, expected):
        assert expected_out.isfinite().all() and expected_state.isfinite().all()
        assert same_bits(out, expected_out) and same_bits(state, expected_state)


def test_runs_on_the_current_stream():
    y = make([40, 70], seed=1, device="cuda")
    expected, expected_state = run(y)
    x = y.clone()
    for value in (x.q, x.k, x.v, x.g, x.beta, x.initial_state):
        value.fill_(float("nan"))
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY_CYCLES)  # any other stream would now run ahead of the inputs
        copy_inputs(x, y)
        flash_kda.fwd(out=out, final_state=state, **x.arguments())
    side.synchronize()
    assert same_bits(out, expected) and same_bits(state, expected_state)


@pytest.mark.parametrize("packed,num_segments", [(True, None), (False, None), (True, 3)])
def test_does_not_synchronise(packed, num_segments):
    x = make([40, 40], packed=packed, device="cuda")
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    call = lambda: flash_kda.fwd(out=out, final_state=state, num_segments=num_segments, **x.arguments())
    call()  # the first call may load the module
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(BUSY_CYCLES)
        call()
        done.record()
        assert not done.query(), "the stream was waited for"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


# ---------------------------------------------------------------- memory


@every_order
def test_allocates_only_through_pytorch(heads, num_segments):
    x = make([1000, 33, 70], heads=heads, device="cuda")
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    call = lambda: flash_kda.fwd(out=out, final_state=state, num_segments=num_segments, **x.arguments())
    call()
    torch.cuda.synchronize()
    # The first is what anyone else has, if something was allocated behind PyTorch's back.
    held = lambda: (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved(), torch.cuda.memory_allocated())
    before, peaks = held(), []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        call()
        peaks.append(torch.cuda.max_memory_allocated())
    torch.cuda.synchronize()
    assert held() == before
    assert peaks == peaks[:1] * 3
    if num_segments is not None:
        assert peaks[0] > before[1]  # the workspace is among what was counted


@pytest.fixture
def workspaces(monkeypatch):
    """The workspaces that calls take from here on, guarded and full of NaNs."""
    taken, empty = [], torch.empty

    def guarded_empty(*size, **options):
        if options.get("dtype") is not torch.uint8:
            return empty(*size, **options)
        taken.append(Guarded((size[0] // 4,), torch.float32, options["device"]))
        return taken[-1].tensor.view(torch.uint8)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    return taken


@pytest.mark.parametrize("heads,num_segments", ORDERS[1:])
def test_workspace_may_hold_anything(workspaces, heads, num_segments):
    x = make([200, 0, 77, 33], heads=heads, device="cuda")
    check(x, *run(x, num_segments=num_segments), slack=1.5)
    assert len(workspaces) == 1
    workspaces[0].check()


@pytest.mark.parametrize("offsets", [
    [-1, 20, 60, 100],
    [0, 80, 20, 100],
    [0, 20, 60, 1000000],
    [100, 60, 20, 0],
    [-(2 ** 63), 2 ** 63 - 1, -(2 ** 63), 2 ** 63 - 1],
    [2 ** 62, 2 ** 62 + 5, 2 ** 62 + 1000, 2 ** 62 + 2000],
    [0, 2 ** 31, 2 ** 32 + 7, 100],
    [50, 101, 102, 103],
    [0, 100, 200, 300],
    [0, 0, 0, 101],
    [17, 17, 17, 17],
    [99, 100, 99, 100],
    [-16, -8, -4, -1],
], ids=str)
@every_order
def test_garbage_cu_seqlens_stays_inside(workspaces, offsets, heads, num_segments):
    # `run` guards both outputs; a read outside would be an illegal address, or compute-sanitizer's to find.
    x = make([20, 40, 40], heads=heads, device="cuda")
    garbage = x.replace(cu_seqlens=torch.tensor(offsets, device="cuda"))
    before = garbage.clone()
    run(garbage, num_segments=num_segments)
    run(garbage, in_place=True, num_segments=num_segments)
    run(garbage.replace(initial_state=None), final=None, num_segments=num_segments)
    assert len(workspaces) == 3 or num_segments is None
    for workspace in workspaces:
        workspace.check()
    for name, y in before.arguments().items():
        if isinstance(y, torch.Tensor):
            assert torch.equal(getattr(garbage, name), y), name
    check(x, *run(x, num_segments=num_segments), slack=1.5)  # the device is as good as before


def test_check_variable_validates_cu_seqlens(monkeypatch):
    monkeypatch.setenv("FLASH_KDA_CHECK", "1")
    x = make([20, 40, 40], heads=2, device="cuda")
    check(x, *run(x), slack=1.5)
    for offsets in ([1, 20, 60, 100], [0, 60, 20, 100], [0, 20, 60, 99]):
        out = torch.full_like(x.v, 7.0)
        y = x.replace(cu_seqlens=torch.tensor(offsets, device="cuda"))
        with pytest.raises(ValueError, match="^cu_seqlens: "):
            flash_kda.fwd(out=out, **y.arguments())
        assert (out == 7.0).all()


def test_check_variable_lets_a_graph_be_captured(monkeypatch):
    monkeypatch.setenv("FLASH_KDA_CHECK", "1")
    x = make([20, 40], heads=2, device="cuda")
    expected, _ = run(x)
    out = torch.full_like(x.v, float("nan"))
    graph = capture(lambda: flash_kda.fwd(out=out, **x.arguments()))
    out.fill_(float("nan"))
    graph.replay()
    assert same_bits(out, expected)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "out", "initial_state", "final_state"])
def test_unaligned_tensor(name):
    x = make([20], heads=2, device="cuda")
    arguments = dict(x.arguments(), out=torch.full_like(x.v, 7.0), final_state=torch.full_like(x.initial_state, 7.0))
    good = arguments[name]
    buffer = torch.zeros(good.numel() + 1, dtype=good.dtype, device="cuda")
    buffer[1:] = good.flatten()
    arguments[name] = buffer[1:].view(good.shape)
    with pytest.raises(ValueError, match="^{}: .*16 bytes".format(name)):
        flash_kda.fwd(**arguments)
    assert (arguments["out"] == 7.0).all() and (arguments["final_state"] == 7.0).all()


def test_small_tensors_need_no_alignment():
    x = make([20, 13], heads=3, device="cuda")
    expected, expected_state = run(x)
    arguments = x.arguments()
    for name in ("beta", "A_log", "dt_bias", "cu_seqlens"):
        good = arguments[name]
        buffer = torch.zeros(good.numel() + 1, dtype=good.dtype, device="cuda")
        buffer[1:] = good.flatten()
        arguments[name] = buffer[1:].view(good.shape)
        out, state = run(x.replace(**{name: arguments[name]}))
        assert same_bits(out, expected) and same_bits(state, expected_state), name


@pytest.mark.parametrize("name", ["k", "beta", "out", "A_log", "final_state", "cu_seqlens"])
def test_device_mix(name):
    x = make([20], heads=2, device="cuda")
    arguments = dict(x.arguments(), out=torch.full_like(x.v, 7.0), final_state=torch.full_like(x.initial_state, 7.0))
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match="^{}: .*cuda:0.*cpu".format(name)):
        flash_kda.fwd(**arguments)
    assert (arguments["out"] == 7.0).all() and (arguments["final_state"] == 7.0).all()


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2 or torch.cuda.get_device_capability(1) != (9, 0):
        pytest.skip("needs two GPUs of compute capability 9.0")
    x = make([40, 0, 70], device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(x, *run(x), slack=1.5)
    assert torch.cuda.current_device() == 0


def test_agrees_with_the_cpu_path():
    x = make([130, 0, 70], device="cuda")
    y = make([130, 0, 70])
    for found, expected in zip(run(x), run(y)):
        assert error(found.cpu(), expected.double()) <= 8e-3


# ---------------------------------------------------------------- past 2^31 elements


def need_memory(gib):
    if torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < gib << 30:
        pytest.skip("needs {} GiB of free GPU memory".format(gib))


@pytest.mark.parametrize("layout", ["one", "batch", "packed"])
def test_more_than_2_31_elements_of_tokens(layout):
    need_memory(32)
    T, H, window = 270000, 64, 400
    assert T * H * D > 2 ** 31
    B = 2 if layout == "batch" else 1
    small = make([window], heads=H, gate="random", packed=False, state=None, device="cuda")
    q, k, v, g = large((B, T // B, H, D))
    beta = torch.randn(B, T // B, H, device="cuda").bfloat16()
    out = torch.full_like(v, float("nan"))
    lens = {"one": [T], "batch": [T // 2] * 2, "packed": [T - 1000, 1000]}[layout]
    state = torch.full((len(lens), H, D, D), float("nan"), device="cuda")
    cu_seqlens = torch.tensor([0, lens[0], T], device="cuda") if layout == "packed" else None
    x = small.replace(q=q, k=k, v=v, g=g, beta=beta, cu_seqlens=cu_seqlens, lens=lens)
    flash_kda.fwd(out=out, final_state=state, **x.arguments())
    # The gates forget all but the last few tokens: a window started from zero has the truth in its second half.
    flat = {name: getattr(x, name).flatten(0, 1) for name in ("q", "k", "v", "g", "beta")}
    for end in (2 ** 31 // (H * D) + window // 4, T):
        tokens = {name: y[end - window : end].unsqueeze(0).contiguous() for name, y in flat.items()}
        true_out, true_state = reference(small.replace(lens=[window], **tokens))
        half = slice(end - window // 2, end)
        assert error(out.flatten(0, 1)[half], true_out[0, window // 2 :]) <= 5.5e-3, end
    assert error(state[-1:], true_state) <= 4e-3
    assert not out.flatten(0, 1)[:: T // 100].isnan().any()


@pytest.mark.parametrize("packed", [True, False])
def test_more_than_2_31_elements_of_states(packed):
    need_memory(40)
    N, H = 2100, 64
    assert N * H * D * D > 2 ** 31
    x = make([1] * N, heads=H, packed=packed, state=None, device="cuda")
    state = torch.empty(N, H, D, D, device="cuda").normal_()
    last = state[-2:].clone()
    out = torch.full_like(x.v, float("nan"))
    flash_kda.fwd(out=out, **x.replace(initial_state=state).arguments(), final_state=state)
    tail = {name: getattr(x, name).view(N, 1, H, -1)[-2:] for name in ("q", "k", "v", "g")}
    tail.update(beta=x.beta.view(N, 1, H)[-2:], cu_seqlens=None, initial_state=last, lens=[1, 1])
    y = x.replace(**tail)
    check(y, out.view(N, 1, H, D)[-2:], state[-2:], slack=1.5)
