// Few chains, and long ones: cut in time, into segments done side by side.
//
// Over a stretch of tokens the state goes to S M + B: B is the state that zero would become, M the one that the identity would become
// without values. First the summaries, of all segments of a chain but the last. The first segment, longer than the others, is done as it is
// and gives the state S1 behind it. The others are summarised two by two, 1 and 2, 3 and 4, ...: one task does B of both, and leaves it
// behind the first and behind the second; another does M. One that is left over has one task for M and B. All these tasks take about as
// long as one another, and all of them are the recurrence as it is. Then the replays of all segments but the first, and of chains that are not cut: the state
// before segment s is, with B_i and M_i of segment i alone where i is odd and of i - 1 and i where it is even,
//
//   S = ((S1 M_2 + B_2) M_4 + B_4) ...     and at last, where s is even, M_(s - 1) and B_(s - 1),
//
// in three bf16 products each, of S and M as a bf16 part and what that lacks; from there the segment is done as it is.
//
// The tasks are numbered, by sequence, head and segment; the pairs deal them out in turn, first all summaries, then all replays. Since the
// CTAs run all at once, and no pair waits for anything but summaries, they cannot lock up.
#pragma once

#include "kernel_params.h"
#include "ptx.h"
#include "ring.h"
#include "schedule.cuh"
#include "smem.h"
#include "wgmma.h"

namespace flash_kda::sm90 {

// A pair's tasks, one after the other.
class SegmentWalk {
public:
    __device__ explicit SegmentWalk(const Span&) : place{Tasks::kSummaries, pair(), 0, 0, {}} {}

    // Writes the next one. Called by all lanes.
    __device__ __forceinline__ void next(const KernelParams& p, Chain& chain) {
        const uint32_t lane = threadIdx.x % 32;
        Place at = place;
        for (;;) {
            // A lane a sequence: how many tasks it has, and there are up to its end.
            const uint32_t sequence = at.sequence + lane;
            const Rows rows = sequence < p.num_sequences ? sequence_rows(p, sequence) : Rows{0, 0};
            const int n = segments_of(chunks_of(rows.length), p.least_chunks, p.segments);
            const uint32_t heads = sequence < p.num_sequences ? p.heads : 0;
            const Counts own = {heads * summaries_of(n), heads * replays_of(n)};
            Counts until = own;
            for (int d = 1; d < 32; d *= 2) {
                const uint32_t x = __shfl_up_sync(~0u, until.summaries, d), y = __shfl_up_sync(~0u, until.replays, d);
                if (lane >= d) {
                    until.summaries += x;
                    until.replays += y;
                }
            }
            until.summaries += at.before.summaries;
            until.replays += at.before.replays;
            const bool summaries_first = at.tasks == Tasks::kSummaries;
            const uint32_t end = summaries_first ? until.summaries : until.replays;
            if (const uint32_t behind = __ballot_sync(~0u, at.task < end)) {
                bool goes_on = false;
                if (lane == __ffs(behind) - 1) {
                    const uint32_t each = summaries_first ? summaries_of(n) : replays_of(n), in_sequence = at.task - (end - each * p.heads);
                    const uint32_t tasks_before = until.summaries - own.summaries + until.replays - own.replays;
                    const uint32_t head = in_sequence / each, task = in_sequence % each;
                    take(p, chain, sequence, rows, n, head, at.tasks, task, at.part, tasks_before - sequence * p.heads + head * handovers_of(n));
                    goes_on = summaries_first && task > 0 && at.part == 0;
                }
                goes_on = __any_sync(~0u, goes_on);
                place = {at.tasks, goes_on ? at.task : at.task + gridDim.x / kPair, goes_on, at.sequence, at.before};
                return;
            }
            at.before = {__shfl_sync(~0u, until.summaries, 31), __shfl_sync(~0u, until.replays, 31)};
            at.sequence += 32;
            if (at.sequence >= p.num_sequences) {
                if (!summaries_first) {
                    if (lane == 0)
                        chain.done = true;
                    return;
                }
                at = {Tasks::kReplays, pair(), 0, 0, {}};
            }
        }
    }

private:
    __device__ static uint32_t pair() { return blockIdx.x / kPair; }

