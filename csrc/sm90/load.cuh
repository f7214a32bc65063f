// Load and mail: single warps that ask the copy engine for what the others will need, as far ahead as there is room. Their loops
// stay rolled up, as schedule's do, but for a summary's pieces: code that comes from afar is waited for by all others.
#pragma once

#include <type_traits>

#include "kernel_params.h"
#include "ptx.h"
#include "ring.h"
#include "schedule.cuh"
#include "segments.cuh"
#include "smem.h"
#include "tma.h"

namespace flash_kda::sm90 {

// k, q and g of a chunk. Called by one thread. Rows past the tensor arrive as zeros; rows past the sequence are its neighbour's, and are
// cleared before anything looks at them.
template <Sharing kSharing>
__device__ __forceinline__ void load_chunk(const KernelParams& p, const Chain& chain, int chunk, Stage& stage, uint64_t& loaded) {
    constexpr bool kOnce = kSharing == Sharing::kSpans;
    const int row = static_cast<int>(chain.first_row) + chunk * kChunk, head = static_cast<int>(chain.head);
    mbarrier_arrive_expect_bytes(loaded, sizeof(Stage));
    load_box<kOnce>(p.g, loaded, stage.g[0], row, 0, head);   // both halves at once
    for (int half = 0; half < kHalves; ++half) {
        load_box<kOnce>(p.k, loaded, stage.kq[half][0], row, half, head);
        load_box<kOnce>(p.q, loaded, stage.kq[half][1], row, half, head);
    }
}

// Of a correction: Y of all its channels over the outputs so far of this CTA's half. Called by one thread. What lies behind the tokens to be
// corrected, of others or of nobody, is not looked at.
__device__ __forceinline__ void load_correction_piece(const KernelParams& p, int row, int head, Stage& stage, uint64_t& ready) {
    arrive_with_piece(ready, sizeof(Stage));
    load_box<false>(p.Y_map, ready, stage.kq[0][0], row, 0, head);   // both halves at once
    load_box<false>(p.out_map, ready, stage.g[0], row, blockIdx.x % kPair, head);
}

// When a launch begins there is room for more than the memory fills before the first step could begin. So but for kFirstChunks nothing is asked for
// before the first of them is there, which all wait for. To be called while its stage cannot have been filled again: by whoever fills it, or has
// what the recurrence needs before it can take that chunk.
__device__ __forceinline__ void await_first_chunk(SharedStorage& smem) { mbarrier_wait(smem_address(&smem.loaded[0]), 0); }

// Before a CTA may end: until all slots are empty.
template <int kSlots, class Await>
__device__ __forceinline__ void await_all(Await await) {
#pragma unroll 1
    for (int ahead = 0; ahead < kSlots; ++ahead)
        await(ahead);
}

// What this CTA prepares: every other chunk, counted through all its chains; and pieces, of its half of the state. The warp that finds the chains:
// it is the first to want one.
template <Sharing kSharing>
__device__ __forceinline__ void load_chunks(const KernelParams& p, SharedStorage& smem) {
    std::conditional_t<kSharing == Sharing::kSegments, SegmentWalk, SpanWalk> walk(p, smem.span);
    const uint32_t rank = blockIdx.x % kPair;
    uint32_t number = 0, pieces = 0, begun = 0;   // of the chunks that this CTA prepares; of pieces; chunks of both CTAs before this chain
    const auto await_stage = [&](int ahead) -> uint32_t {   // so many behind the next one
        const Turn<kOwnStages> own(number + pieces + ahead);
        mbarrier_wait(smem_address(&smem.empty[own.slot]), own.parity ^ 1);   // passes in the first turn
        return own.slot;
    };
    for (uint32_t n = 0; const Chain* next = find_chain(p, smem, walk, n); ++n) {
        const Chain& chain = *next;
        if (kSharing == Sharing::kSpans || chain.from != From::kSummaries) {   // first in the code too: a launch begins with it
            const int chunks = chain.chunks();
#pragma unroll 1
            for (int chunk = (begun ^ rank) & 1; chunk < chunks; chunk += kPair, ++number) {
                if (n == 0 && number == kFirstChunks)
                    await_first_chunk(smem);
                const uint32_t slot = await_stage(0);
                if (elect_one())
                    load_chunk<kSharing>(p, chain, chunk, smem.stages[slot], smem.loaded[number % kOwnStages]);
            }
            begun += chunks;
        } else if constexpr (kSharing == Sharing::kSegments) {
            const int composed = chain.compositions, last = awaited_summaries(chain);
#pragma unroll 1
            for (int segment = 1; segment <= last;) {
                const int end = segment + await_summaries(chain, p.workspace.ticket, segment, min(segment + kAwaitedAtOnce, last + 1));
                fence_async_proxy_global();
#pragma unroll 1
                for (; segment < end; ++segment)
                    if (segment <= composed) {
                        if (elect_one())
                            load_summary(smem, summary_of(chain, segment), await_stage);
                        __syncwarp();
                        pieces += kSummaryPieces;
                    }
            }
            const int count = correction_pieces(chain), row = static_cast<int>(chain.first_row), head = static_cast<int>(chain.head);
            if (elect_one())
#pragma unroll 1
                for (int piece = 0; piece < count; ++piece) {
                    const uint32_t slot = await_stage(piece);
                    load_correction_piece(p, row + piece * kCorrected, head, smem.stages[slot], smem.ready[slot]);
                }
            __syncwarp();
            pieces += count;
            count_fetches(chain, p.workspace.ticket, last);   // takes long: not before all is asked for
        }
    }
    await_all<kOwnStages>(await_stage);   // given back, from both CTAs
}

// What is prepared here, for the other CTA of the pair: once it is ready here, and there is room there.
__device__ __forceinline__ void mail_chunks(SharedStorage& smem) {
    const uint32_t rank = blockIdx.x % kPair;
    uint32_t number = 0, pieces = 0, begun = 0;
    const auto there = [&](const void* here) { return address_in_cta(smem_address(here), 1 - rank); };
    const auto await_stage = [&]() -> uint32_t {
        const Turn<kOwnStages> own(number + pieces);
        mbarrier_wait(smem_address(&smem.ready[own.slot]), own.parity);
        return own.slot;
    };
    const auto await_room = [&](int ahead) -> uint32_t {   // so many behind the next one
        const Turn<kMailStages> mail(number + ahead);
        mbarrier_wait(smem_address(&smem.free[mail.slot]), mail.parity ^ 1);   // passes in the first turn
        return mail.slot;
    };
    meet_cluster();
    for (uint32_t n = 0; const Chain* next = await_chain(smem, n); give_back_chain(smem, n++)) {
        const Chain& chain = *next;
#pragma unroll 1
        for (int left = pieces_of(chain); left > 0; --left, ++pieces) {   // not to be mailed, but every turn must be seen,
            const uint32_t slot = await_stage();                          // by every lane, and must not be over before it is
            __syncwarp();
            if (threadIdx.x % 32 < kRecurrenceWarps)
                mbarrier_arrive(smem_address(&smem.empty[slot]));   // in place of the other CTA
        }
        const int chunks = chain.chunks();
#pragma unroll 1
        for (int chunk = (begun ^ rank) & 1; chunk < chunks; chunk += kPair, ++number) {
            const uint32_t slot = await_stage();
            const uint32_t to = kOwnStages + await_room(0);
            if (elect_one()) {
                const uint32_t landed = there(&smem.ready[to]);
                const auto push = [&](const auto& here, const auto& to) { bulk_push(there(&to), &here, sizeof(here), landed); };
                mbarrier_arrive_expect_bytes_in_cluster(landed, sizeof(Stage) + sizeof(SmallFactors));
                push(smem.stages[slot], smem.stages[to]);
                push(smem.small[slot], smem.small[to]);
            }
        }
        begun += chunks;
    }
    await_all<kMailStages>(await_room);   // said by the other CTA to be free
}

// A tail's values, whose rows past the sequence are zero: its neighbour's may be no numbers. Called by all lanes.
__device__ __forceinline__ void copy_tail(const bf16* v, int64_t row_stride, int valid, HalfTile& to) {
    const int lane = threadIdx.x % 32, unit = lane % 8;
    for (int row = lane / 8; row < kChunk; row += 32 / 8) {
        const uint4 x = row < valid ? reinterpret_cast<const uint4*>(v + row * row_stride)[unit] : uint4{};
        store_shared_16_bytes(smem_address(&to) + row * 128 + ((unit ^ row % 8) << 4), {x.x, x.y, x.z, x.w});
    }
    fence_async_proxy();   // next to write there is the copy engine
}

// This CTA's half of the state that a chain begins with comes closer before the recurrence gets there.
__device__ __forceinline__ void prefetch_state(const KernelParams& p, const Chain& chain) {
    if (chain.from != From::kInitialState || p.initial_state == nullptr)
        return;
    const int bytes = kHalf * kDim * (p.state_is_fp32 ? 4 : 2);
    bulk_prefetch(static_cast<const char*>(p.initial_state) + (chain.state_offset / (kHalf * kDim) + blockIdx.x % kPair) * bytes, bytes);
}

// The values of this CTA's half of the channels, of all chunks.
template <Sharing kSharing>
__device__ __forceinline__ void load_values(const KernelParams& p, SharedStorage& smem) {
    constexpr bool kOnce = kSharing == Sharing::kSpans;
    const int half = blockIdx.x % kPair;
    uint32_t number = 0;
    meet_cluster();
    for (uint32_t n = 0; const Chain* next = await_chain(smem, n); give_back_chain(smem, n++)) {
        const Chain& chain = *next;
        if (elect_one())
            prefetch_state(p, chain);
        if (!has_values(chain))
            continue;
        if (n == 0 && chain.chunks() > kPair * kFirstChunks)
            await_first_chunk(smem);
        const int chunks = chain.chunks();
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk, ++number) {
            const Turn<kValueStages> turn(number);
            uint64_t& loaded = smem.values_loaded[turn.slot];
            HalfTile& to = smem.values[turn.slot];
            mbarrier_wait(smem_address(&smem.values_empty[turn.slot]), turn.parity ^ 1);
            const int64_t row = chain.first_row + chunk * kChunk;
            if (const int valid = chain.length - chunk * kChunk; valid < kChunk) {
                copy_tail(p.v + (row * p.heads + chain.head) * kDim + half * kHalf, static_cast<int64_t>(p.heads) * kDim, valid, to);
                mbarrier_arrive(smem_address(&loaded));
            } else if (elect_one()) {
                mbarrier_arrive_expect_bytes(loaded, kHalfTileBytes);
                mbarrier_arrive(smem_address(&loaded), 31);   // in place of the other lanes
                load_box<kOnce>(p.v_map, loaded, to, static_cast<int>(row), half, static_cast<int>(chain.head));
            }
        }
    }
}

}  // namespace flash_kda::sm90
