// Few chains, and long ones: cut in time, into segments done side by side.
//
// Over a stretch of tokens the state goes to S M + B: B is the state that zero would become, M the one that the identity would become
// without values. So do the outputs, which are S Y' + O: O what they would be from zero, Y what the queries would read of the identity.
// First the summaries. The first segment is done as it is, and gives the state S1 behind it. Of each other one, one task finds B, and O in
// place of the outputs; another finds M, and Y in a place of its own. All of them are the recurrence as it is. Then the corrections: the
// state before segment s is
//
//   S = ((S1 M_1 + B_1) M_2 + B_2) ...     up to M_(s - 1) and B_(s - 1)
//
// in one fp16 product each; and what a segment's outputs lack, S Y', is a product without any order in time. One more task finds the state
// behind the last segment.
//
// A chain's tokens are cut into units, one more than it has tasks in either phase. A segment has two, half of it a correction each. The last
// one may have one, and then a single task for B and M, so that the tasks can be odd or even in number.
//
// A long segment may forget the state before it: once M is as good as zero, so is Y, and from there on the outputs lack nothing. Who finds M looks at it
// now and then, and leaves how long it took; the segment's corrections are shared out anew among its tasks, which ask for that first.
//
// The tasks are numbered, sequence by sequence and head by head; the pairs deal them out in turn, first all summaries, then all corrections and the
// chains that are not cut, a head's in the opposite order: who had an early segment, which is short where there are many, composes for a late one
// while the later summaries are still being found. Pairs that would have none may have a shorter segment of each chain among them: see sharing.h.
// Since the CTAs run all at once, and no pair waits for anything but summaries, they cannot lock up.
#pragma once

#include "kernel_params.h"
#include "ptx.h"
#include "ring.h"
#include "schedule.cuh"
#include "smem.h"
#include "wgmma.h"

namespace flash_kda::sm90 {

// B and M of a segment.
__device__ __forceinline__ Handover* summary_of(const Chain& chain, int segment) { return &chain.handovers[2 * segment - 1]; }

// Waits for what a CTA leaves.
__device__ __forceinline__ bool is_left(const uint64_t* left, uint64_t ticket) { return load_acquire(left) - ticket < 1 << 16; }
__device__ __forceinline__ void await_left(const uint64_t* left, uint64_t ticket) {
    while (!is_left(left, ticket)) {
    }
}

// How many chunks go by before M, which a pair leaves, is as good as zero. Called by all lanes.
__device__ __forceinline__ int await_memory(const Handover& M, uint64_t ticket) {
    int memory = 0;
    if (const int warp = threadIdx.x % 32; warp < kHalves * kRecurrenceWarps) {
        await_left(&M.left[warp / kRecurrenceWarps], ticket);
        memory = M.memory[warp];
    }
    return __reduce_max_sync(~0u, memory);
}

// A pair's tasks, one after the other.
class SegmentWalk {
public:
    __device__ SegmentWalk(const KernelParams& p, const Span&) : place{Phase::kSummaries, first_task(p), 0, 0, {}} {}

