// The recurrence: the serial part, one warpgroup for kHalf of the value channels. Its state S [64 value channels, K] stays in
// fp32 accumulators from the first token to the last. A step, with S_b the bf16 copy of S (already in the A operand's order):
//
//   [R | O]' = S_b [-W | qd]' + v' [T | 0]'      one chain of m64n32k16
//   O'      += R' Z'                              one m64n16k16
//   S        = (S + R' ki) diag(E)                one m64n128k16
#pragma once

#include "kernel_params.h"
#include "ptx.h"
#include "ring.h"
#include "smem.h"
#include "wgmma.h"

namespace flash_kda::sm90 {

constexpr int kStateRegisters = kHalf * kDim / kWarpgroup;

// A lane's share of its warp's 16 rows of the state: rows r and r + 8, and of every 8 key channels 2 c and 2 c + 1.
// `visit` gets the index of the first of two neighbouring elements and of the first of the two registers that hold them.
template <class Visit>
__device__ __forceinline__ void for_each_state_pair(int row, int c, Visit visit) {
    for (int j = 0; j < kDim / 8; ++j)
        for (int h = 0; h < 2; ++h)
            visit((row + 8 * h) * kDim + 8 * j + 2 * c, 4 * j + 2 * h);
}

__device__ __forceinline__ void load_state(const KernelParams& p, const Chain& chain, int row, int c, float (&S)[kStateRegisters]) {
    if (p.initial_state == nullptr) {
        for (float& x : S)
            x = 0.0f;
    } else if (p.state_is_fp32) {
        const float* state = static_cast<const float*>(p.initial_state) + chain.state_offset;
        for_each_state_pair(row, c, [&](int element, int reg) {
            const float2 x = *reinterpret_cast<const float2*>(state + element);
            S[reg] = x.x;
            S[reg + 1] = x.y;
        });
    } else {
        const bf16* state = static_cast<const bf16*>(p.initial_state) + chain.state_offset;
        for_each_state_pair(row, c, [&](int element, int reg) {
            const uint32_t x = *reinterpret_cast<const uint32_t*>(state + element);
            S[reg] = low_bf16(x);
            S[reg + 1] = high_bf16(x);
        });
    }
}

__device__ __forceinline__ void store_state(const KernelParams& p, const Chain& chain, int row, int c, const float (&S)[kStateRegisters]) {
    if (p.final_state == nullptr)
        return;
    if (p.state_is_fp32) {
        float* state = static_cast<float*>(p.final_state) + chain.state_offset;
        for_each_state_pair(row, c, [&](int element, int reg) {
            *reinterpret_cast<float2*>(state + element) = {S[reg], S[reg + 1]};
        });
    } else {
        bf16* state = static_cast<bf16*>(p.final_state) + chain.state_offset;
        for_each_state_pair(row, c, [&](int element, int reg) {
            *reinterpret_cast<uint32_t*>(state + element) = pack_bf16(S[reg], S[reg + 1]);
        });
    }
}

// v' of the warp's 16 value channels, as an A operand [16 channels, 16 tokens].
__device__ __forceinline__ void load_v(const HalfTile& tile, int warp, int lane, uint32_t (&v)[4]) {
    uint32_t x[4];
    ldmatrix_x4_trans(x, smem_address(&tile) + lane % 16 * 128 + (((2 * warp + lane / 16) ^ (lane % 8)) << 4));
    v[0] = x[0];   // transposing the block swaps its off-diagonal quarters
    v[1] = x[2];
    v[2] = x[1];
    v[3] = x[3];
}

// Takes O' [16 value channels, 16 tokens] of one warp to out [tokens, 16 value channels]: through shared memory, where the warp
// alone transposes it, so that no other warp is waited for and each token's 32 bytes leave as one full sector.
class OutputWriter {
public:
    __device__ OutputWriter(bf16* patch, bf16* out, int64_t row_stride, int lane) : token(lane / 2), chunk_stride(kChunk * row_stride) {
        // 16-byte unit u of token t lies at u ^ (t / 4 % 2): eight rows of 32 bytes then meet all banks.
        const auto unit = [&](int t, int u) { return smem_address(patch) + (2 * t + (u ^ (t / 4 % 2))) * 16; };
        store_address = unit(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        load_address = unit(token, lane % 2);
        destination = out + token * row_stride + lane % 2 * 8;
    }

    // The next chunk's output, as bf16 pairs in accumulator order; of its tokens only the first `valid` are written.
    __device__ __forceinline__ void write(const uint32_t (&O)[4], int valid) {
        __syncwarp();   // the previous chunk's patch has been read
        stmatrix_x4_trans(store_address, O);
        __syncwarp();
        const uint4 x = load_shared_16_bytes(load_address);
        if (token < valid)
            *reinterpret_cast<uint4*>(destination) = x;
        destination += chunk_stride;
    }

private:
    const int token;
    const int64_t chunk_stride;
    uint32_t store_address, load_address;
    bf16* destination;
};

__device__ __forceinline__ void recur_chain(const KernelParams& p, const Chain& chain, SharedStorage& smem, int group) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int c = lane % 4;
    const int value_channel = group * kHalf + warp * 16;
    const int64_t row_stride = static_cast<int64_t>(p.heads) * kDim;
    OutputWriter writer(smem.out[group * 4 + warp], p.out + chain.first_row * row_stride + chain.head * kDim + value_channel, row_stride,
                        lane);

