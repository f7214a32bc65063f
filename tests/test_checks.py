"""Bad input: the exception, the argument it names, and that nothing was written."""

from types import SimpleNamespace

import numpy
import pytest
import torch

import flash_kda
from flash_kda import checks, cuda
from problems import D, check, make, run, same_bits

T, H = 12, 2
BF16, FP32 = torch.bfloat16, torch.float32
TENSORS = ("q", "k", "v", "g", "beta", "out", "A_log", "dt_bias", "initial_state", "final_state", "cu_seqlens")


def good(device="cpu", lens=(5, 7)):
    x = make(lens, heads=H, device=device)
    return dict(out=torch.full_like(x.v, 7.0), final_state=torch.full_like(x.initial_state, 7.0), **x.arguments())


def reject(arguments, exception, message):
    """`fwd` raises, naming the argument, and leaves both outputs as they were."""
    outputs = [x for x in (arguments["out"], arguments["final_state"]) if isinstance(x, torch.Tensor)]
    outputs = [x for x in outputs if x.device.type != "meta" and x.layout is torch.strided]
    before = [x.detach().clone() for x in outputs]
    with pytest.raises(exception, match=message) as raised:
        flash_kda.fwd(**arguments)
    assert type(raised.value) is exception
    assert all(torch.equal(x, y) for x, y in zip(outputs, before))


def test_the_good_call_passes():
    arguments = good()
    flash_kda.fwd(**arguments)
    assert not (arguments["out"] == 7.0).all() and not (arguments["final_state"] == 7.0).all()


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [3, "x", [1.0], numpy.zeros(3)], ids=["int", "str", "list", "numpy"])
def test_not_a_tensor(name, value):
    reject(dict(good(), **{name: value}), TypeError, "^{}: expected .* got {}".format(name, type(value).__name__))


@pytest.mark.parametrize("name", [n for n in TENSORS if n not in ("initial_state", "final_state", "cu_seqlens")])
def test_none_where_a_tensor_is_needed(name):
    reject(dict(good(), **{name: None}), TypeError, "^{}: expected .* got NoneType".format(name))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, FP32, BF16, torch.int32, torch.int64])
def test_dtype(name, dtype):
    arguments = good()
    if arguments[name].dtype == dtype:
        return flash_kda.fwd(**arguments)
    arguments[name] = arguments[name].to(dtype)
    named = "final_state" if name == "initial_state" and dtype == BF16 else name  # then it is the pair that is wrong
    reject(arguments, TypeError, "^{}: expected .* got a tensor of dtype ".format(named))


@pytest.mark.parametrize("initial,final", [(BF16, FP32), (FP32, BF16)])
def test_states_of_two_dtypes(initial, final):
    arguments = good()
    for name, dtype in (("initial_state", initial), ("final_state", final)):
        arguments[name] = arguments[name].to(dtype)
    message = "^final_state: expected the dtype of initial_state, {}, got .*{}".format(initial, final)
    reject(arguments, TypeError, message)


@pytest.mark.parametrize("name", TENSORS)
def test_number_of_dimensions(name):
    for change in (lambda x: x.unsqueeze(0), lambda x: x.flatten() if x.dim() > 1 else x[0]):
        arguments = good()
        arguments[name] = change(arguments[name])
        reject(arguments, ValueError, "^{}: expected shape .* got \\[".format(name))


@pytest.mark.parametrize("name", [n for n in TENSORS if n not in ("q", "cu_seqlens")])
def test_every_dimension(name):
    # q sets B, T and H, cu_seqlens sets N: all others are held against them.
    for dim in range(good()[name].dim()):
        for size in (0, good()[name].shape[dim] + 1, 64 if dim == 3 else 3):
            arguments = good()
            shape = list(arguments[name].shape)
            shape[dim] = size
            arguments[name] = arguments[name].new_zeros(shape)
            reject(arguments, ValueError, "^{}: expected shape .* got {}".format(name, shape).replace("[", "\\["))