    // Writes the next one. Called by all lanes.
    __device__ __forceinline__ void next(const KernelParams& p, Chain& chain) {
        const uint32_t lane = threadIdx.x % 32;
        Place at = place;
        for (;;) {
            // A lane a sequence: how many tasks it has, and there are up to its end.
            const uint32_t sequence = at.sequence + lane;
            const Rows rows = sequence < p.num_sequences ? sequence_rows(p, sequence) : Rows{0, 0};
            const int tasks = tasks_of(chunks_of(rows.length), p.least_chunks, p.tasks);
            const uint32_t heads = sequence < p.num_sequences ? p.heads : 0;
            const bool summaries = at.phase == Phase::kSummaries;
            const bool shared = has_spare_segment(p, tasks);
            const uint32_t regular = shared ? tasks - kSegmentUnits : tasks;
            const uint32_t each = is_spare(p) ? (summaries ? tasks - regular : 0) : summaries && tasks == 1 ? 0 : regular;   // of a head
            const Counts own = {heads * each, heads * handovers_of(tasks)};
            Counts until = own;
            const int with_tasks = min(p.num_sequences, 32u);   // lanes
#pragma unroll 1
            for (int d = 1; d < with_tasks; d *= 2) {
                const uint32_t x = __shfl_up_sync(~0u, until.tasks, d), y = __shfl_up_sync(~0u, until.handovers, d);
                if (lane >= d) {
                    until.tasks += x;
                    until.handovers += y;
                }
            }
            until.tasks += at.before.tasks;
            until.handovers += at.before.handovers;
            if (const uint32_t behind = __ballot_sync(~0u, at.task < until.tasks)) {
                bool goes_on = false;
                if (lane == __ffs(behind) - 1) {
                    const uint32_t in_sequence = at.task - (until.tasks - own.tasks), head = in_sequence / each;
                    const int in_turn = in_sequence - head * each, dealt = summaries ? in_turn : each - 1 - in_turn;
                    const int spare = kSegmentUnits * spare_segment_of(tasks) - (summaries ? 1 : kSegmentUnits);
                    const int task = is_spare(p) ? spare + dealt : shared && dealt >= spare ? dealt + kSegmentUnits : dealt;
                    goes_on = take(p, chain, sequence, rows, tasks, head, at.phase, task, at.part, until.handovers - own.handovers + head * handovers_of(tasks));
                }
                __syncwarp();
                share_out(chain, p.workspace.ticket);
                goes_on = __any_sync(~0u, goes_on);
                place = {at.phase, goes_on ? at.task : at.task + (is_spare(p) ? gridDim.x / kPair - p.regular_pairs : p.regular_pairs), goes_on,
                         at.sequence, at.before};
                return;
            }
            at.before = {__shfl_sync(~0u, until.tasks, 31), __shfl_sync(~0u, until.handovers, 31)};
            at.sequence += 32;
            if (at.sequence >= p.num_sequences) {
                if (!summaries) {
                    if (lane == 0)
                        chain.done = true;
                    return;
                }
                at = {Phase::kCorrections, first_task(p), 0, 0, {}};
            }
        }
    }

private:
    // Regular and spare pairs have tasks of their own, which are numbered and dealt out apart.
    __device__ static bool is_spare(const KernelParams& p) { return blockIdx.x / kPair >= p.regular_pairs; }
    __device__ static uint32_t first_task(const KernelParams& p) { return blockIdx.x / kPair - (is_spare(p) ? p.regular_pairs : 0); }
    __device__ static bool has_spare_segment(const KernelParams& p, int tasks) { return p.spare_chunks > 0 && tasks == p.tasks; }

    enum class Phase { kSummaries, kCorrections };   // in the second one, chains that are not cut too
    struct Counts {
        uint32_t tasks, handovers;
    };
    struct Place {
        Phase phase;
        uint32_t task;       // the next one of the pair's,
        int part;            // of it: B, then M, where it has both; a share of the corrections, then the final state
        uint32_t sequence;   // no earlier than this sequence,
        Counts before;       // which so many precede
    };
    Place place;

    // Of the last segment, where that has one unit.
    __device__ static bool has_both_parts(int tasks, int task) { return tasks % 2 == 0 && task == tasks - 1; }