    enum class Tasks { kSummaries, kReplays };
    struct Counts {
        uint32_t summaries, replays;
    };
    struct Place {
        Tasks tasks;
        uint32_t task;       // the next one of the pair's,
        int part;            // of it: of all summaries but a chain's first there are two
        uint32_t sequence;   // no earlier than this sequence,
        Counts before;       // which so many tasks precede
    };
    Place place;

    __device__ __forceinline__ static void take(const KernelParams& p, Chain& chain, uint32_t sequence, const Rows& rows, int n, uint32_t head, Tasks tasks,
                                                int task, int part, uint32_t first_handover) {
        chain = {};
        chain.segments = n;
        chain.handovers = p.workspace.handovers + first_handover;
        chain.head = head;
        chain.state_offset = (static_cast<int64_t>(sequence) * p.heads + head) * (kDim * kDim);
        int segment;
        if (tasks == Tasks::kReplays) {
            segment = n > 1 ? 1 + task : 0;
            chain.compositions = segment / 2;
            chain.from = segment == 0 ? From::kInitialState : From::kSummaries;
            chain.to = segment == n - 1 ? To::kFinalState : To::kNowhere;
        } else if (task == 0) {
            segment = 0;
            chain.handover = chain.handovers;
            chain.from = From::kInitialState;
            chain.to = To::kHandover;
        } else {
            const int first = task - 1 + task % 2;   // of two segments, whose tasks have the same two numbers: B's, then M's
            const bool alone = first == n - 2, matrix = alone ? part == 0 : task % 2 == 0;
            segment = alone ? first : first + part;
            chain.handover = chain.handovers + 2 * segment - 1 + matrix;
            chain.from = part == 1 && !alone ? From::kRegisters : matrix ? From::kIdentity : From::kZero;
            chain.to = matrix ? To::kM : To::kB;
        }
        chain.segment = segment;
        const int chunks = chunks_of(rows.length);
        const auto border = [&](int s) { return border_of(chunks, s, n) * kChunk; };
        chain.first_row = rows.first + border(segment);
        chain.length = min(border(segment + 1), rows.length) - border(segment);
        if (first_handover + handovers_of(n) > p.workspace.count) {   // only where cu_seqlens is not what it should be
            chain = {};
            chain.from = From::kZero;
            chain.to = To::kNowhere;
        }
    }
};

// ---- summaries through the workspace

// Waits for what a warp leaves.
__device__ __forceinline__ void await_left(uint64_t* left, uint64_t ticket) {
    while (load_acquire(left) - ticket >= 1 << 16) {
    }
}

// Counts how often that was: the last of all fetches takes the ticket away, for a graph's next replay has the same one.
__device__ __forceinline__ void count_fetch(uint64_t* left, uint64_t ticket, int fetches) {
    if (atomic_add(left, 1) + 1 == ticket + fetches)
        *left = 0;
}

// M, whose rows are those of the state, in blocks of 16 rows, a warp's own, each as its bf16 part and what that lacks, both as
// two HalfTiles. By tiles [16, 16] through `patch`, the warp's: written from the registers, a row would come in pieces of 4 bytes.
__device__ __forceinline__ void leave_matrix(Handover& summary, uint64_t ticket, int half, bf16* patch, const float (&S)[kStateRegisters]) {
    const int warp = half * 4 + thread_index() % kWarpgroup / 32, lane = thread_index() % 32, row = lane / 2;
    auto& block = summary.matrix[warp];
    const auto unit = [&](int t, int u) { return smem_address(patch) + (2 * t + (u ^ (t / 4 % 2))) * 16; };   // as OutputWriter's
    const uint32_t store_address = unit(lane % 16, lane / 16), load_address = unit(row, lane % 2);
    for (int j = 0; j < kDim / 16; ++j) {
        uint32_t parts[2][4];   // high and low
        for (int i = 0; i < 4; ++i) {
            const float x = S[8 * j + 2 * i] * kStateUp, y = S[8 * j + 2 * i + 1] * kStateUp;
            parts[0][i] = pack_bf16(x, y);
            parts[1][i] = pack_bf16(x - low_bf16(parts[0][i]), y - high_bf16(parts[0][i]));
        }
        for (int part = 0; part < 2; ++part) {
            __syncwarp();   // what stood in the patch has been read
            stmatrix_x4(store_address, parts[part]);
            __syncwarp();
            *reinterpret_cast<uint4*>(&block[part][j / 4][row * kHalf + ((2 * j + lane % 2) % 8 ^ row % 8) * 8]) = load_shared_16_bytes(load_address);
        }
    }
    __syncwarp();   // a release is for all that the warp has written
    if (lane == 0)
        store_release(&summary.left[warp], ticket);
}

// What the same warp of another pair has left. The fetch is still to be counted, by a lane, when there is time.
__device__ __forceinline__ uint64_t* fetch_state(Handover& summary, uint64_t ticket, int half, float (&S)[kStateRegisters]) {
    const int thread = thread_index() % kWarpgroup;
    uint64_t* const left = &summary.left[half * 4 + thread / 32];
    if (thread % 32 == 0)
        await_left(left, ticket);
    __syncwarp();
    for (int i = 0; i < kStateRegisters / 4; ++i) {
        const float4 x = summary.state[half][i][thread];
        S[4 * i] = x.x, S[4 * i + 1] = x.y, S[4 * i + 2] = x.z, S[4 * i + 3] = x.w;
    }
    return left;
}

// A summary passes through the stages of the CTA's own chunks in pieces: B, of the CTA's half, then M, a block a stage.
constexpr int kStateLoads = static_cast<int>(sizeof(Stage) / (kWarpgroup * sizeof(float4)));   // float4s a thread that a stage holds
constexpr int kStatePieces = (kStateRegisters / 4 + kStateLoads - 1) / kStateLoads, kSummaryPieces = kStatePieces + kBlocks;
static_assert(sizeof(Handover::matrix[0]) <= sizeof(Stage));

// Behind which segment the summary ends that a replay composes first (1), second (2), ...
__device__ __forceinline__ int summarised(const Chain& chain, int composition) { return min(2 * composition, chain.segment - 1); }

// B and M of a segment, or of two.
__device__ __forceinline__ Handover* summary_of(const Chain& chain, int segment) { return &chain.handovers[2 * segment - 1]; }

// A lane for the part of each warp that leaves some of a summary; `does` gets the word and how often the part is fetched.
template <class Does>
__device__ __forceinline__ void for_each_part(const Chain& chain, int composition, Does does) {
    const int lane = threadIdx.x % 32, segment = summarised(chain, composition);
    const int fetches = segment % 2 == 1 ? 1 : chain.segments - 1 - segment;   // by the next segment's replay; of two segments, by all behind
    Handover* const summary = summary_of(chain, segment);
    if (lane < 4)
        does(&summary[0].left[blockIdx.x % kPair * 4 + lane], fetches);
    else if (lane < 4 + kHalves * 4)
        does(&summary[1].left[lane - 4], kPair * fetches);
}

// Until the summary is there. Called by all lanes.
__device__ __forceinline__ void await_summary(const Chain& chain, uint64_t ticket, int composition) {
    for_each_part(chain, composition, [&](uint64_t* left, int) { await_left(left, ticket); });
    __syncwarp();
    fence_async_proxy_everywhere();
}

__device__ __forceinline__ void count_fetches(const Chain& chain, uint64_t ticket, int composition) {
    for_each_part(chain, composition, [&](uint64_t* left, int fetches) { count_fetch(left, ticket, fetches); });
}

// Called by one thread.
__device__ __forceinline__ void load_summary_piece(const Chain& chain, int composition, int piece, Stage& stage, uint64_t& ready) {
    const Handover* const summary = summary_of(chain, summarised(chain, composition));
    const bool state = piece < kStatePieces;
    constexpr int kLast = kStateRegisters / 4 - (kStatePieces - 1) * kStateLoads;
    const int bytes = state ? (piece + 1 < kStatePieces ? kStateLoads : kLast) * kWarpgroup * sizeof(float4) : sizeof(Handover::matrix[0]);
    const void* const from = state ? static_cast<const void*>(summary[0].state[blockIdx.x % kPair][piece * kStateLoads])
                                   : summary[1].matrix[piece - kStatePieces];
    mbarrier_arrive_expect_bytes(ready, bytes);
    mbarrier_arrive(smem_address(&ready), kTeam * 32 - 1);   // in place of a team
    bulk_load(&stage, from, bytes, ready);
}

// The state before a segment. `number` of the next stage of the CTA's own, and `release` gives one back.
template <class Release>
__device__ __forceinline__ void compose(const KernelParams& p, SharedStorage& smem, const Chain& chain, uint32_t number, Release release,
                                        float (&S)[kStateRegisters]) {
    const int thread = thread_index() % kWarpgroup;
    const auto await_piece = [&](uint32_t n) -> uint32_t {
        const Turn<kOwnStages> own(n);
        mbarrier_wait(smem_address(&smem.ready[own.slot]), own.parity);
        return own.slot;
    };
    uint64_t* const left = fetch_state(chain.handovers[0], p.workspace.ticket, blockIdx.x % kPair, S);
    for (int compositions = chain.compositions; compositions > 0; --compositions) {
        uint32_t high[kStateRegisters / 2], low[kStateRegisters / 2];
        for (int i = 0; i < kStateRegisters / 2; ++i) {
            high[i] = pack_bf16(S[2 * i], S[2 * i + 1]);
            low[i] = pack_bf16(S[2 * i] - low_bf16(high[i]), S[2 * i + 1] - high_bf16(high[i]));
        }
#pragma unroll
        for (int piece = 0; piece < kStatePieces; ++piece, ++number) {
            const uint32_t slot = await_piece(number);
            for (int i = 0; i < kStateLoads && piece * kStateLoads + i < kStateRegisters / 4; ++i) {
                const float4 x = load_shared_float4(smem_address(&smem.stages[slot]) + (i * kWarpgroup + thread) * 16);
                float* const to = S + 4 * (piece * kStateLoads + i);
                to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
            }
            release(slot);
        }
        fence_operands(S);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block, ++number) {
            const uint32_t slot = await_piece(number);
            const MatrixDescriptor matrix = matrix_descriptor(in_sixteenths(smem_address(&smem.stages[slot])), Swizzle::k128Bytes, kHalfTileBytes, 8 * 128);
            cute::warpgroup_arrive();
            wgmma<UpdateAtom>(S, high + 4 * block, matrix);
            wgmma<UpdateAtom>(S, low + 4 * block, matrix);
            wgmma<UpdateAtom>(S, high + 4 * block, matrix + kHalves * kHalfTileBytes / 16);
            cute::warpgroup_commit_batch();
            if (block > 0) {
                cute::warpgroup_wait<1>();
                release(Turn<kOwnStages>(number - 1).slot);
            }
        }
        cute::warpgroup_wait<0>();
        fence_operands(S);
        release(Turn<kOwnStages>(number - 1).slot);
    }
    if (thread % 32 == 0)
        count_fetch(left, p.workspace.ticket, chain.segments - 1);
}

}  // namespace flash_kda::sm90