    float S[kStateRegisters];
    load_state(p, chain, value_channel + lane / 4, c, S);
    if (chain.length > 0)   // a state that only passes through keeps its bits
        for (float& x : S)
            x /= kStateUp;

    RingCursor<kStages> ring;
    uint32_t O[4];   // of the previous chunk, whose way out is hidden behind this chunk's products
    const int chunks = chain.chunks();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        uint32_t S_b[kStateRegisters / 2];
        for (int i = 0; i < kStateRegisters / 2; ++i)
            S_b[i] = pack_bf16(S[2 * i], S[2 * i + 1]);

        mbarrier_wait(smem.ready[ring.slot], ring.phase);
        const Stage& stage = smem.stages[ring.slot];
        const SmallFactors& small = smem.small[ring.slot];
        uint32_t v[4];
        load_v(stage.v[group], warp, lane, v);   // landed before the chunk was prepared

        const MatrixDescriptor t = matrix_descriptor(small.t, LayoutType::INTERLEAVE, kTColumnBytes, 128);
        const MatrixDescriptor w = matrix_descriptor(stage.kq, LayoutType::B128, 0, 8 * 128);
        const MatrixDescriptor z = matrix_descriptor(small.z, LayoutType::INTERLEAVE, kZColumnBytes, 128);
        const MatrixDescriptor ki = matrix_descriptor(stage.g, LayoutType::B128, kHalfTileBytes, 8 * 128);

        float RO[16];   // R in the first half, O in the second
        fence_operands(RO);
        cute::warpgroup_arrive();
        wgmma<StepAtom>(RO, v, t, ScaleOut::Zero);
        for (int s = 0; s < kBlocks; ++s)   // 16 channels are 32 bytes of a swizzled row
            wgmma<StepAtom>(RO, S_b + 4 * s, w + ((s / 4 * 2 * kHalfTileBytes + s % 4 * 32) >> 4));
        cute::warpgroup_commit_batch();

        if (chunk > 0)
            writer.write(O, kChunk);

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
        wgmma<UpdateAtom>(S, R, ki);
        wgmma<OutputAtom>(O_new, R, z);
        cute::warpgroup_commit_batch();
        float4 e[kDim / 16];
        for (int j = 0; j < kDim / 16; ++j)
            e[j] = *reinterpret_cast<const float4*>(&small.e[c][4 * j]);
        const float2 scale_low = *reinterpret_cast<const float2*>(&small.out_scale[2 * c]);
        const float2 scale_high = *reinterpret_cast<const float2*>(&small.out_scale[2 * c + 8]);
        cute::warpgroup_wait<0>();
        fence_operands(S);
        fence_operands(O_new);
        for (int j = 0; j < kDim / 16; ++j) {
            S[8 * j] *= e[j].x, S[8 * j + 1] *= e[j].y, S[8 * j + 2] *= e[j].x, S[8 * j + 3] *= e[j].y;
            S[8 * j + 4] *= e[j].z, S[8 * j + 5] *= e[j].w, S[8 * j + 6] *= e[j].z, S[8 * j + 7] *= e[j].w;
        }
        for (int i = 0; i < 2; ++i) {
            O[i] = pack_bf16(O_new[2 * i] * scale_low.x, O_new[2 * i + 1] * scale_low.y);
            O[2 + i] = pack_bf16(O_new[4 + 2 * i] * scale_high.x, O_new[5 + 2 * i] * scale_high.y);
        }
        __syncwarp();   // every lane has read
        if (lane == 0)
            mbarrier_arrive(smem.empty[ring.slot]);
        ring.advance();
    }
    if (chunks > 0)
        writer.write(O, chain.length - (chunks - 1) * kChunk);
    if (chain.length > 0)
        for (float& x : S)
            x *= kStateUp;
    store_state(p, chain, value_channel + lane / 4, c, S);
}

}  // namespace flash_kda::sm90