    // Whether there is another part.
    __device__ __forceinline__ static bool take(const KernelParams& p, Chain& chain, uint32_t sequence, const Rows& rows, int tasks, uint32_t head,
                                                Phase phase, int task, int part, uint32_t first_handover) {
        chain = {};
        bool goes_on = phase == Phase::kSummaries && has_both_parts(tasks, task) && part == 0;
        chain.handovers = p.workspace.handovers + first_handover;
        chain.head = head;
        chain.state_offset = (static_cast<int64_t>(sequence) * p.heads + head) * (kDim * kDim);
        const int chunks = chunks_of(rows.length), units = units_of(tasks), last = segments_of(tasks) - 1;
        const int spare_units = has_spare_segment(p, tasks) ? kSegmentUnits : 0, first_spare = kSegmentUnits * spare_segment_of(tasks);
        const float inverse = rcp_approx(units - spare_units);
        const auto border = [&](int unit) {
            const int spare = min(max(unit - first_spare, 0), spare_units);   // before it
            return border_of(chunks - spare_units * p.spare_chunks, min(unit, units) - spare, units - spare_units, inverse) + spare * p.spare_chunks;
        };
        const auto tokens = [&](int from, int to) {   // up to before the last of these chunks; returns how many
            chain.first_row = rows.first + from * kChunk;
            return min(to * kChunk, rows.length) - from * kChunk;
        };
        if (phase == Phase::kSummaries) {   // first in the code too: a launch begins with it
            const int segment = (task + 1) / 2;
            const bool matrix = has_both_parts(tasks, task) ? part == 1 : task > 0 && task % 2 == 0;
            chain.length = tokens(border(kSegmentUnits * segment), border(kSegmentUnits * (segment + 1)));
            chain.handover = chain.handovers + (segment == 0 ? 0 : 2 * segment - 1 + matrix);
            chain.from = segment == 0 ? From::kInitialState : matrix ? From::kIdentity : From::kZero;
            chain.to = segment == 0 ? To::kHandover : matrix ? To::kM : To::kB;
        } else if (tasks == 1) {
            chain.length = tokens(0, chunks);
            chain.from = From::kInitialState;
            chain.to = To::kFinalState;
        } else {
            const int own_tasks = units - kSegmentUnits * last;
            const int share = spare_units > 0 ? 0 : final_share(chunks - border(kSegmentUnits * last), own_tasks, last + 1);
            chain.readers = tasks + (share > 0) - (spare_units > 0);
            chain.spare_segment = spare_units > 0 ? spare_segment_of(tasks) : tasks;
            const bool corrects_spare = spare_units > 0 && task == tasks - 1 && part == 0;
            const int unit = corrects_spare ? first_spare : kSegmentUnits + task;   // the final state's is behind all tokens
            const bool final = unit == units && (part == 1 || share == 0);
            chain.from = From::kSummaries;
            chain.to = final ? To::kFinalState : To::kNowhere;
            const int segment = min(unit / kSegmentUnits, last);
            chain.compositions = final ? last : segment - 1;
            if (!final) {   // see share_out
                const int from = border(kSegmentUnits * segment), to = border(kSegmentUnits * (segment + 1));
                chain.corrected = tokens(from, to);
                chain.part = unit - kSegmentUnits * segment;
                chain.until_part = chain.part + (corrects_spare ? kSegmentUnits : 1);
                chain.parts = segment < last ? kSegmentUnits : own_tasks;
                chain.final_part = segment == last && share > 0;
                if (to - from >= kLongSegment)
                    chain.M = summary_of(chain, segment) + 1;
            }
            goes_on = task == tasks - 1 && !final;
        }
        if (first_handover + handovers_of(tasks) > p.workspace.count) {   // only where cu_seqlens is not what it should be
            chain = {};
            chain.from = From::kZero;
            chain.to = To::kNowhere;
        }
        return goes_on;
    }

    // Of a segment's tokens, those that this task corrects: as many as the others, of those before the state is forgotten. Called by all lanes.
    __device__ __forceinline__ static void share_out(Chain& chain, uint64_t ticket) {
        const int length = chain.corrected;
        if (length == 0)
            return;
        int chunks = chunks_of(length);
        if (chain.M != nullptr)
            chunks = min(chunks, await_memory(*chain.M, ticket));
        const int final_part = chain.final_part ? final_share(chunks, chain.parts, 2) : 0;
        const auto cut = [&](int part) { return part > chain.parts ? chunks : (chunks - final_part) * part / chain.parts; };
        const int from = cut(chain.part) * kChunk, to = min(cut(chain.until_part) * kChunk, length);
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            chain.first_row += from;
            chain.corrected = to - from;
        }
        __syncwarp();
    }
};

// ---- summaries through the workspace

// Says that a CTA has left its half, all of its warps together: what a release waits for takes as long as a step, and longer for each warp of its own.
__device__ __forceinline__ void say_left(Handover& handover, uint64_t ticket, int half) {
    barrier(kRecurrenceBarrier, kWarpgroup);   // a release is for all that they have written
    if (thread_index() % kWarpgroup == 0)
        store_release(&handover.left[half], ticket);
}

// Counts how often it was fetched, in the ticket's lower half: the last of all fetches takes that away, for a graph's next replay has the same ticket.
__device__ __forceinline__ void count_fetch(uint64_t* left, uint64_t ticket, int fetches) {
    atomic_count(reinterpret_cast<uint32_t*>(left), static_cast<uint32_t>(ticket) + fetches - 1);
}

// The greatest power of two in each of the lane's two rows of the state, or the least of fp32's normal numbers, whose inverse still is one.
__device__ __forceinline__ void find_powers(const float (&S)[kStateRegisters], float (&powers)[2]) {
    const int lane = threadIdx.x % 32;
    for (int h = 0; h < 2; ++h) {
        float most = 0x1p-126f;
        for (int i = 2 * h; i < kStateRegisters; i += 4)
            most = fmaxf(most, fmaxf(fabsf(S[i]), fabsf(S[i + 1])));
        for (int d = 1; d < 4; d *= 2)
            most = fmaxf(most, __shfl_sync(~0u, most, lane ^ d));
        powers[h] = __uint_as_float(__float_as_uint(most) & 0x7f800000);
    }
}