@pytest.mark.parametrize("K", [0, 1, 64, 127, 129, 256])
def test_head_dimension(K):
    arguments = good()
    for name in ("q", "k", "g"):
        arguments[name] = torch.zeros(1, T, H, K, dtype=BF16)
    arguments["dt_bias"] = torch.zeros(H, K)
    reject(arguments, ValueError, "^q: expected shape .* K = 128, got ")
    arguments = good()
    arguments["v"] = torch.zeros(1, T, H, K, dtype=BF16)
    reject(arguments, ValueError, "^v: expected shape .*128\\], got ")


def test_other_q_than_the_rest():
    for shape in ((1, T + 1, H, D), (1, T, H + 1, D), (2, T, H, D)):
        arguments = good()
        arguments["q"] = torch.zeros(shape, dtype=BF16)
        reject(arguments, ValueError, "^k: expected shape ")


@pytest.mark.parametrize("name", [n for n in TENSORS if n not in ("A_log", "cu_seqlens")])
def test_contiguity(name):
    arguments = good()
    x = arguments[name]
    arguments[name] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    reject(arguments, ValueError, "^{}: expected a contiguous tensor, got strides ".format(name))
    arguments[name] = torch.cat((x, x), -1)[..., : x.shape[-1]]
    reject(arguments, ValueError, "^{}: expected a contiguous tensor, got strides ".format(name))


@pytest.mark.parametrize("name", ["A_log", "cu_seqlens"])
def test_contiguity_of_a_vector(name):
    arguments = good()
    arguments[name] = arguments[name].repeat_interleave(2)[::2]
    reject(arguments, ValueError, "^{}: expected a contiguous tensor, got strides ".format(name))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", ["q", "dt_bias", "final_state"])
def test_sparse(name):
    arguments = good()
    arguments[name] = arguments[name].to_sparse()
    reject(arguments, ValueError, "^{}: expected a contiguous tensor, got one of layout".format(name))


def test_expanded_key():
    arguments = good()
    arguments["k"] = arguments["k"][:, :1].expand(1, T, H, D)
    reject(arguments, ValueError, "^k: expected a contiguous tensor, got strides ")


@pytest.mark.parametrize("name", TENSORS)
def test_device_mix(name):
    arguments = good()
    arguments[name] = arguments[name].to("meta")
    expected = "a tensor on a CUDA device or the CPU" if name == "q" else "a tensor on cpu, where q is"
    reject(arguments, ValueError, "^{}: expected {}, got one on meta".format(name, expected))


def test_unsupported_device():
    arguments = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in good().items()}
    reject(arguments, ValueError, "^q: expected a tensor on a CUDA device or the CPU, got one on meta")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, -1e300, 10 ** 400])
def test_scale_range(value):
    reject(dict(good(), scale=value), ValueError, "^scale: expected a number, finite in fp32, got ")


@pytest.mark.parametrize("value", [
    float("nan"), float("inf"), -float("inf"), -5.000001, 1e-9, 5.0, -6, 1, numpy.float32("nan"),
])
def test_lower_bound_range(value):
    reject(dict(good(), lower_bound=value), ValueError, "^lower_bound: expected a number in \\[-5, 0\\], got ")


@pytest.mark.parametrize("name", ["scale", "lower_bound"])
@pytest.mark.parametrize("value", [None, "1", True, 1j, [0.5], torch.tensor(-0.5)], ids=str)
def test_not_a_number(name, value):
    reject(dict(good(), **{name: value}), TypeError, "^{}: expected a number.* got ".format(name))


@pytest.mark.parametrize("number", [numpy.float32, numpy.float64, int])
def test_other_kinds_of_number(number):
    x = make([5, 7], heads=H)
    expected, _ = run(x.replace(scale=2.0, lower_bound=-3.0))
    out, _ = run(x.replace(scale=number(2), lower_bound=number(-3)))
    assert same_bits(out, expected)


@pytest.mark.parametrize("value", [True, numpy.True_, 3.0, 1j, "3", [3], numpy.array(3), torch.tensor(3)], ids=repr)
def test_num_segments_is_no_integer(device, value):
    message = "^num_segments: expected an integer from 1 to 1024, or None, got "
    reject(dict(good(device), num_segments=value), TypeError, message)


@pytest.mark.parametrize("value", [0, -1, 1025, 10 ** 30, numpy.int64(0), numpy.int8(-1), numpy.uint16(1025)], ids=repr)
def test_num_segments_range(device, value):
    message = "^num_segments: expected an integer from 1 to 1024, or None, got .*{}".format(int(value))
    reject(dict(good(device), num_segments=value), ValueError, message)


