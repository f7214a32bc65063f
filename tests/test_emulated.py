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
from problems import D, GATES, check, handovers_of, make, same_bits

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc" / "sm90"
SHARINGS = ("spans", "segments")  # as csrc/sm90/sharing.h has them
COMPILER = os.environ.get("CXX") or "g++"


def build(folder, *changes, races=False):
    """The emulated kernel as a library: csrc's headers with the emulator's in place of those that speak to the machine.

    Each change, (file, old, new), is made to the kernel's source before. With `races` it looks for these too: see emulator/races.h.
    """
    folder.mkdir()
    for source in list(SOURCES.glob("*.h")) + list(SOURCES.glob("*.cuh")) + list((HERE / "emulator").glob("*")):
        shutil.copy(str(source), str(folder))
    for file, old, new in changes:
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
    function.argtypes = [pointer] * 11 + [integer] * 3 + [ctypes.c_int, real, real] + [ctypes.c_int] * 7 + [ctypes.c_uint64]
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip("there is no C++ compiler")
    return build(tmp_path_factory.mktemp("emulator") / "kernel")


def run(kernel, x, seed=0, sharing="spans", pairs=None, tasks=1, least_chunks=1, spare=(0, 0), handovers=None, **options):
    """`problems.run` on the emulated kernel; the threads' order is drawn from `seed`. A pair of CTAs a chain unless `pairs` says how many.

    `spare`: how many of them are spare, and the chunks in each unit of their segments.
    """
    heads = x.q.shape[2]
    pairs = pairs or len(x.lens) * heads
    if handovers is None:
        handovers = handovers_of(x.lens, heads, tasks, least_chunks) if sharing == "segments" else pairs

    def fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens):
        tensors = (q, k, v, g, beta, out, A_log, dt_bias, initial_state, final_state, cu_seqlens)
        state = initial_state if initial_state is not None else final_state
        error = kernel(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), len(x.lens), q.shape[1], q.shape[2],
                       state is not None and state.dtype == torch.float32, scale, lower_bound,
                       SHARINGS.index(sharing), 2 * pairs, tasks, least_chunks, *spare, handovers, seed)
        if error:
            raise RuntimeError(error.decode())

    return problems.run(x, fwd=fwd, **options)


@pytest.mark.parametrize("gate", GATES)
def test_gates(kernel, gate):
    x = make([205, 40], heads=1, gate=gate)  # the first goes round the ring of stages
    check(x, *run(kernel, x), path="cuda", slack=1.5)


def test_the_state_stays_in_fp32(kernel):
    """Rounded at every chunk, it would be twice as wrong."""
    x = make([1000], heads=1, gate="none")
    check(x, *run(kernel, x), path="cuda")


def test_vectors_as_short_as_epsilon(kernel):
    x = make([40], heads=1)
    x = x.replace(q=x.q * 1e-3, k=x.k * 1e-3)
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


GARBAGE = [[-1, 20, 60, 100], [0, 80, 20, 100], [100, 60, 20, 0], [2 ** 62, -5, 2 ** 40, 7], [0, 20, 60, 10 ** 6]]


@pytest.mark.parametrize("offsets", GARBAGE, ids=str)
def test_garbage_cu_seqlens_stays_inside(kernel, offsets):
    x = make([20, 40, 40], heads=1)
    run(kernel, x.replace(cu_seqlens=torch.tensor(offsets)))  # nothing is written around the outputs


PACKS = {"even": [33] * 6, "uneven": [300, 0, 1, 16, 17, 90], "a long one last": [5] * 9 + [300], "nothing but states": [0] * 12}