// Rows over their powers.
__device__ __forceinline__ void pack_rows(const float (&S)[kStateRegisters], const float (&powers)[2], uint32_t (&S_h)[kStateRegisters / 2]) {
    for (int i = 0; i < kStateRegisters / 2; ++i) {
        const float inverse = __uint_as_float(0x7f000000 - __float_as_uint(powers[i % 2]));
        S_h[i] = pack_fp16(S[2 * i] * inverse, S[2 * i + 1] * inverse);
    }
}

// Nobody but the same warp of other pairs wants a warp's part of B. In fp16, each row over its own power of two: whatever its size, an element is
// rounded by at most 2^-11 of itself, or 2^-24 of the row's greatest.
__device__ __forceinline__ void leave_B(Handover& summary, uint64_t ticket, int half, const float (&S)[kStateRegisters]) {
    const int thread = thread_index() % kWarpgroup;
    float powers[2];
    find_powers(S, powers);
    summary.powers[half][thread] = {powers[0], powers[1]};
    uint32_t S_h[kStateRegisters / 2];
    pack_rows(S, powers, S_h);
    for (int i = 0; i < kStateRegisters / 8; ++i)
        summary.B[half][i][thread] = {S_h[4 * i], S_h[4 * i + 1], S_h[4 * i + 2], S_h[4 * i + 3]};
    say_left(summary, ticket, half);
}

// Where unit `u`, of 16 bytes, of row `row` lies in a warp's patch, [16, 16] bf16 or fp16: eight rows of 32 bytes then meet all banks.
__device__ __forceinline__ uint32_t patch_address(const bf16* patch, int row, int u) { return smem_address(patch) + (2 * row + (u ^ (row / 4 % 2))) * 16; }

// M, whose rows are those of the state, in blocks of 16 rows, a warp's own, as two HalfTiles, but of fp16: no product of (I - beta k k') and
// decays has an element greater than 1. Through shared memory, `block`: written from the registers, a row would come in pieces of 4 bytes.
__device__ __forceinline__ void leave_M(Handover& summary, uint64_t ticket, int half, HalfTile (&block)[kHalves], int memory, const float (&S)[kStateRegisters]) {
    const int warp = half * kRecurrenceWarps + thread_index() % kWarpgroup / 32, lane = thread_index() % 32, row = lane % 16;
    const uint32_t address = smem_address(block) + row * 128 + ((lane / 16 ^ row % 8) << 4);
    __syncwarp();   // what stood in the block has been read
    for (int tile = 0; tile < kBlocks; ++tile) {
        uint32_t x[4];
        for (int i = 0; i < 4; ++i) {
            const float* const s = S + 8 * tile + 2 * i;
            x[i] = pack_fp16(s[0] * kStateUp, s[1] * kStateUp);
        }
        stmatrix_x4((address ^ tile % 4 * 32) + tile / 4 * kHalfTileBytes, x);
    }
    __syncwarp();
    for (int i = lane; i < kHalves * kHalfTileBytes / 16; i += 32)
        reinterpret_cast<uint4*>(summary.M[warp])[i] = load_shared_16_bytes(smem_address(block) + i * 16);
    if (lane == 0)
        summary.memory[warp] = memory;
    say_left(summary, ticket, half);
}

// Whether the warp's part of M is not as good as zero yet. No token lengthens a row of it, so what has become so remains so. No number is none.
__device__ __forceinline__ bool remembers(const float (&S)[kStateRegisters]) {
    float sums[4] = {};
    for (int i = 0; i < kStateRegisters; ++i)
        sums[i % 4] += fabsf(S[i]);
    return __any_sync(~0u, !((sums[0] + sums[1]) + (sums[2] + sums[3]) <= kForgotten / kStateUp));
}

// What a CTA of another pair has left. The fetch is still to be counted, by a lane of each warp, when there is time.
__device__ __forceinline__ uint64_t* fetch_state(Handover& summary, uint64_t ticket, int half, float (&S)[kStateRegisters]) {
    const int thread = thread_index() % kWarpgroup;
    uint64_t* const left = &summary.left[half];
    if (thread % 32 == 0)
        await_left(left, ticket);
    __syncwarp();
    for (int i = 0; i < kStateRegisters / 4; ++i) {
        const float4 x = summary.state[half][i][thread];
        S[4 * i] = x.x, S[4 * i + 1] = x.y, S[4 * i + 2] = x.z, S[4 * i + 3] = x.w;
    }
    return left;
}