@pytest.mark.parametrize("value", [None, 1, 1024, numpy.int64(1024), numpy.uint8(7)], ids=repr)
def test_num_segments_that_will_do(device, value):
    x = make([5, 100], heads=H, device=device)
    check(x, *run(x, num_segments=value), slack=1.5)


# ---------------------------------------------------------------- packs


def test_batch_with_cu_seqlens():
    arguments = good()
    for name in ("q", "k", "v", "g", "beta", "out"):
        arguments[name] = torch.cat((arguments[name], arguments[name]))
    reject(arguments, ValueError, "^q: expected B = 1 with cu_seqlens.* got shape \\[2, 12, 2, 128\\]")


@pytest.mark.parametrize("cu_seqlens", [
    torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64), torch.tensor(12),
], ids=["empty", "2-D", "0-D"])
def test_cu_seqlens_shape(cu_seqlens):
    reject(dict(good(), cu_seqlens=cu_seqlens), ValueError, "^cu_seqlens: expected shape \\[N \\+ 1\\]")


@pytest.mark.parametrize("offsets,message", [
    ([1, 5, 12], "cu_seqlens\\[0\\] = 0, got 1"),
    ([-1, 5, 12], "cu_seqlens\\[0\\] = 0, got -1"),
    ([0, 5, 11], "T = 12, got 11"),
    ([0, 5, 13], "T = 12, got 13"),
    ([0, 13, 12], "cu_seqlens\\[2\\] = 12 after 13"),
    ([0, -3, 12], "cu_seqlens\\[1\\] = -3 after 0"),
    ([0, 2 ** 62, 12], "cu_seqlens\\[2\\] = 12 after"),
])
def test_cu_seqlens_contents(offsets, message):
    reject(dict(good(), cu_seqlens=torch.tensor(offsets)), ValueError, "^cu_seqlens: expected .*" + message)


def test_no_sequences_for_some_tokens():
    arguments = dict(good(), cu_seqlens=torch.tensor([0]), initial_state=None, final_state=None)
    reject(arguments, ValueError, "^cu_seqlens: expected .*T = 12, got 0")


@pytest.mark.parametrize("name", ["initial_state", "final_state"])
@pytest.mark.parametrize("N", [0, 1, 3])
def test_number_of_states(name, N):
    arguments = good()
    arguments[name] = torch.full((N, H, D, D), 7.0)
    message = "^{}: expected shape \\[N, H, V, K\\] = \\[2, 2, 128, 128\\], got \\[{}, ".format(name, N)
    reject(arguments, ValueError, message)


def test_number_of_states_of_a_batch():
    arguments = dict(good(), cu_seqlens=None)
    reject(arguments, ValueError, "^initial_state: expected shape .* = \\[1, 2, 128, 128\\], got \\[2, ")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_out_is_an_input(name):
    arguments = good()
    arguments["out"] = arguments[name]
    reject(arguments, ValueError, "^out: expected memory of its own, got .* {}$".format(name))


def carve(*tensors):
    """Copies of the tensors in one buffer, each beginning half its size after the one before."""
    sizes = [x.numel() * x.element_size() for x in tensors]
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8)
    views, begin = [], 0
    for x, size in zip(tensors, sizes):
        views.append(buffer[begin : begin + size].view(x.dtype).view(x.shape))
        begin += size // 2
    return views


@pytest.mark.parametrize("written,other", [
    ("out", "v"), ("v", "out"), ("out", "beta"), ("out", "A_log"), ("out", "dt_bias"), ("out", "initial_state"),
    ("final_state", "out"), ("out", "cu_seqlens"), ("final_state", "k"), ("final_state", "dt_bias"),
    ("final_state", "initial_state"), ("initial_state", "final_state"), ("final_state", "cu_seqlens"),
])
def test_partial_overlap(written, other):
    arguments = good()
    arguments[written], arguments[other] = carve(arguments[written], arguments[other])
    if "cu_seqlens" in (written, other):
        arguments["cu_seqlens"].copy_(good()["cu_seqlens"])
    named = "out" if "out" in (written, other) else "final_state"
    against = other if named == written else written
    reject(arguments, ValueError, "^{}: expected memory of its own, got .* {}$".format(named, against))


