// The recurrence: the serial part, one warpgroup for kHalf of the value channels. Its state S [64 value channels, K] stays in
// fp32 accumulators from the first token to the last. A step, with S_b the bf16 copy of S (already in the A operand's order):
//
//   [R | O]' = S_b [-W | qd]' + v' [T | 0]'      one chain of m64n32k16
//   O'      += R' Z'                              one m64n16k16
//   S        = S diag(E) + R' kr                  one m64n128k16; S decays while the first products run
#pragma once

#include <cstddef>
#include <type_traits>

#include "kernel_params.h"
#include "ptx.h"
#include "ring.h"
#include "schedule.cuh"
#include "segments.cuh"
#include "smem.h"
#include "wgmma.h"

namespace flash_kda::sm90 {

// A lane's share of its warp's 16 rows of the state: rows r and r + 8, and of every 8 key channels 2 c and 2 c + 1.
// `visit` gets the index of the first of two neighbouring elements and of the first of the two registers that hold them.
template <class Visit>
__device__ __forceinline__ void for_each_state_pair(int half, Visit visit) {
    const int thread = thread_index() % kWarpgroup, row = half * kHalf + thread / 32 * 16 + thread % 32 / 4, c = thread % 4;
    for (int j = 0; j < kDim / 8; ++j)
        for (int h = 0; h < 2; ++h)
            visit((row + 8 * h) * kDim + 8 * j + 2 * c, 4 * j + 2 * h);
}

__device__ __forceinline__ void clear_state(float (&S)[kStateRegisters]) {
    for (float& x : S)
        x = 0.0f;
}

__device__ __forceinline__ void load_state(const KernelParams& p, const Chain& chain, int half, float (&S)[kStateRegisters]) {
    if (p.initial_state == nullptr) {
        clear_state(S);
    } else if (p.state_is_fp32) {
        const float* state = static_cast<const float*>(p.initial_state) + chain.state_offset;
        for_each_state_pair(half, [&](int element, int reg) {
            const float2 x = *reinterpret_cast<const float2*>(state + element);
            S[reg] = x.x;
            S[reg + 1] = x.y;
        });
    } else {
        const bf16* state = static_cast<const bf16*>(p.initial_state) + chain.state_offset;
        for_each_state_pair(half, [&](int element, int reg) {
            const uint32_t x = *reinterpret_cast<const uint32_t*>(state + element);
            S[reg] = low_bf16(x);
            S[reg + 1] = high_bf16(x);
        });
    }
}

__device__ __forceinline__ void store_state(const KernelParams& p, const Chain& chain, int half, const float (&S)[kStateRegisters]) {
    if (p.final_state == nullptr)
        return;
    if (p.state_is_fp32) {
        float* state = static_cast<float*>(p.final_state) + chain.state_offset;
        for_each_state_pair(half, [&](int element, int reg) {
            *reinterpret_cast<float2*>(state + element) = {S[reg], S[reg + 1]};
        });
    } else {
        bf16* state = static_cast<bf16*>(p.final_state) + chain.state_offset;
        for_each_state_pair(half, [&](int element, int reg) {
            *reinterpret_cast<uint32_t*>(state + element) = pack_bf16(S[reg], S[reg + 1]);
        });
    }
}

// A cut chain's state, between CTAs: a warp's part is read by the same warp of the neighbour.
__device__ __forceinline__ void leave_state(Handover& handover, uint64_t ticket, int half, const float (&S)[kStateRegisters]) {
    const int thread = thread_index() % kWarpgroup;
    for (int i = 0; i < kStateRegisters / 4; ++i)
        handover.state[half][i][thread] = {S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]};
    say_left(handover, ticket, half);
}

__device__ __forceinline__ void set_identity(int half, float (&S)[kStateRegisters]) {
    for_each_state_pair(half, [&](int element, int reg) {
        S[reg] = element % (kDim + 1) == 0 ? 1.0f : 0.0f;
        S[reg + 1] = (element + 1) % (kDim + 1) == 0 ? 1.0f : 0.0f;
    });
}

// A state without tokens keeps its bits on its way through.
__device__ __forceinline__ bool passes_through(const Chain& chain) {
    return chain.length == 0 && chain.from == From::kInitialState && chain.to == To::kFinalState;
}

// Rather than kStateUp times too small.
__device__ __forceinline__ bool in_user_units(const Chain& chain) {
    return (chain.from == From::kInitialState || chain.from == From::kIdentity) && !passes_through(chain);
}

