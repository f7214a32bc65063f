"""The host plan, which is plain C++: no GPU needed, only the built module."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest

from problems import handovers_of

_C = pytest.importorskip("flash_kda._C", reason="flash_kda was built without its kernels")

ROOT = Path(__file__).resolve().parent.parent
MAX = 2**31 - 1


SMS = 132
HANDOVER_BYTES = 128 * 128 * 4 + 8 * 8  # an fp32 state, and a ticket for each CTA, in a line of 64 bytes
Y_BYTES = 128 * 2  # of a token and head
SERIAL, FREE = 1, 0
SECOND_TASK = 3  # chunks that a second task in the first phase costs more, as csrc/plan.cpp has it


def layout(plan):
    return plan.chains, plan.sharing, plan.segments, plan.grid, plan.workspace_bytes


@pytest.mark.parametrize("num_sequences, tokens, heads, packed", [
    (1, 0, 4, False), (3, 0, 4, True), (5, 1024, 12, False), (66, 1, 1, False), (66, 16, 1, True), (1, 8192, 64, False),
])
def test_a_pair_for_every_chain(num_sequences, tokens, heads, packed):
    plan = _C.plan(num_sequences, tokens, heads, packed, SERIAL, SMS)
    chains = num_sequences * heads
    assert layout(plan) == (chains, "spans", 1, 2 * chains, 0)


@pytest.mark.parametrize("num_sequences, tokens, heads, packed", [
    (67, 1000, 1, False), (8, 1024, 96, False), (6, 8192, 96, True), (65535, 1, 128, False), (40, 0, 4, True),
])
@pytest.mark.parametrize("sms", [SMS, 7])
def test_more_chains_than_pairs(num_sequences, tokens, heads, packed, sms):
    plan = _C.plan(num_sequences, tokens, heads, packed, SERIAL, sms)
    assert layout(plan) == (num_sequences * heads, "spans", 1, sms // 2 * 2, sms // 2 * HANDOVER_BYTES)


@pytest.mark.parametrize("num_segments", [FREE, SERIAL, 7])
@pytest.mark.parametrize("num_sequences, heads", [(0, 96), (4, 0), (0, 0)])
def test_nothing_to_do(num_sequences, heads, num_segments):
    assert _C.plan(num_sequences, 16, heads, False, num_segments, SMS).grid == 0


# ---------------------------------------------------------------- segments


def border(chunks, unit, units):
    """The first chunk of a unit: of 11 to 128 units each is 7/16 of a chunk longer than the one before it, or as much as leaves the first a quarter of the mean."""
    longer = min(Fraction(7, 16), Fraction(96 * (chunks - units) // units ** 2, 64)) if 11 <= units <= 128 else 0
    return math.floor(Fraction(unit * chunks, units) - longer * unit * (units - unit) / 2)


def first_and_last_segment(chunks, units):
    """Chunks, of two units each; none is longer than the last one."""
    return border(chunks, 2, units), chunks - border(chunks, units - 2, units)


@pytest.mark.parametrize("tokens", [0, 1, 16, 32])
@pytest.mark.parametrize("packed", [False, True])
def test_two_chunks_cannot_be_cut(tokens, packed):
    plan = _C.plan(1, tokens, 4, packed, 5, SMS)
    assert (plan.sharing, plan.segments) == ("spans", 1)


@pytest.mark.parametrize("num_sequences, tokens, heads, packed, num_segments, segments, grid, handovers", [
    (1, 8192, 4, False, 5, 5, 72, 4 * 9),  # a task for the first segment, two for each of the others, by a pair each
    (1, 8192, 4, True, 5, 5, 72, 4 * 9),
    (1, 8192, 8, False, 20, 20, SMS, 8 * 39),
    (3, 8192, 8, False, 5, 5, SMS, 3 * 8 * 9),
    (1, 8192, 8, False, 2, 2, 48, 8 * 3),
    (2, 65, 1, False, 1024, 3, 16, 2 * 5),  # five chunks each: four tasks
    (3, 64, 1, True, 1024, 2, 18, 7),  # four chunks in all, though rounding may make it seven
])
def test_forced_segments(num_sequences, tokens, heads, packed, num_segments, segments, grid, handovers):
    plan = _C.plan(num_sequences, tokens, heads, packed, num_segments, SMS)
    chains, rows = num_sequences * heads, tokens * (1 if packed else num_sequences)
    workspace = rows * heads * Y_BYTES + handovers * HANDOVER_BYTES
    assert layout(plan) == (chains, "segments", segments, grid, workspace) and plan.least_chunks == 1


@pytest.mark.parametrize("tokens, heads, num_segments, rounds, compositions", [
    (6400, 2, 2, 1, 1),
    (6400, 2, 3, 1, 2),
    (6400, 2, 4, 1, 3),
    (6400, 2, 5, 1, 4),
    (6400, 2, 6, 1, 5),  # from here on later segments are longer
    (6400, 2, 17, 1, 16),  # a task in either phase for every pair
    (6400, 2, 18, 2, 17),  # two for some
    (6400, 1, 33, 1, 32),
    (6400, 1, 64, 2, 63),
    (6400, 1, 65, 2, 64),  # all are even again
])
def test_what_the_busiest_pair_does(tokens, heads, num_segments, rounds, compositions):
    """A summary of the longest segment and its states, 9 chunks; the final state's compositions, but for those that are over before it, which cost
    half as much where no other pair composes; and its share of all pieces of outputs."""
    work = _C.plan(1, tokens, heads, False, num_segments, SMS).work
    first, last = first_and_last_segment(400, 2 * num_segments)
    assert work.steps == pytest.approx(rounds * (last + 9))
    pairs = min(heads * (2 * num_segments - 1), SMS // 2)
    exposed = max(compositions - (last - first) / 2, 1)  # in the time of two steps a state is composed with a summary
    assert work.summaries == 1 and work.compositions == pytest.approx(exposed * (1 + pairs / (SMS // 2)) / 2)
    assert work.corrections == pytest.approx(heads * (400 - first) / 2 / (SMS / 2))


@pytest.mark.parametrize("num_segments, corrected", [(2, 256), (4, 3 * 256), (16, 2048 - border(2048, 2, 32))])
def test_of_a_long_segment_only_what_a_slow_head_remembers_is_corrected(num_segments, corrected):
    work = _C.plan(1, 2048 * 16, 1, False, num_segments, SMS).work
    assert work.corrections == pytest.approx(corrected / 2 / (SMS / 2))


def test_segments_take_memory_and_must_be_worth_it():
    """Half a gigabyte, here, for less than one per cent."""
    assert layout(_C.plan(1, 32768, 64, False, FREE, SMS)) == layout(_C.plan(1, 32768, 64, False, 1, SMS))


def test_a_pair_may_have_both_parts_of_a_summary():
    plan = _C.plan(1, 8192, 16, False, FREE, SMS)  # four pairs a chain
    assert (plan.tasks, plan.segments, plan.spare_pairs) == (4, 3, 0)
    assert plan.work.steps == first_and_last_segment(512, 5)[1] + 9 + SECOND_TASK  # which begins twice


@pytest.mark.parametrize("tokens, heads, packed", [(8192, 24, False), (4096, 12, False), (32768, 12, True), (65536, 8, False), (8192, 40, False)])
def test_pairs_left_over_have_a_segment_of_each_chain_among_them(tokens, heads, packed):
    plan = _C.plan(1, tokens, heads, packed, FREE, SMS)
    regular = plan.tasks - 2  # of a chain
    assert plan.grid == SMS and regular * heads + plan.spare_pairs == SMS // 2 and plan.spare_pairs > 0
    first, segment = first_and_last_segment(tokens // 16 - 2 * plan.spare_chunks, regular + 1)
    tasks = -(-2 * heads // plan.spare_pairs)
    spare = tasks * (2 * plan.spare_chunks + 9)  # B and M of each of these segments, one after the other
    assert segment - 2 * tasks <= spare <= segment + 9  # neither late nor idle
    assert plan.work.steps == segment + 9 + (SECOND_TASK if regular % 2 == 0 else 0)
    assert plan.work.compositions == plan.segments - 1 - (segment - first) / 2  # all pairs at once
    assert plan.work.microseconds < _C.plan(1, tokens, heads, False, plan.segments, SMS).work.microseconds


@pytest.mark.parametrize("sms", [SMS, 114, 7])
@pytest.mark.parametrize("tokens", [512, 1664, 4096, 40000])
def test_every_pair_is_regular_or_spare(tokens, sms):
    for heads in range(1, 100):
        plan = _C.plan(1, tokens, heads, False, FREE, sms)
        assert plan.grid <= sms
        if plan.spare_pairs:
            assert plan.grid // 2 == (plan.tasks - 2) * heads + plan.spare_pairs and plan.spare_pairs < 2 * heads
            assert 0 < plan.spare_chunks == plan.least_chunks <= tokens // 16 // (plan.tasks + 1)


@pytest.mark.parametrize("num_sequences, tokens, heads, packed, num_segments", [
    (1, 8192, 24, False, 3), (1, 8192, 24, False, SERIAL), (2, 16384, 12, True, FREE), (1, 8192, 64, False, FREE), (1, 1024, 4, False, FREE),
])
def test_no_pair_is_spare(num_sequences, tokens, heads, packed, num_segments):
    """Of a pack no length is known; in the last two nearly all pairs have a chain, and so few that a segment more would cost more than it saves."""
    plan = _C.plan(num_sequences, tokens, heads, packed, num_segments, SMS)
    assert (plan.spare_pairs, plan.spare_chunks) == (0, 0)


@pytest.mark.parametrize("num_segments", [FREE, 2, 3, 50])
@pytest.mark.parametrize("lens", [
    [4096], [4000, 33, 0, 1], [17] * 40, [1] * 30 + [5000], [16, 8000, 16], [1024] * 8, [31] * 3, [700, 2100, 350],
], ids=str)
def test_a_pack_has_room_for_its_summaries(lens, num_segments):
    plan = _C.plan(len(lens), sum(lens), 4, True, num_segments, SMS)
    if plan.segments > 1:
        used = sum(lens) * 4 * Y_BYTES + handovers_of(lens, 4, plan.tasks, plan.least_chunks) * HANDOVER_BYTES
        assert used <= plan.workspace_bytes


@pytest.mark.parametrize("tokens", [256, 320, 512, 1024, 4096])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_units_are_few_or_have_four_and_a_half_chunks(tokens, heads):
    plan = _C.plan(1, tokens, heads, False, FREE, SMS)
    assert plan.tasks + 1 <= max(10, tokens // 16 / 4.5)


@pytest.mark.parametrize("tokens, heads", [(4096, 8), (2048, 12), (8192, 16), (65536, 8), (3072, 10)])
def test_few_chains_are_cut(tokens, heads):
    plan = _C.plan(1, tokens, heads, False, FREE, SMS)
    serial = _C.plan(1, tokens, heads, False, SERIAL, SMS)
    assert plan.sharing == "segments" and plan.segments > 2 and plan.grid <= SMS
    assert plan.work.microseconds < serial.work.microseconds
    assert layout(plan) == layout(_C.plan(1, tokens, heads, True, FREE, SMS))  # a pack of one sequence is no secret


@pytest.mark.parametrize("num_sequences, tokens, heads, packed", [
    (1, 8192, 96, False), (8, 8192, 96, True), (6, 8192, 64, True), (64, 16384, 32, True), (1, 16, 4, False), (200, 200, 12, True), (100000, 10**6, 96, True),
])
def test_many_or_short_chains_are_not(num_sequences, tokens, heads, packed):
    plan = _C.plan(num_sequences, tokens, heads, packed, FREE, SMS)
    assert layout(plan) == layout(_C.plan(num_sequences, tokens, heads, packed, SERIAL, SMS))


def test_of_an_even_pack_no_sequence_is_cut_but_a_long_one_would_be():
    plan = _C.plan(4, 8192, 12, True, FREE, SMS)
    assert plan.segments > 1
    assert handovers_of([2048] * 4, 12, plan.tasks, plan.least_chunks) == 0
    assert handovers_of([8000, 64, 64, 64], 12, plan.tasks, plan.least_chunks) > 0


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results" / "plan").glob("*.json")), ids=lambda path: path.stem)
def test_costs_are_those_of_the_fit(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    for point in result["points"]:
        plan = _C.plan(1, point["tokens"], point["heads"], False, point["segments"], result["device"]["sm_count"])
        assert plan.work.microseconds == pytest.approx(point["fitted_us"], rel=0.06)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_segments", [FREE, SERIAL])
def test_sizes_at_the_limit(packed, num_segments):
    assert _C.plan(1, MAX, 1, packed, num_segments, SMS).chains == 1
    assert _C.plan(MAX, 1, 1, packed, num_segments, SMS).chains == MAX
    # Packed, the tokens are those of all sequences together
    assert _C.plan(3, MAX, 1, True, num_segments, SMS).chains == 3


@pytest.mark.parametrize("num_segments", [FREE, SERIAL, 2])
@pytest.mark.parametrize("sizes, message", [
    ((1, MAX + 1, 1, False), "tokens"),
    ((1, MAX + 1, 1, True), "tokens"),
    ((2, MAX // 2 + 1, 1, False), "tokens"),
    ((MAX // 2 + 1, 1, 2, False), "heads"),
    ((2**62, 1, 2**62, True), "heads"),
    ((-1, 1, 1, False), "negative"),
    ((1, -1, 1, False), "negative"),
    ((1, 1, -1, True), "negative"),
])
def test_sizes_past_the_limit(sizes, message, num_segments):
    with pytest.raises(ValueError, match=message):
        _C.plan(*sizes, num_segments, SMS)


def test_more_tasks_than_can_be_counted():
    with pytest.raises(ValueError, match="num_segments"):
        _C.plan(2**20, 2**20, 2, True, 1024, SMS)


@pytest.mark.parametrize("num_segments", [-1, 1025])
def test_a_number_of_segments_that_cannot_be(num_segments):
    with pytest.raises(ValueError, match="num_segments"):
        _C.plan(1, 8192, 8, False, num_segments, SMS)