def test_neighbours_in_one_buffer_are_no_overlap():
    x = make([5, 7], heads=H)
    expected, expected_state = run(x)
    state, rows = x.initial_state, torch.zeros(3, *x.v.shape, dtype=BF16)
    rows[0], rows[2] = x.q, x.k
    states = torch.zeros(2, *state.shape)
    states[0] = state
    arguments = x.replace(q=rows[0], k=rows[2], initial_state=states[0]).arguments()
    flash_kda.fwd(out=rows[1], final_state=states[1], **arguments)
    assert same_bits(rows[1], expected) and same_bits(states[1], expected_state)


def test_a_view_of_the_initial_state_is_in_place():
    x = make([5, 7], heads=H)
    _, expected_state = run(x)
    state = x.initial_state
    flash_kda.fwd(out=torch.empty_like(x.v), final_state=state.view(state.shape), **x.arguments())
    assert same_bits(state, expected_state)


@pytest.mark.parametrize("address", [1, 2, 4, 8, 24])
def test_alignment(address):
    with pytest.raises(ValueError, match="^g: expected data on a multiple of 16 bytes, got "):
        checks.check_alignment("g", address)


def test_the_cpu_path_needs_no_alignment():
    x = make([5, 7], heads=H)
    expected, _ = run(x)
    buffer = torch.zeros(x.q.numel() + 1, dtype=BF16)
    buffer[1:] = x.q.flatten()
    assert same_bits(run(x.replace(q=buffer[1:].view(x.q.shape)))[0], expected)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [n for n in TENSORS if n != "cu_seqlens"])
def test_requires_grad(name):
    arguments = good()
    arguments[name].requires_grad_()
    reject(arguments, RuntimeError, "^{}: requires grad.*forward only.*torch.inference_mode".format(name))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            flash_kda.fwd(**arguments)


# ---------------------------------------------------------------- the CUDA path, as far as it goes without a GPU

SMS = 132
WORKSPACE, PLAN = 11, 18  # where the module's function takes them


@pytest.fixture
def fake(monkeypatch):
    """The CUDA path with a stand-in for the compiled module that records its calls, on a faked device."""
    def plan(*arguments):
        fake_gpu.plans.append(arguments)
        return SimpleNamespace(workspace_bytes=fake_gpu.workspace_bytes)

    module = SimpleNamespace(CUDA_ARCHS="90a", plan=plan, fwd=lambda *arguments: fake_gpu.calls.append(arguments))
    fake_gpu = SimpleNamespace(module=module, capability=(9, 0), workspace_bytes=0, plans=[], calls=[])
    monkeypatch.setattr(cuda, "_C", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: fake_gpu.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=SMS))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    caches = cuda.check_device, cuda._plan
    for cached in caches:
        cached.cache_clear()
    yield fake_gpu
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_capability_than_built(fake, capability):
    fake.capability = capability
    with pytest.raises(RuntimeError, match="9.0.*built for sm_90a; cuda:3 \\(A GPU\\).*{}[.]{}".format(*capability)):
        cuda.check_device(3)


@pytest.mark.parametrize("archs", ["90a", "90a;100a", "80;90a"])
def test_capability_that_was_built(fake, archs):
    fake.module.CUDA_ARCHS = archs
    assert cuda.check_device(0) == SMS


# Without wgmma there is code that loads, and traps.
@pytest.mark.parametrize("archs,capability", [("100a", (9, 0)), ("90", (9, 0)), ("80;90", (9, 0)), ("90a;100a", (10, 0))])
def test_built_without_code_that_runs(fake, archs, capability):
    fake.module.CUDA_ARCHS, fake.capability = archs, capability
    with pytest.raises(RuntimeError, match="built for sm_{}; .*capability {}[.]{}".format(archs.replace(";", ", sm_"), *capability)):
        cuda.check_device(0)


def test_no_kernels_built(fake, monkeypatch):
    monkeypatch.setattr(cuda, "_C", None)
    monkeypatch.setattr(cuda, "_C_MISSING", "No module named 'flash_kda._C'", raising=False)
    with pytest.raises(RuntimeError, match="No module named.*rebuild.*pip install"):
        cuda.check_device(0)


