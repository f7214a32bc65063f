// Which part of the work a pair of CTAs does, and in what order.
//
// The chains lie end to end on a line, heads of a sequence side by side, each as long as its chunks and states take, and the line is cut into
// spans of equal length, one a pair (R. McNaughton, Scheduling with deadlines and loss functions, 1959). Where a cut goes through a chain, the pair before
// it does its part first and leaves the state in the workspace; the pair behind it does the rest last. No chain is longer than a span, so
// the state has long been there when it is wanted. So all pairs end together whatever the lengths are, nobody asks anybody for work, and a
// chain's bits do not depend on where it is cut: cuts lie between chunks, and the state passes them in fp32.
//
// With no more chains than pairs a chain has a pair to itself.
#pragma once

#include "kernel_params.h"
#include "ptx.h"
#include "ring.h"

namespace flash_kda::sm90 {

// A point on the line: before this chunk of this chain. Behind all chains: {num_sequences, 0, 0}.
struct Place {
    uint32_t sequence, head;
    int chunk;
};

struct Span {
    Place first, last;
    int64_t warp_sums[kCtaThreads / 32];
    int warp_longest[kCtaThreads / 32];
};

// Tokens of a sequence. The host cannot look at cu_seqlens without a sync; whatever it holds, no row outside [0, tokens) is touched.
struct Rows {
    int64_t first;
    int length;
};
__device__ __forceinline__ Rows sequence_rows(const KernelParams& p, uint32_t sequence) {
    if (p.cu_seqlens == nullptr)
        return {sequence * p.tokens, static_cast<int>(p.tokens)};
    const int64_t first = min(max(p.cu_seqlens[sequence], int64_t{0}), p.tokens);
    const int64_t end = min(max(p.cu_seqlens[sequence + 1], first), p.tokens);
    return {first, static_cast<int>(end - first)};
}

__device__ __forceinline__ int chunks_of(int length) { return (length + kChunk - 1) / kChunk; }

// A chain's length on the line: its chunks, and before them what states take to come and go.
__device__ __forceinline__ int extent(const KernelParams& p, uint32_t sequence) {
    return kStateChunks + chunks_of(sequence_rows(p, sequence).length);
}

// Finds the pair's span. Called by all threads; whoever reads the span waits at a barrier first.
__device__ __forceinline__ void find_span(const KernelParams& p, Span& span) {
    const uint32_t spans = gridDim.x / kPair, index = blockIdx.x / kPair;
    if (spans == p.num_sequences * p.heads) {
        if (threadIdx.x < 2) {
            const uint32_t chain = index + threadIdx.x;
            (threadIdx.x == 0 ? span.first : span.last) = {chain / p.heads, chain % p.heads, 0};
        }
        return;
    }
    // Every thread takes neighbouring sequences; an inclusive sum over the threads says where on the line they end.
    const uint32_t per_thread = (p.num_sequences + kCtaThreads - 1) / kCtaThreads;
    const uint32_t begin = min(threadIdx.x * per_thread, p.num_sequences), end = min(begin + per_thread, p.num_sequences);
    int64_t sum = 0;
    int longest = 0;
    for (uint32_t n = begin; n < end; ++n) {
        const int x = extent(p, n);
        sum += x;
        longest = max(longest, x);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t until = sum;
    for (int d = 1; d < 32; d *= 2) {
        const int64_t x = __shfl_up_sync(~0u, until, d);
        if (lane >= d)
            until += x;
    }
    longest = __reduce_max_sync(~0u, longest);
    if (lane == 31) {
        span.warp_sums[warp] = until;
        span.warp_longest[warp] = longest;
    }
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < kCtaThreads / 32; ++w) {
        if (w < warp)
            until += span.warp_sums[w];
        total += span.warp_sums[w];
        longest = max(longest, span.warp_longest[w]);
    }
    total *= p.heads;
    const int64_t length = max((total + spans - 1) / spans, static_cast<int64_t>(longest));
    for (int side = 0; side < 2; ++side) {
        Place& place = side == 0 ? span.first : span.last;
        const int64_t at = min((index + side) * length, total);
        if (at == total && threadIdx.x == 0)
            place = {p.num_sequences, 0, 0};
        int64_t from = (until - sum) * p.heads;
        if (at < from || at >= until * p.heads)
            continue;
        for (uint32_t n = begin; n < end; ++n) {
            const int x = extent(p, n);
            const int64_t behind = at - from;
            from += static_cast<int64_t>(x) * p.heads;
            if (at < from) {
                place = {n, static_cast<uint32_t>(behind / x), max(static_cast<int>(behind % x) - kStateChunks, 0)};
                break;
            }
        }
    }
}

enum class From { kInitialState, kHandover, kZero, kIdentity, kSummaries };
enum class To { kFinalState, kHandover, kB, kM, kNowhere };

// A chain, or a part of one.
struct Chain {
    uint32_t head;
    int length;             // tokens
    int64_t first_row;      // of its tokens
    int64_t state_offset;   // elements, into the states
    From from;              // where the state comes from,
    To to;                  // and where it goes to
    bool done;              // there is none any more

