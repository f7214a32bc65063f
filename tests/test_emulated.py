"""The CUDA kernel's own source, compiled for the CPU and run thread by thread: see emulator/emulator.h.

What it computes, on which addresses, whether it locks up and whether its accesses to shared memory are ordered, without a GPU; not its speed.
"""
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import problems
from problems import GATES, check, make, same_bits

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc" / "sm90"
COMPILER = os.environ.get("CXX") or "g++"


def build(folder, change=None, races=False):
    """The emulated kernel as a library: csrc's headers with the emulator's in place of those that speak to the machine.

    `change`, (file, old, new), is made to the kernel's source before. With `races` it looks for these too: see emulator/races.h.
    """
    folder.mkdir()
    for source in list(SOURCES.glob("*.h")) + list(SOURCES.glob("*.cuh")) + list((HERE / "emulator").glob("*")):
        shutil.copy(str(source), str(folder))
    if change:
        file, old, new = change
        text = (folder / file).read_text()
        assert text.count(old) == 1, "the source has moved on: " + old
        (folder / file).write_text(text.replace(old, new))
    library = folder / "emulated.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-w", "-I", str(folder)]
    if not races:
        subprocess.run([COMPILER, *flags, "-shared", str(folder / "run.cpp"), "-o", str(library)], check=True)
    else:  # the compiler's own library of this sanitizer is not linked
        objects = [str(folder / "run.o"), str(folder / "races.o")]
        subprocess.run([COMPILER, *flags, "-DEMULATOR_RACES", "-fsanitize=thread", "-c", str(folder / "run.cpp"), "-o", objects[0]], check=True)
        subprocess.run([COMPILER, *flags, "-DEMULATOR_RACES", "-c", str(folder / "races.cpp"), "-o", objects[1]], check=True)
        subprocess.run([COMPILER, "-shared", *objects, "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).emulate_fwd
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    function.argtypes = [pointer] * 11 + [integer] * 3 + [ctypes.c_int, real, real, ctypes.c_uint64]
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip("there is no C++ compiler")
    return build(tmp_path_factory.mktemp("emulator") / "kernel")


def run(kernel, x, seed=0, **options):
    """`problems.run` on the emulated kernel; the threads' order is drawn from `seed`."""
    def fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens):
        tensors = (q, k, v, g, beta, out, A_log, dt_bias, initial_state, final_state, cu_seqlens)
        state = initial_state if initial_state is not None else final_state
        error = kernel(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), len(x.lens), q.shape[1], q.shape[2],
                       state is not None and state.dtype == torch.float32, scale, lower_bound, seed)
        if error:
            raise RuntimeError(error.decode())

    return problems.run(x, fwd=fwd, **options)


@pytest.mark.parametrize("gate", GATES)
def test_gates(kernel, gate):
    x = make([205, 40], heads=1, gate=gate)  # the first goes round the ring of stages
    check(x, *run(kernel, x), path="cuda", slack=1.5)


@pytest.mark.parametrize("lens", [[1], [15], [16], [17], [33, 0, 7], [0, 0], [5, 16, 0, 1]], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, None], ids=str)
def test_lengths_and_states(kernel, lens, state):
    x = make(lens, heads=2, state=state)
    out, final = run(kernel, x)
    check(x, out, final, path="cuda", slack=1.5)
    again, again_final = run(kernel, x, in_place=state is not None, seed=1)  # threads in another order
    assert same_bits(out, again) and same_bits(final, again_final)


def test_batch_rows(kernel):
    x = make([19] * 3, heads=2, packed=False)
    check(x, *run(kernel, x), path="cuda", slack=1.5)


def test_no_final_state(kernel):
    x = make([20], heads=1)
    assert same_bits(run(kernel, x, final=None)[0], run(kernel, x)[0])


def test_neighbours_leave_no_trace(kernel):
    x = make([21, 18, 9], heads=1)
    expected, expected_state = run(kernel, x)
    poisoned = x.clone()
    for name in ("q", "k", "v", "g", "beta"):
        for n in (0, 2):
            getattr(poisoned, name)[x.rows(n)] = float("nan")
    out, state = run(kernel, poisoned)
    assert same_bits(out[x.rows(1)], expected[x.rows(1)]) and same_bits(state[1], expected_state[1])


@pytest.mark.parametrize("offsets", [[-1, 20, 60, 100], [0, 80, 20, 100], [100, 60, 20, 0], [2 ** 62, -5, 2 ** 40, 7], [0, 20, 60, 10 ** 6]], ids=str)
def test_garbage_cu_seqlens_stays_inside(kernel, offsets):
    x = make([20, 40, 40], heads=1)
    run(kernel, x.replace(cu_seqlens=torch.tensor(offsets)))  # nothing is written around the outputs


@pytest.fixture(scope="session")
def watched_kernel(kernel, tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator") / "watched", races=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_races(watched_kernel, seed):
    x = make([205, 0, 21], heads=2, seed=seed)
    check(x, *run(watched_kernel, x, seed=seed), path="cuda", slack=1.5)


# ---------------------------------------------------------------- that these tests can fail

MISTAKES = {
    "a barrier never reached": (("prepare.cuh", "        if (lane == 0)\n            mbarrier_arrive(smem.ready[slot]);", ""), "locked up"),
    "an arrival too many": (("recurrence.cuh", "        if (lane == 0)\n            mbarrier_arrive(smem.empty[ring.slot]);",
                             "        mbarrier_arrive(smem.empty[ring.slot]);"), None),
    "a wrong operand": (("recurrence.cuh", "wgmma<OutputAtom>(O_new, R, z);", "wgmma<OutputAtom>(O_new, R, t);"), None),
    "no padding": (("prepare.cuh", "        if (valid < kChunk)\n            clear_tail(stage, valid);", ""), None),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(kernel, tmp_path, name):
    change, message = MISTAKES[name]
    x = make([205, 21], heads=1)
    mistaken = build(tmp_path / "mistake", change)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(x, *run(mistaken, x), path="cuda", slack=1.5)


RACES = {
    "lanes not waited for": (("prepare.cuh", "lane * 16, z);\n        __syncwarp();", "lane * 16, z);"), "a read after a write"),
    "a stage released too early": (("recurrence.cuh", "        __syncwarp();   // every lane has read\n", ""), "a write after a read .* copy engine"),
    "no proxy fence": (("prepare.cuh", "        fence_async_proxy();\n", ""), "no proxy fence"),
}


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found(kernel, tmp_path, name):
    change, message = RACES[name]
    racing = build(tmp_path / "race", change, races=True)
    with pytest.raises(RuntimeError, match="race: .*" + message):
        run(racing, make([205, 0, 21], heads=2))