// A summary passes through the stages of the CTA's own chunks in pieces: M, and behind it B, of the CTA's half, in units of 16 rows of M, three
// a stage. So do the outputs to be corrected, and Y.
constexpr int kUnitBytes = kHalves * kHalfTileBytes, kStageUnits = static_cast<int>(sizeof(Stage)) / kUnitBytes;
constexpr int kUnitLoads = kUnitBytes / static_cast<int>(kWarpgroup * sizeof(uint4));   // uint4s a thread
constexpr int kStateUnits = kStateRegisters / 8 / kUnitLoads, kSummaryUnits = kBlocks + kStateUnits;
constexpr int kSummaryPieces = kSummaryUnits / kStageUnits, kFirstOfB = kBlocks / kStageUnits;   // the piece in which B begins
static_assert(sizeof(Stage) % kUnitBytes == 0 && kSummaryUnits % kStageUnits == 0 && sizeof(Handover::M) == kBlocks * kUnitBytes);

__device__ __forceinline__ int correction_pieces(const Chain& chain) { return (chain.corrected + kCorrected - 1) / kCorrected; }
__device__ __forceinline__ int pieces_of(const Chain& chain) { return chain.compositions * kSummaryPieces + correction_pieces(chain); }

// Summaries that it waits for: those that it composes with, and its own, to be corrected.
__device__ __forceinline__ int awaited_summaries(const Chain& chain) { return chain.compositions + (chain.to == To::kNowhere); }

// Who wants them: its own units, to be corrected, and what comes after these.
__device__ __forceinline__ int fetches_of(const Chain& chain, int segment) {
    return chain.readers - kSegmentUnits * (segment - 1) + (segment > chain.spare_segment);   // which is corrected at once
}

// What this CTA wants of a summary: its half of B, and both halves of M.
constexpr int kParts = 1 + kHalves;
constexpr int kAwaitedAtOnce = 32 / kParts;   // segments

struct Part {
    uint64_t* left;
    int fetches;
};
// Of all segments' parts, from the first one that has a summary on.
__device__ __forceinline__ Part part_of(const Chain& chain, int n) {
    const int segment = 1 + n / kParts, part = n % kParts, fetches = fetches_of(chain, segment);
    Handover* const summary = summary_of(chain, segment);
    const bool of_B = part == 0;
    return {&summary[of_B ? 0 : 1].left[of_B ? blockIdx.x % kPair : part - 1], of_B ? fetches : kPair * fetches};
}

// Until the summary of the first of these segments is there. Returns how many are, one after the other. A lane a part: one question takes as long
// as all, and as little as possible is done between two of them. Called by all lanes.
__device__ __forceinline__ int await_summaries(const Chain& chain, uint64_t ticket, int first, int end) {
    const int lane = threadIdx.x % 32;
    const uint64_t* const left = part_of(chain, (first - 1) * kParts + lane).left;
    bool is_missing = lane < (end - first) * kParts;
    uint32_t missing;
    do {
        if (is_missing)
            is_missing = !is_left(left, ticket);
        missing = __ballot_sync(~0u, is_missing);
    } while (missing & ((1u << kParts) - 1));
    __syncwarp();   // what one has seen the others know of
    return missing == 0 ? end - first : (__ffs(missing) - 1) / kParts;
}

__device__ __forceinline__ void count_fetches(const Chain& chain, uint64_t ticket, int last) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < last * kParts; i += 32) {
        const Part part = part_of(chain, i);
        count_fetch(part.left, ticket, part.fetches);
    }
}

// In place of a team.
__device__ __forceinline__ void arrive_with_piece(uint64_t& ready, int bytes) {
    mbarrier_arrive_expect_bytes(ready, bytes);
    mbarrier_arrive(smem_address(&ready), kTeam * 32 - 1);
}