    // Of segments: see segments.cuh.
    int readers;           // of the whole chain's first summary
    int spare_segment;     // of the whole chain, if any
    int compositions;      // before this one
    int corrected;         // tokens whose outputs wait for the state composed, and are of a segment's
    int part, until_part;  // parts from this one to before that one,
    int parts;             // of so many,
    bool final_part;       // and one more for whom finds the final state
    const Handover* M;     // of the segment, where it may forget before it ends
    Handover* handovers;   // of the whole chain: S1, B_1, M_1, B_2, M_2, ...
    Handover* handover;    // where this one's goes

    __device__ int chunks() const { return chunks_of(length); }
};

// The identity's rows are no values'.
__device__ __forceinline__ bool has_values(const Chain& chain) { return chain.to != To::kM; }

// Goes through a span's chains in the order in which they are to be done.
class SpanWalk {
public:
    __device__ SpanWalk(const KernelParams&, const Span& span)
        : span(span), sequence(span.first.sequence), head(span.first.head), first(span.last.chunk > 0), rest(span.first.chunk > 0), skip(rest) {}

    // Writes the next one. Called by all lanes.
    __device__ __forceinline__ void next(const KernelParams& p, Chain& chain) {
        if (skip)   // this one comes last
            step(p);
        skip = false;
        if (first) {
            take(p, chain, span.last.sequence, span.last.head, 0, span.last.chunk);
            first = false;
        } else if (sequence != span.last.sequence || head != span.last.head) {
            take(p, chain, sequence, head, 0, kEnd);
            skip = true;
        } else if (rest) {
            take(p, chain, span.first.sequence, span.first.head, span.first.chunk, kEnd);
            rest = false;
        } else if (threadIdx.x % 32 == 0) {
            chain.done = true;
        }
    }

private:
    static constexpr int kEnd = 0;

    const Span& span;
    uint32_t sequence, head;   // of the next whole chain, or, to be skipped, of the one before
    bool first, rest, skip;    // of the last chain and of the first one something is still to do

    __device__ __forceinline__ void step(const KernelParams& p) {
        if (++head == p.heads) {
            head = 0;
            ++sequence;
        }
    }

    // From one chunk to before another one, or to the end.
    __device__ __forceinline__ void take(const KernelParams& p, Chain& chain, uint32_t of_sequence, uint32_t of_head, int from, int to) const {
        const Rows rows = sequence_rows(p, of_sequence);
        if (threadIdx.x % 32 != 0)
            return;
        chain = {};
        chain.head = of_head;
        chain.state_offset = (static_cast<int64_t>(of_sequence) * p.heads + of_head) * (kDim * kDim);
        chain.first_row = rows.first + from * kChunk;
        chain.length = (to == kEnd ? rows.length : to * kChunk) - from * kChunk;
        chain.from = from == 0 ? From::kInitialState : From::kHandover;
        chain.to = to == kEnd ? To::kFinalState : To::kHandover;
    }
};

// Finds the n-th chain, for all warps; null behind the last one. By all lanes of the warp that is first to want it; the compiler sees that they
// agree. The first chain is found while the mbarriers are still being initialised.
template <class Walk, class Shared>
__device__ __forceinline__ const Chain* find_chain(const KernelParams& p, Shared& smem, Walk& walk, uint32_t n) {
    const Turn<kChains> turn(n);
    if (n > 0)
        mbarrier_wait(smem_address(&smem.chains_empty[turn.slot]), turn.parity ^ 1);   // passes in the first turn
    Chain& chain = smem.chains[turn.slot];
    walk.next(p, chain);
    __syncwarp();
    if (n == 0)
        meet_cluster();   // whether there is a chain or not
    mbarrier_arrive(smem_address(&smem.chains_ready[turn.slot]));
    return __any_sync(~0u, chain.done) ? nullptr : &chain;
}

// The same chain, for the other warps.
template <class Shared>
__device__ __forceinline__ const Chain* await_chain(Shared& smem, uint32_t n) {
    const Turn<kChains> turn(n);
    mbarrier_wait(smem_address(&smem.chains_ready[turn.slot]), turn.parity);
    const Chain* const chain = &smem.chains[turn.slot];
    return __any_sync(~0u, chain->done) ? nullptr : chain;
}

// The lane has done with it.
template <class Shared>
__device__ __forceinline__ void give_back_chain(Shared& smem, uint32_t n) {
    mbarrier_arrive(smem_address(&smem.chains_empty[Turn<kChains>(n).slot]));
}

}  // namespace flash_kda::sm90
