// The recurrence: the serial part, one warpgroup for kHalf of the value channels. Its state S [64 value channels, K] stays in
// fp32 accumulators from the first token to the last. A step, with S_b the bf16 copy of S (already in the A operand's order):
//
//   [R | O]' = S_b [-W | qd - Z W]' + v' [T | Z T]'      one chain of m64n32k16
//   S        = S diag(E) + R kr                           one m64n128k16
#pragma once

#include "fragments.h"
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

// v' of the warp's 16 value channels, as an A operand [16 channels, 16 tokens]. Tokens that are not the sequence's own become
// zeros: T and Z T are zero there, but a neighbour's NaN times zero is not.
__device__ __forceinline__ void load_v(const Tile& tile, int group, int warp, int lane, int valid, uint32_t (&v)[4]) {
    uint32_t x[4];
    ldmatrix_x4_trans(x, smem_address(&tile) + group * kTileHalfBytes + swizzled_block_offset(lane, 2 * warp));
    v[0] = x[0];   // transposing the block swaps its off-diagonal quarters
    v[1] = x[2];
    v[2] = x[1];
    v[3] = x[3];
    if (valid < kChunk) {
        for (int i = 0; i < 4; ++i) {
            const int token = 2 * (lane % 4) + i / 2 * 8;
            if (token >= valid)
                v[i] &= 0xffff0000u;
            if (token + 1 >= valid)
                v[i] &= 0x0000ffffu;
        }
    }
}

// O' [16 value channels, 16 tokens] of one warp, to out [tokens, 16 value channels]: through shared memory, where the warp alone
// transposes it, so that no other warp is waited for and each token's 32 bytes leave as one full sector.
__device__ __forceinline__ void store_out(const float* O, bf16* patch, bf16* out, int64_t row_stride, int lane, int valid) {
    // 16-byte unit u of token t lies at u ^ (t / 4 % 2): eight rows of 32 bytes then meet all banks.
    const auto unit = [](int token, int u) { return (2 * token + (u ^ (token / 4 % 2))) * 16; };
    const int stored_token = lane % 8 + lane / 16 * 8;
    __syncwarp();   // the previous chunk's patch has been read
    stmatrix_x4_trans(smem_address(patch) + unit(stored_token, lane / 8 % 2), pack_bf16(O[0], O[1]), pack_bf16(O[2], O[3]),
                      pack_bf16(O[4], O[5]), pack_bf16(O[6], O[7]));
    __syncwarp();
    const int token = lane / 2;
    const uint4 x = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(patch) + unit(token, lane % 2));
    if (token < valid)
        *reinterpret_cast<uint4*>(out + token * row_stride + lane % 2 * 8) = x;
}

__device__ __forceinline__ void recur_chain(const KernelParams& p, const Chain& chain, SharedStorage& smem, int group) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int r = lane / 4, c = lane % 4;
    const int value_channel = group * kHalf + warp * 16;
    const int64_t row_stride = static_cast<int64_t>(p.heads) * kDim;
    bf16* out = p.out + chain.first_row * row_stride + chain.head * kDim + value_channel;

    float S[kStateRegisters];
    load_state(p, chain, value_channel + r, c, S);

    RingCursor<kValueStages> value;
    RingCursor<kFactorStages> factor;
    for (int chunk = 0; chunk < chain.chunks(); ++chunk) {
        const int valid = chain.length - chunk * kChunk;

        uint32_t S_b[kStateRegisters / 2];
        for (int i = 0; i < kStateRegisters / 2; ++i)
            S_b[i] = pack_bf16(S[2 * i], S[2 * i + 1]);

        mbarrier_wait(smem.factor_full[factor.slot], factor.phase);
        const FactorStage& stage = smem.factors[factor.slot];
        uint32_t v[4];
        load_v(smem.v[value.slot], group, warp, lane, valid, v);   // landed before the chunk was prepared
        const uint64_t t = matrix_descriptor(stage.t, LayoutType::INTERLEAVE, kTColumnBytes, 128);
        const uint64_t w = matrix_descriptor(stage.w, LayoutType::B128, 0, 8 * 128);
        const uint64_t kr = matrix_descriptor(&stage.kr, LayoutType::B128, kTileHalfBytes, 8 * 128);

        float RO[16];   // R in the first half, O in the second
        fence_operands(RO);
        cute::warpgroup_arrive();
        wgmma<StepAtom>(RO, v, t, ScaleOut::Zero);
        for (int s = 0; s < kDim / 16; ++s)   // 16 channels are 32 bytes of a swizzled row
            wgmma<StepAtom>(RO, S_b + 4 * s, w + ((s / 4 * kWHalfBytes + s % 4 * 32) >> 4));
        cute::warpgroup_commit_batch();

        for (int j = 0; j < kDim / 8; j += 2) {
            const float4 e = *reinterpret_cast<const float4*>(&stage.e[c][2 * j]);
            S[4 * j] *= e.x, S[4 * j + 1] *= e.y, S[4 * j + 2] *= e.x, S[4 * j + 3] *= e.y;
            S[4 * j + 4] *= e.z, S[4 * j + 5] *= e.w, S[4 * j + 6] *= e.z, S[4 * j + 7] *= e.w;
        }

        cute::warpgroup_wait<0>();
        fence_operands(RO);

        uint32_t R[4];
        for (int i = 0; i < 4; ++i)
            R[i] = pack_bf16(RO[2 * i], RO[2 * i + 1]);
        fence_operands(S);
        cute::warpgroup_arrive();
        wgmma<UpdateAtom>(S, R, kr);
        cute::warpgroup_commit_batch();

        store_out(RO + 8, smem.out[group * 4 + warp], out, row_stride, lane, valid);
        out += kChunk * row_stride;

        cute::warpgroup_wait<0>();
        fence_operands(S);
        if (lane == 0)
            mbarrier_arrive(smem.factor_empty[factor.slot]);
        value.advance();
        factor.advance();
    }
    store_state(p, chain, value_channel + r, c, S);
}

}  // namespace flash_kda::sm90