__device__ __forceinline__ void to_user_units(float (&S)[kStateRegisters]) {
    for (float& x : S)
        x *= kStateUp;
}

// v' of the warp's 16 value channels, as an A operand [16 channels, 16 tokens]. Transposing swaps a block's off-diagonal quarters, so
// lanes 8 to 23 ask for them the other way round.
__device__ __forceinline__ uint32_t v_offset(int warp, int lane) {
    const int token = lane % 8 + lane / 16 * 8, unit = 2 * warp + lane / 8 % 2;
    return token * 128 + ((unit ^ (token % 8)) << 4);
}

// Takes O' [16 value channels, 16 tokens] of one warp to out [tokens, 16 value channels]: through shared memory, where the warp
// alone transposes it, so that no other warp is waited for and each token's 32 bytes leave as one full sector.
class OutputWriter {
public:
    __device__ OutputWriter(bf16* patch, int64_t row_stride, int lane)
        : token(lane / 2), chunk_stride(kChunk * row_stride), lane_offset(token * row_stride + lane % 2 * 8) {
        store_address = resident(patch_address(patch, lane % 8 + lane / 16 * 8, lane / 8 % 2));
        load_address = resident(patch_address(patch, token, lane % 2));
    }

    // To a chain's first token, less a chunk: `store` is called once more than there are chunks.
    __device__ __forceinline__ void seek(bf16* out) { destination = out + lane_offset - chunk_stride; }

    // The next chunks' outputs, as bf16 pairs in accumulator order,
    template <int kCount>
    __device__ __forceinline__ void put(const uint32_t (&O)[kCount][4]) const {
        __syncwarp();   // what stood in the patch has been read
        for (int chunk = 0; chunk < kCount; ++chunk)
            stmatrix_x4_trans(store_address + chunk * kPatchBytes, O[chunk]);
    }

    // and the lane's unit of each, for `store` a little later.
    template <int kCount>
    __device__ __forceinline__ void take(uint4 (&x)[kCount]) const {
        __syncwarp();   // they are there
        for (int chunk = 0; chunk < kCount; ++chunk)
            x[chunk] = load_shared_16_bytes(load_address + chunk * kPatchBytes);
    }

    // Only the first `valid` tokens.
    __device__ __forceinline__ void store(const uint4& x, int valid) {
        if (token < valid)
            *reinterpret_cast<uint4*>(destination) = x;
        destination += chunk_stride;
    }

private:
    static constexpr int kPatchBytes = kChunk * 16 * 2;
    int token;
    int64_t chunk_stride, lane_offset;
    uint32_t store_address, load_address;
    bf16* destination;
};

// The outputs, some at least, of a segment that was done from zero, O' += S Y', with the state before it: see segments.cuh. `number` of the next
// stage of the CTA's own, and `release` gives one back.
template <class Release>
__device__ __forceinline__ void correct(SharedStorage& smem, const Chain& chain, uint32_t stages_sixteenth, uint32_t number, OutputWriter& writer,
                                        Release release, const float (&S)[kStateRegisters]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int corrected = chain.corrected;
    uint32_t S_b[kStateRegisters / 2];
    for (int i = 0; i < kStateRegisters / 2; ++i)
        S_b[i] = pack_bf16(S[2 * i], S[2 * i + 1]);
    uint32_t before[2][4];   // the next piece's outputs, of two chunks
    const uint32_t before_address = smem_address(smem.stages[0].g) + v_offset(warp, lane);
    const auto await_piece = [&](uint32_t n) {
        const Turn<kOwnStages> own(n);
        mbarrier_wait(smem_address(&smem.ready[own.slot]), own.parity);
        for (int chunk = 0; chunk < 2; ++chunk)
            ldmatrix_x4_trans(before[chunk], before_address + own.slot * sizeof(Stage) + chunk * kHalfTileBytes);
    };
    const auto store = [&](int left) {   // the last piece
        uint4 x[2];
        writer.take(x);
        for (int chunk = 0; chunk < 2; ++chunk)
            writer.store(x[chunk], left - chunk * kChunk);
    };
    const uint32_t begin = number, end = number + correction_pieces(chain);
    await_piece(number);
    while (number != end) {
        const uint32_t slot = __reduce_max_sync(~0u, Turn<kOwnStages>(number).slot);   // the compiler sees that lanes agree
        float O[16];
        for (int i = 0; i < 8; ++i) {
            O[2 * i] = low_bf16(before[i / 4][i % 4]) / kStateUp;
            O[2 * i + 1] = high_bf16(before[i / 4][i % 4]) / kStateUp;
        }
        const MatrixDescriptor Y =
            matrix_descriptor(stages_sixteenth + slot * (sizeof(Stage) / 16) + offsetof(Stage, kq) / 16, Swizzle::k128Bytes, 0, 8 * 128);
        fence_operands(O);
        cute::warpgroup_arrive();
        for (int s = 0; s < kBlocks; ++s)
            wgmma<StepAtom>(O, S_b + 4 * s, Y + ((s / 4 * 2 * kHalfTileBytes + s % 4 * 32) >> 4));
        cute::warpgroup_commit_batch();
        // Meanwhile the last piece goes out, and the next one is asked for.
        if (number != begin)
            store(kCorrected);
        ++number;
        if (number != end)
            await_piece(number);
        cute::warpgroup_wait<0>();
        fence_operands(O);
        release(slot);
        uint32_t done[2][4];
        for (int i = 0; i < 8; ++i)
            done[i / 4][i % 4] = pack_bf16(O[2 * i] * kStateUp, O[2 * i + 1] * kStateUp);
        writer.put(done);
    }
    store((corrected - 1) % kCorrected + 1);
}