// Called by one thread. `await_stage` gives the slot of a piece. Unrolled, for all pieces of the first summaries are wanted at once: what is known
// when it is compiled need not be found between two of them.
template <class AwaitStage>
__device__ __forceinline__ void load_summary(SharedStorage& smem, const Handover* summary, AwaitStage await_stage) {
    const int half = blockIdx.x % kPair;
    const char* const B = reinterpret_cast<const char*>(summary[0].B[half]);
    const char* const M = reinterpret_cast<const char*>(summary[1].M);
#pragma unroll
    for (int piece = 0; piece < kSummaryPieces; ++piece) {
        const uint32_t slot = await_stage(piece);
        char* const stage = reinterpret_cast<char*>(&smem.stages[slot]);
        const int first = piece * kStageUnits, of_M = min(max(kBlocks - first, 0), kStageUnits);
        const int bytes_of_powers = piece == kFirstOfB ? sizeof(summary->powers[half]) : 0;
        arrive_with_piece(smem.ready[slot], sizeof(Stage) + bytes_of_powers);
        if (piece == kFirstOfB)
            bulk_load(smem.small[slot].powers, summary->powers[half], bytes_of_powers, smem.ready[slot]);
        if (of_M > 0)
            bulk_load(stage, M + first * kUnitBytes, of_M * kUnitBytes, smem.ready[slot]);
        if (of_M < kStageUnits)
            bulk_load(stage + of_M * kUnitBytes, B + (first + of_M - kBlocks) * kUnitBytes, (kStageUnits - of_M) * kUnitBytes, smem.ready[slot]);
    }
}

// The state before a segment, or behind the last one. A product takes S in fp16, as B is left. `number` of the next stage of the CTA's own, and
// `release` gives one back.
template <class Release>
__device__ __forceinline__ void compose(const KernelParams& p, SharedStorage& smem, const Chain& chain, uint32_t number, Release release,
                                        float (&S)[kStateRegisters]) {
    const int thread = thread_index() % kWarpgroup;
    uint64_t* const left = fetch_state(chain.handovers[0], p.workspace.ticket, blockIdx.x % kPair, S);
    for (int segment = 1; segment <= chain.compositions; ++segment) {
        float powers[2];
        float2 powers_of_B;
        uint4 B[kStateRegisters / 8];
        find_powers(S, powers);
        uint32_t S_h[kStateRegisters / 2];
        pack_rows(S, powers, S_h);
        fence_operands(S);
#pragma unroll
        for (int piece = 0; piece < kSummaryPieces; ++piece, ++number) {
            const Turn<kOwnStages> own(number);
            const uint32_t stage = smem_address(&smem.stages[own.slot]);
            const int first = piece * kStageUnits, end = first + kStageUnits;
            mbarrier_wait(smem_address(&smem.ready[own.slot]), own.parity);
            if (first < kBlocks) {
                cute::warpgroup_arrive();
                for (int block = first; block < min(end, kBlocks); ++block) {
                    const MatrixDescriptor M = matrix_descriptor(in_sixteenths(stage + (block - first) * kUnitBytes), Swizzle::k128Bytes, kHalfTileBytes, 8 * 128);
                    wgmma<ComposeAtom>(S, S_h + 4 * block, M, block == 0 ? ScaleOut::Zero : ScaleOut::One);
                }
                cute::warpgroup_commit_batch();
            }
            if (piece == kFirstOfB)
                powers_of_B = load_shared_float2(smem_address(&smem.small[own.slot].powers[thread]));
            for (int i = (max(first, kBlocks) - kBlocks) * kUnitLoads; i < (end - kBlocks) * kUnitLoads; ++i)
                B[i] = load_shared_16_bytes(stage + ((i - (first - kBlocks) * kUnitLoads) * kWarpgroup + thread) * 16);
        }
        cute::warpgroup_wait<0>();
        fence_operands(S);
        for (int before = kSummaryPieces; before > 0; --before)
            release(Turn<kOwnStages>(number - before).slot);
        for (int i = 0; i < kStateRegisters / 8; ++i) {
            const uint32_t pairs[4] = {B[i].x, B[i].y, B[i].z, B[i].w};
            for (int j = 0; j < 4; ++j) {
                const float2 b = unpack_fp16(pairs[j]);
                const float power = j % 2 == 0 ? powers_of_B.x : powers_of_B.y;
                float* const s = S + 8 * i + 2 * j;
                s[0] = fmaf(s[0], powers[j % 2], b.x * power);
                s[1] = fmaf(s[1], powers[j % 2], b.y * power);
            }
        }
    }
    if (thread % 32 == 0)
        count_fetch(left, p.workspace.ticket, kRecurrenceWarps * chain.readers);
}

}  // namespace flash_kda::sm90