def launch(x, N, T, H, out=None, final_state=None, num_segments=None):
    # CPU tensors: nothing here looks further than their addresses.
    arguments = dict(x.arguments(), num_segments=num_segments, num_sequences=N, tokens=T, heads=H)
    cuda.fwd(out=out, final_state=final_state, **arguments)


def test_launch_arguments(fake):
    x = make([5, 7], heads=H, state=BF16)
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    launch(x, 2, 12, H, out, state)
    pointers = [y.data_ptr() for y in (
        x.q, x.k, x.v, x.g, x.beta, out, x.A_log, x.dt_bias, x.initial_state, state, x.cu_seqlens,
    )]
    found, = fake.calls
    plan = found[PLAN]
    assert plan.workspace_bytes == 0
    assert found == (*pointers, 0, 2, 12, H, False, D ** -0.5, -5.0, plan, x.q.device.index, 1234)


def test_launch_with_a_workspace(fake):
    fake.workspace_bytes = 1000
    x = make([5], heads=H)
    launch(x, 1, 5, H, torch.empty_like(x.v))
    assert fake.calls[0][WORKSPACE] > 0 and fake.calls[0][WORKSPACE] % checks.ALIGNMENT == 0


@pytest.mark.parametrize("num_segments,told", [(None, 0), (1, 1), (3, 3), (numpy.int64(3), 3)], ids=repr)
def test_the_plan_knows_what_was_asked_for(fake, num_segments, told):
    x = make([5, 7], heads=H)
    batch = make([5], heads=H, packed=False)
    for _ in range(2):  # the second time it is remembered
        launch(x, 2, 12, H, torch.empty_like(x.v), num_segments=num_segments)
        launch(batch, 1, 5, H, torch.empty_like(batch.v), num_segments=num_segments)
    assert fake.plans == [(2, 12, H, True, told, SMS), (1, 5, H, False, told, SMS)]
    assert [len(call) for call in fake.calls] == [PLAN + 3] * 4


@pytest.mark.parametrize("initial,final,is_fp32", [
    (None, None, False), (FP32, None, True), (None, FP32, True), (None, BF16, False), (BF16, None, False),
])
def test_launch_without_some_states(fake, initial, final, is_fp32):
    x = make([5], heads=H, packed=False, state=initial).replace(scale=1, lower_bound=-3)
    state = None if final is None else torch.empty(1, H, D, D, dtype=final)
    launch(x, 1, 5, H, torch.empty_like(x.v), state)
    arguments = fake.calls[0]
    assert arguments[8] == (0 if initial is None else x.initial_state.data_ptr())
    assert arguments[9] == (0 if final is None else state.data_ptr())
    assert arguments[10] == 0 and arguments[15] is is_fp32
    assert [type(y) for y in arguments[16:18]] == [float, float]


@pytest.mark.parametrize("N,T,H,final,launches", [
    (0, 5, 2, FP32, 0), (1, 5, 0, FP32, 0), (1, 0, 2, None, 0), (1, 0, 2, FP32, 1), (1, 5, 2, None, 1),
])
def test_launch_only_with_something_to_write(fake, N, T, H, final, launches):
    x = make([5], heads=2, packed=False)
    launch(x, N, T, H, x.v.clone(), None if final is None else torch.zeros(1, 2, D, D))
    assert len(fake.calls) == launches


def test_launch_is_told_to_autograd(fake):
    x = make([5], heads=H)
    out, state = torch.empty_like(x.v), torch.empty_like(x.initial_state)
    launch(x, 1, 5, H, out, state)
    assert out._version == 1 and state._version == 1
    with torch.inference_mode():
        out = torch.empty_like(x.v)
    launch(x, 1, 5, H, out)  # an inference tensor has no version


def test_nothing_is_launched_on_the_wrong_device(fake):
    fake.capability = (8, 0)
    x = make([5], heads=H)
    with pytest.raises(RuntimeError, match="8[.]0"):
        launch(x, 1, 5, H, torch.empty_like(x.v))
    assert not fake.calls


def test_cpu_tensors_need_no_kernels(monkeypatch):
    monkeypatch.setattr(cuda, "_C", None)
    x = make([5, 7], heads=H)
    check(x, *run(x))