template <Sharing kSharing>
__device__ __forceinline__ void recur_chains(const KernelParams& p, SharedStorage& smem) {
    constexpr bool kSegments = kSharing == Sharing::kSegments;
    const auto rank = [] { return static_cast<int>(blockIdx.x % kPair); };   // and half of the value channels
    Handover* const behind_span = p.workspace.handovers + blockIdx.x / kPair;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4;
    const uint32_t base = resident(smem_address(&smem));
    const auto address = [&](const void* of) -> uint32_t {
        return base + static_cast<uint32_t>(static_cast<const char*>(of) - reinterpret_cast<const char*>(&smem));
    };
    struct Places {
        OutputWriter writer;
        uint32_t v, e, out_scale;   // of stage 0; the others follow at even distances
    };
    const auto find_places = [&](bool values) {
        return Places{OutputWriter(smem.out[warp][0].data, static_cast<int64_t>(p.heads) * kDim, lane),
                      resident(values ? smem_address(smem.values) + v_offset(warp, lane) : smem_address(smem.zeros)),
                      resident(smem_address(smem.small[0].e[c])), resident(smem_address(smem.small[0].out_scale) + c * 8)};
    };
    Places places = find_places(true);
    // Here and below the reductions tell the compiler that lanes agree; uniform registers then hold what says where things are.
    const uint32_t stages_sixteenth = __reduce_max_sync(~0u, in_sixteenths(smem_address(smem.stages)));
    const uint32_t small_sixteenth = __reduce_max_sync(~0u, in_sixteenths(smem_address(smem.small)));

    const uint32_t empty_here = resident(address_in_cta(smem_address(smem.empty), rank()));
    const uint32_t empty_there = resident(address_in_cta(smem_address(smem.empty), 1 - rank()));
    const uint32_t first_lane = resident<uint32_t>(lane == 0);
    const uint32_t free_there = resident(address_in_cta(smem_address(smem.free), 1 - rank()));
    const auto release_piece = [&](uint32_t slot) { mbarrier_arrive_in_cluster(empty_here + slot * 8, true); };   // nobody there has it

    // Without a bound there are no gates. And behind a branch the decay stays between the products and the wait for them: ptxas would let
    // it sink below.
    const bool decays = p.lower_bound < 0.0f;
    uint32_t number = 0, pieces = 0, values_number = 0;   // chunks, pieces and chunks with values so far
    float S[kStateRegisters];
    meet_cluster();
    for (uint32_t n = 0; const Chain* next = await_chain(smem, n); give_back_chain(smem, n++)) {
        const Chain& chain = *next;
        const auto outputs_of = [&](bf16* out, int64_t row) -> bf16* {
            return out + (row * p.heads + chain.head) * kDim + rank() * kHalf + warp * 16;
        };
        bool values = true;
        if constexpr (kSegments) {
            if (chain.from == From::kSummaries) {
                const uint32_t piece = (number + 1 - rank()) / kPair + pieces;
                compose(p, smem, chain, piece, release_piece, S);
                if (chain.corrected > 0) {
                    places = find_places(true);   // a composition leaves them no registers
                    places.writer.seek(outputs_of(p.out, chain.first_row + kChunk));
                    correct(smem, chain, stages_sixteenth, piece + chain.compositions * kSummaryPieces, places.writer, release_piece, S);
                }
                pieces += pieces_of(chain);
                if (chain.to == To::kFinalState) {
                    to_user_units(S);
                    store_state(p, chain, rank(), S);
                }
                continue;   // it has no chunks, and to see that below takes half a microsecond
            }
            values = __any_sync(~0u, has_values(chain));
            places = find_places(values);
        }
        if (chain.from == From::kInitialState) {
            load_state(p, chain, rank(), S);
        } else if (!kSegments) {
            uint64_t* const left = fetch_state(behind_span[-1], p.workspace.ticket, rank(), S);
            if (lane == 0)
                count_fetch(left, p.workspace.ticket, kRecurrenceWarps);
        } else if (chain.from == From::kIdentity) {
            set_identity(rank(), S);
        } else if (chain.from == From::kZero) {
            clear_state(S);
        }
        if (in_user_units(chain))
            for (float& x : S)
                x /= kStateUp;
        places.writer.seek(outputs_of(kSegments && !values ? p.Y : p.out, chain.first_row));
        uint32_t O[1][4] = {};   // of the previous chunk, whose way out is hidden behind this chunk's products,
        int to_store = 0;     // and how many tokens it has
        const int chunks = __reduce_max_sync(~0u, chain.chunks());
        number = __reduce_max_sync(~0u, number);
        pieces = __reduce_max_sync(~0u, pieces);
        values_number = __reduce_max_sync(~0u, values_number);

        // Where it is said that a chunk, prepared here or there, and its values have come. To ask early hides what the question takes.
        struct Arrival {
            uint32_t ready, ready_parity, values_loaded, values_parity;
        };
        const auto arrival = [&](bool here) {
            const Turn<kOwnStages> own(number / kPair + pieces);
            const Turn<kMailStages> mail(number / kPair);
            const Turn<kValueStages> turn(values_number);
            return Arrival{address(smem.ready) + (here ? own.slot : kOwnStages + mail.slot) * 8, here ? own.parity : mail.parity,
                           address(smem.values_loaded) + turn.slot * 8, turn.parity};
        };
        const auto await = [&](const Arrival& next, bool is_ready, bool has_come) {
            if (!has_come && (!kSegments || values))
                mbarrier_wait(next.values_loaded, next.values_parity);
            if (!is_ready)
                mbarrier_wait(next.ready, next.ready_parity);
        };
        const uint32_t end = number + chunks;
        const auto step = [&](auto prepared_here) {   // of a chunk that has come
            constexpr bool kHere = prepared_here;
            const Turn<kOwnStages> own(number / kPair + pieces);   // here or there
            const Turn<kMailStages> mail(number / kPair);
            const Turn<kValueStages> values_turn(values_number);
            const uint32_t slot = kHere ? own.slot : kOwnStages + mail.slot;
            const uint32_t stage_sixteenth = stages_sixteenth + slot * (sizeof(Stage) / 16), small = slot * sizeof(SmallFactors);
            uint32_t v[4];
            ldmatrix_x4_trans(v, places.v + (!kSegments || values ? values_turn.slot * kHalfTileBytes : 0));
            float4 e[kDim / 16];   // comes while S is packed: beside the products it would slow them down
            for (int j = 0; j < kDim / 16; ++j)
                e[j] = load_shared_float4(places.e + small + j * 16);
            uint32_t S_b[kStateRegisters / 2];
            for (int i = 0; i < kStateRegisters / 2; ++i)
                S_b[i] = pack_bf16(S[2 * i], S[2 * i + 1]);

            const uint32_t factors_sixteenth = small_sixteenth + small / 16;
            const MatrixDescriptor w = matrix_descriptor(stage_sixteenth + offsetof(Stage, kq) / 16, Swizzle::k128Bytes, 0, 8 * 128);
            const MatrixDescriptor kr = matrix_descriptor(stage_sixteenth + offsetof(Stage, g) / 16, Swizzle::k128Bytes, kHalfTileBytes, 8 * 128);
            const MatrixDescriptor t = matrix_descriptor(factors_sixteenth + offsetof(SmallFactors, t) / 16, Swizzle::kNone, kTColumnBytes, 128);
            const MatrixDescriptor z = matrix_descriptor(factors_sixteenth + offsetof(SmallFactors, z) / 16, Swizzle::kNone, kZColumnBytes, 128);
            float RO[16];   // R in the first half, O in the second
            fence_operands(RO);
            cute::warpgroup_arrive();
            wgmma<StepAtom>(RO, v, t, ScaleOut::Zero);
            for (int s = 0; s < kBlocks; ++s)   // 16 channels are 32 bytes of a swizzled row
                wgmma<StepAtom>(RO, S_b + 4 * s, w + ((s / 4 * 2 * kHalfTileBytes + s % 4 * 32) >> 4));
            cute::warpgroup_commit_batch();

            ++number;
            values_number += !kSegments || values;
            const Arrival next = arrival(!kHere);
            const bool is_ready = mbarrier_test(next.ready, next.ready_parity);
            const bool has_come = mbarrier_test(next.values_loaded, next.values_parity);   // nobody looks where there are no values
            if (decays)
                for (int j = 0; j < kDim / 16; ++j) {
                    float* const s = S + 8 * j;
                    s[0] *= e[j].x, s[1] *= e[j].y, s[2] *= e[j].x, s[3] *= e[j].y, s[4] *= e[j].z, s[5] *= e[j].w, s[6] *= e[j].z, s[7] *= e[j].w;
                }
            uint4 out[1];
            places.writer.put(O);
            places.writer.take(out);
            fence_operands(S);   // before, not after, the wait
            cute::warpgroup_wait<0>();
            fence_operands(RO);
            uint32_t R[4];
            float O_new[8];
            for (int i = 0; i < 4; ++i)
                R[i] = pack_bf16(RO[2 * i], RO[2 * i + 1]);
            for (int i = 0; i < 8; ++i)
                O_new[i] = RO[8 + i];
            fence_operands(O_new);
            cute::warpgroup_arrive();
            wgmma<UpdateAtom>(S, R, kr);
            wgmma<OutputAtom>(O_new, R, z);
            cute::warpgroup_commit_batch();
            const float2 scale_low = load_shared_float2(places.out_scale + small), scale_high = load_shared_float2(places.out_scale + small + 32);
            places.writer.store(out[0], to_store);
            to_store = kChunk;
            if (number != end)
                await(next, is_ready, has_come);
            cute::warpgroup_wait<0>();
            fence_operands(S);
            fence_operands(O_new);
            if (kHere) {
                mbarrier_arrive_in_cluster(empty_here + own.slot * 8, true);
            } else {   // of the other CTA's memory only the copy engine has read
                __syncwarp();   // every lane has read the copy
                mbarrier_arrive_in_cluster(empty_there + own.slot * 8, first_lane != 0);
                mbarrier_arrive_in_cluster(free_there + mail.slot * 8, first_lane != 0);
            }
            if (!kSegments || values)
                mbarrier_arrive(address(smem.values_empty) + values_turn.slot * 8);
            for (int i = 0; i < 2; ++i) {
                O[0][i] = pack_bf16(O_new[2 * i] * scale_low.x, O_new[2 * i + 1] * scale_low.y);
                O[0][2 + i] = pack_bf16(O_new[4 + 2 * i] * scale_high.x, O_new[5 + 2 * i] * scale_high.y);
            }
        };
        const auto is_here = [&]() -> bool { return number % kPair == static_cast<uint32_t>(rank()); };
        if (chunks > 0)
            await(arrival(is_here()), false, false);
        int memory = chunks;   // before an M is as good as zero
        while (number != end) {
            const bool looks = kSegments && !values && memory == chunks;
            const uint32_t stop = number + (looks ? min(end - number, static_cast<uint32_t>(kLookChunks)) : end - number);
            bool begin_there = !is_here();
            while (number != stop) {   // by turns
                if (!begin_there)
                    step(std::true_type());
                begin_there = false;
                if (number != stop)
                    step(std::false_type());
            }
            if (looks && !remembers(S))
                memory = chunks - (end - number);
        }
        if (chunks > 0) {
            uint4 out[1];
            places.writer.put(O);
            places.writer.take(out);
            places.writer.store(out[0], min(kChunk, chain.length - (chunks - 1) * kChunk));
        }
        if (chain.to == To::kFinalState) {
            if (!passes_through(chain))
                to_user_units(S);
            store_state(p, chain, rank(), S);
        } else if constexpr (!kSegments) {
            leave_state(*behind_span, p.workspace.ticket, rank(), S);
        } else if (chain.to == To::kB) {
            leave_B(*chain.handover, p.workspace.ticket, rank(), S);
        } else if (chain.to == To::kM) {
            leave_M(*chain.handover, p.workspace.ticket, rank(), smem.out[warp], memory, S);
        } else if (chain.to != To::kNowhere) {
            leave_state(*chain.handover, p.workspace.ticket, rank(), S);
        }
    }
}

}  // namespace flash_kda::sm90