@pytest.mark.parametrize("lens", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("spans", [1, 2, 3, 5])
def test_spans(kernel, lens, spans):
    """Fewer spans than chains: some chains are cut, and no bit shows where."""
    x = make(lens, heads=2)
    out, state = run(kernel, x)
    check(x, out, state, path="cuda", slack=1.5)
    found, found_state = run(kernel, x, pairs=spans, seed=spans)
    assert same_bits(out, found) and same_bits(state, found_state)


@pytest.mark.parametrize("pairs", [None, 1, 2])
def test_one_segment_is_the_serial_order(kernel, pairs):
    x = make([205, 0, 21], heads=1)
    (out, state), (found, found_state) = run(kernel, x), run(kernel, x, sharing="segments", pairs=pairs, in_place=True)
    assert same_bits(out, found) and same_bits(state, found_state)


@pytest.mark.parametrize("tasks", [2, 3, 4, 7, 8, 13, 23])
@pytest.mark.parametrize("gate", ["mixed", "none"])
@pytest.mark.parametrize("lens, pairs", [([400], 4), ([400, 70, 0, 33, 150], 10)], ids=str)  # the latter in different numbers of segments
def test_segments(kernel, tasks, gate, lens, pairs):
    """Two to seven, the last a half one where the tasks are even in number, and twelve, more than are asked for at once; from seven on each is longer than
    the one before it."""
    x = make(lens, heads=1, gate=gate)
    check(x, *run(kernel, x, sharing="segments", pairs=pairs, tasks=tasks), path="cuda", slack=1.5)


@pytest.mark.parametrize("tasks, pairs, spare", [(3, 4, (1, 2)), (4, 6, (2, 1)), (5, 7, (1, 3)), (6, 10, (2, 2)), (7, 12, (2, 1))], ids=str)
@pytest.mark.parametrize("gate", ["mixed", "none"])
def test_spare_pairs(kernel, tasks, pairs, spare, gate):
    """They share a short segment of each of two chains; the last one of all is a half one where the tasks are even in number."""
    x = make([400], heads=2, gate=gate)
    check(x, *run(kernel, x, sharing="segments", pairs=pairs, tasks=tasks, least_chunks=spare[1], spare=spare), path="cuda", slack=1.5)


def test_rows_of_any_size_are_composed(kernel):
    """Value channels from 1e-6 to 1e6 beside each other, and one that is zero: each row of the state is as exact as if it were alone."""
    x = make([300], heads=1, gate="none")
    sizes = torch.logspace(-6, 6, D)
    sizes[D // 2] = 0
    x = x.replace(v=(x.v * sizes).bfloat16(), initial_state=x.initial_state * sizes[:, None])
    _, truth = problems.reference(x)
    _, state = run(kernel, x, sharing="segments", pairs=2, tasks=7)
    error = (state.double() - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)
    assert error.max() < 8e-3 and not state[..., D // 2, :].any()


def test_rows_of_next_to_nothing_are_composed(kernel):
    """Inside, they are 2^32 times smaller, and no normal numbers of fp32 any more."""
    x = make([100], heads=1, gate="slow")
    x = x.replace(v=torch.zeros_like(x.v), initial_state=x.initial_state * 3e-28)
    _, truth = problems.reference(x)
    _, state = run(kernel, x, sharing="segments", pairs=2, tasks=3)
    assert (state.double() - truth).norm() < 8e-3 * truth.norm()


def test_steep_gates(kernel):
    """Neither slope nor offset may become infinite: what lies behind the tail has a logit that would cancel it."""
    x = make([37], heads=2)
    x.A_log.copy_(torch.tensor([100.0, 0.0]))
    x.dt_bias[:, ::3], x.dt_bias[:, 1::3] = float("inf"), -float("inf")
    check(x, *run(kernel, x), path="cuda", slack=1.5)


def test_spare_pairs_of_a_pack(kernel):
    """Only chains that have all tasks have their segment."""
    x = make([400, 70, 0, 33, 300], heads=2)
    check(x, *run(kernel, x, sharing="segments", pairs=9, tasks=5, least_chunks=3, spare=(2, 2)), path="cuda", slack=1.5)


def test_only_long_sequences_are_cut(kernel):
    x = make([20] * 17 + [300] + [33, 0] * 10, heads=2)  # more sequences than a warp has lanes
    out, state = run(kernel, x)
    check(x, out, state, path="cuda", slack=1.5)
    found, found_state = run(kernel, x, sharing="segments", pairs=3, tasks=6, least_chunks=2, in_place=True)
    check(x, found, found_state, path="cuda", slack=1.5)
    for n, length in enumerate(x.lens):
        assert length == 300 or same_bits(out[x.rows(n)], found[x.rows(n)]) and same_bits(state[n], found_state[n])
    assert not same_bits(out, found)


@pytest.mark.parametrize("lens, tasks", [([80] * 4, 4), ([90], 5), ([80, 200], 7)], ids=str)
def test_many_compositions_in_a_pair(kernel, lens, tasks):
    """A prepare warp, which takes every eighth of a pair's chunks, passes several of them by at once."""
    x = make(lens, heads=2)
    check(x, *run(kernel, x, sharing="segments", pairs=1, tasks=tasks, seed=2), path="cuda", slack=1.5)


def test_the_final_states_pair_corrects_too(kernel):
    """Of a long last segment, before it finds the final state."""
    x = make([1200], heads=1, gate="slow")
    check(x, *run(kernel, x, sharing="segments", pairs=2, tasks=2), path="cuda", slack=1.5)


FORGETFUL = ("config.h", "kLongSegment = 256, kLookChunks = 32", "kLongSegment = 4, kLookChunks = 2")  # as if segments were long


@pytest.fixture(scope="session")
def forgetful_kernel(kernel, tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator") / "forgetful", FORGETFUL)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tasks, pairs, spare", [(2, 2, (0, 0)), (3, 2, (0, 0)), (4, 6, (2, 1)), (6, 5, (0, 0)), (5, 7, (1, 3))], ids=str)
def test_segments_that_may_forget(forgetful_kernel, gate, tasks, pairs, spare):
    x = make([405, 33, 512], heads=2 if spare[0] else 1, gate=gate)
    x = x.alone(0) if spare[0] else x
    check(x, *run(forgetful_kernel, x, sharing="segments", pairs=pairs, tasks=tasks, least_chunks=max(spare[1], 1), spare=spare), path="cuda", slack=1.5)


def test_a_single_channel_that_remembers(forgetful_kernel):
    """In one row of M, and so in one lane's registers: no key mixes it with others."""
    x = make([405, 512], heads=1, gate="hardest")
    x.dt_bias[:, 77] = -7.0
    x.k[..., 77] = 0
    x = x.replace(initial_state=x.initial_state * 30)
    check(x, *run(forgetful_kernel, x, sharing="segments", pairs=2, tasks=3), path="cuda", slack=1.5)


def test_what_is_forgotten_is_not_corrected(kernel, tmp_path):
    marks = ("recurrence.cuh", "done[i / 4][i % 4] = pack_bf16(O[2 * i] * kStateUp,", "done[i / 4][i % 4] = pack_bf16(1e9f,")
    marked = build(tmp_path / "marked", FORGETFUL, marks)
    x = make([400], heads=1, gate="hardest")  # two segments, of 12 and 13 chunks
    out, _ = run(marked, x, sharing="segments", pairs=2, tasks=3)
    tokens = (out[0, :, 0] > 1e8).any(-1).nonzero().flatten().tolist()
    assert tokens == list(range(192, 224, 2))  # until M is looked at for the first time; and of each pair of tokens the first one is marked


def test_what_is_not_forgotten_is_found_uncorrected(kernel, tmp_path):
    hasty = build(tmp_path / "hasty", FORGETFUL, ("config.h", "kForgotten = 0x1p-32f", "kForgotten = 16"))
    x = make([400], heads=1, gate="slow")
    with pytest.raises(AssertionError):
        check(x, *run(hasty, x, sharing="segments", pairs=2, tasks=3), path="cuda", slack=1.5)


def test_pieces_wait_for_mail(kernel, tmp_path):
    """However long that warp is held up before it looks at a piece, which it does not send: the ring must not go round past it."""
    loop = "--left, ++pieces) {"
    slow = build(tmp_path / "slow", ("load.cuh", loop, loop + " for (int i = 0; i < 100; ++i) __syncwarp();"))
    x = make([300], heads=1)
    check(x, *run(slow, x, sharing="segments", pairs=2, tasks=7), path="cuda", slack=1.5)


@pytest.mark.parametrize("offsets", GARBAGE, ids=str)
def test_garbage_cu_seqlens_with_segments(kernel, offsets):
    x = make([20, 40, 40], heads=1)
    for options in (dict(pairs=2, tasks=4), dict(pairs=3, tasks=5, spare=(1, 1))):
        run(kernel, x.replace(cu_seqlens=torch.tensor(offsets)), sharing="segments", handovers=4, **options)


@pytest.fixture(scope="session")
def watched_kernel(kernel, tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator") / "watched", races=True)


WATCHED = [
    ([205, 21], dict(pairs=1)), ([205, 21], dict()), ([150, 0, 1, 110], dict(pairs=3)), ([205, 21], dict(sharing="segments")),
    ([300, 70], dict(sharing="segments", pairs=3, tasks=4)), ([90, 33], dict(sharing="segments", pairs=1, tasks=5)),
    ([640], dict(sharing="segments", pairs=2, tasks=3)), ([205], dict(sharing="segments", pairs=5, tasks=4, least_chunks=2, spare=(1, 2))),
]


@pytest.mark.parametrize("lens, options", WATCHED, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_races(watched_kernel, lens, options, seed):
    x = make(lens, heads=2, seed=seed)
    check(x, *run(watched_kernel, x, seed=seed, **options), path="cuda", slack=1.5)


# ---------------------------------------------------------------- that these tests can fail

MISTAKES = {
    "a barrier never reached": (("prepare.cuh", "            mbarrier_arrive(smem_address(&smem.ready[slot]));\n", ""), "locked up"),
    "an arrival too many": (("recurrence.cuh", "free_there + mail.slot * 8, first_lane != 0", "free_there + mail.slot * 8, true"), None),
    "a wrong operand": (("recurrence.cuh", "wgmma<OutputAtom>(O_new, R, z);", "wgmma<OutputAtom>(O_new, R, t);"), None),
    "a descriptor with the CTA's rank": (("matrix_descriptor.h", "(address & 0x3ffff) >> 4", "address >> 4"), None),
    "no padding": (("prepare.cuh", "        if (valid < kChunk)\n            clear_tail(stage, valid);", ""), None),
    "a composition left out": (("segments.cuh", "final ? last : ", "final ? last - 1 : "), None),
    "a summary asked for too early": (("segments.cuh", "is_missing = !is_left(left, ticket);", "is_missing = false;"), None),
    "half of a summary": (("segments.cuh", "has_both_parts(tasks, task) && part == 0;", "false;"), "locked up"),
    "handovers counted wrongly": (("segments.cuh", "until.handovers - own.handovers + head", "head"), None),
    "a fetch of S1 too many": (("segments.cuh", "kRecurrenceWarps * chain.readers);", "kRecurrenceWarps * chain.readers + 1);"), "a ticket is left"),
    "a fetch of a summary too many": (("segments.cuh", "+ (segment > chain.spare_segment);", "+ 1 + (segment > chain.spare_segment);"), "a ticket is left"),
    "a fetch of a summary too few": (("segments.cuh", "+ (segment > chain.spare_segment);", "- 1 + (segment > chain.spare_segment);"), "locked up|a ticket is left"),
    "fetches behind a spare segment counted as if it were a regular one": (("segments.cuh", "+ (segment > chain.spare_segment);", ";"), "locked up|a ticket is left"),
    "a spare segment only half corrected": (("segments.cuh", "(corrects_spare ? kSegmentUnits : 1)", "1"), None),
    "rows of B over another row's power": (("segments.cuh", "j % 2 == 0 ? powers_of_B.x : powers_of_B.y", "powers_of_B.x"), None),
    "a correction of other tokens": (("load.cuh", "load_box<false>(p.Y_map, ready, stage.kq[0][0], row,", "load_box<false>(p.Y_map, ready, stage.kq[0][0], row + 1,"), None),
    "no correction": (("recurrence.cuh", "wgmma<StepAtom>(O, S_b + 4 * s, Y", "if (false) wgmma<StepAtom>(O, S_b + 4 * s, Y"), None),
}
CUT = dict(sharing="segments", tasks=6, pairs=3)
SPARE = dict(sharing="segments", tasks=4, least_chunks=2, pairs=4, spare=(2, 2))  # the last one is cut into the first segment, a spare one and a half one


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(kernel, tmp_path, name):
    change, message = MISTAKES[name]
    x = make([21, 90, 205], heads=1)  # the last two are cut, into three segments and into four
    mistaken = build(tmp_path / "mistake", change)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        for options in (dict(), CUT, SPARE):
            check(x, *run(mistaken, x, **options), path="cuda", slack=1.5)


def test_a_cta_that_leaves_early_is_found(kernel, tmp_path):
    """Without waiting for what the other one has still to say, which is late."""
    arrival = "                __syncwarp();   // every lane has read the copy\n"
    mistaken = build(tmp_path / "mistake", ("load.cuh", "        await(ahead);\n", "        ;\n"),
                     ("recurrence.cuh", arrival, arrival + "for (int i = 0; i < 100 * rank(); ++i) __syncwarp();\n"))
    with pytest.raises(RuntimeError, match="is not there any more"):
        run(mistaken, make([33], heads=1))


def test_a_neighbours_values_are_found(kernel, tmp_path):
    """Only what is no number gets through: T is zero there."""
    x = make([21, 18], heads=1)
    x.v[x.rows(1)] = float("nan")
    mistaken = build(tmp_path / "mistake", ("load.cuh", "row < valid ? ", "true ? "))
    assert run(kernel, x)[0][x.rows(0)].isfinite().all()
    assert not run(mistaken, x)[0][x.rows(0)].isfinite().all()


def test_without_a_mistake_nothing_is_found(kernel):
    x = make([21, 90, 205], heads=1)
    for options in (CUT, SPARE):
        check(x, *run(kernel, x, **options), path="cuda", slack=1.5)


RACES = {
    "lanes not waited for": (("prepare.cuh", "        __syncwarp();\n\n        // Row i", "        // Row i"), "a (write after a read|read after a write)"),
    "a stage released too early": (("recurrence.cuh", "                __syncwarp();   // every lane has read the copy\n", ""), "a write after a read.* copy engine"),
    "the other CTA's stages not waited for": (("load.cuh", "kOwnStages + await_room(0);", "kOwnStages + Turn<kMailStages>(number).slot;"), ""),
    "values not waited for": (("load.cuh", "            mbarrier_wait(smem_address(&smem.values_empty[turn.slot]), turn.parity ^ 1);\n", ""), ""),
    "no proxy fence": (("prepare.cuh", "            fence_async_proxy();\n", ""), "no proxy fence"),
    "no proxy fence before summaries": (("load.cuh", "                fence_async_proxy_global();\n", ""), "no proxy fence"),
    "a state left too early": (("segments.cuh", "    barrier(kRecurrenceBarrier, kWarpgroup);   // a release is for all that they have written\n", ""), "a read after a write.* the workspace"),
}


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found(kernel, tmp_path, name):
    change, message = RACES[name]
    racing = build(tmp_path / "race", change, races=True)
    with pytest.raises(RuntimeError, match="race: .*" + message):
        for lens, options in WATCHED:
            run(racing, make(lens, heads=2), **options)
