// Prepare: from a chunk's q, k, g and beta to the factors of its step, in place, by one warp.
//
//   k^, q^   unit keys and queries                                G     inclusive cumulative sum of the gates, base 2
//   kd = k^ 2^G    ki = k^ 2^-G    qd = q^ 2^G                    kr = k^ 2^(G_end - G)    E = 2^G_end
//   T = (I + tril(diag(beta) kd ki', -1))^-1 diag(beta)           Z = tril(qd ki')
//   W = T kd
//
// and what leaves is [-W | qd - Z W], -[T | Z T], kr and E; the scale waits until the output. Channels go by in blocks of 16.
// Registers hold [16, 16] blocks in the mma fragment order: lane 4 r + c has rows r and r + 8, columns 2 c, 2 c + 1, 2 c + 8 and
// 2 c + 9; accumulators of two neighbouring [16, 8] products have just that order, so products chain in registers.
#pragma once

#include "kernel_params.h"
#include "load.cuh"
#include "ptx.h"
#include "ring.h"
#include "smem.h"

namespace flash_kda::sm90 {

class Preparer {
public:
    __device__ Preparer(const KernelParams& p, const Chain& chain, const SharedStorage& smem, PrepareScratch& scratch)
        : scratch(scratch),
          gate_offset(smem.gate_offset),
          gate_slope(find_gate_slope(p, chain)),
          // No bound of zero, so that its inverse times 2^y is never infinity times zero; so small a gate is zero all the same.
          inverse_bound(resident(rcp_approx(fminf(p.lower_bound * kLog2E, -1e-36f)))),
          lane(threadIdx.x % 32),
          r(lane / 4),
          c(lane % 4),
          first_block_offset(lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4)) {
        for (int i = 0; i < 4; ++i) {
            const int row = r + i % 2 * 8, token = 2 * c + i / 2;
            ones_first[i] = resident(token <= row ? 1.0f : 0.0f);
            ones_last[i] = resident(token + 8 <= row ? 1.0f : 0.0f);
        }
    }

    // The same value, in a register of its own from here on: the compiler would rather make it anew, or copy it from a uniform
    // register, before every use.
    static __device__ float resident(float x) { return __shfl_sync(~0u, x, threadIdx.x % 32); }

    // gate = bound / (1 + 2^y), y = gate_slope * g + gate_offset[channel]. Never a slope of zero: see clear_tail.
    static __device__ float find_gate_slope(const KernelParams& p, const Chain& chain) {
        return fminf(-expf(p.A_log[chain.head]) * kLog2E, -1e-30f);
    }

    static __device__ void fill_gate_offset(const KernelParams& p, const Chain& chain, SharedStorage& smem) {
        for (int channel = threadIdx.x; channel < kDim; channel += kThreads)
            smem.gate_offset[channel] = find_gate_slope(p, chain) * p.dt_bias[chain.head * kDim + channel];
    }

    // `valid` tokens of the chunk are the sequence's own; the rest must leave no trace. Lane l holds token l's beta.
    __device__ __forceinline__ void prepare(Stage& stage, SmallFactors& small, float beta_logit, int valid) const {
        if (valid < kChunk)
            clear_tail(stage, valid);
        float q_norm[2], k_norm[2];
        inverse_norms(stage, q_norm, k_norm);
        float L[2][4] = {}, Z[2][4] = {};
#pragma unroll 1
        for (int block = 0; block < kBlocks; ++block)
            elementwise(stage, small, block, q_norm, k_norm, L, Z);
        solve(small, L, Z, lane < valid ? rcp_approx(1.0f + exp2_approx(-kLog2E * beta_logit)) : 0.0f);
        products(stage, small);
    }

private:
    PrepareScratch& scratch;
    const float* gate_offset;
    const float gate_slope, inverse_bound;
    const int lane, r, c;
    const uint32_t first_block_offset;
    float ones_first[4], ones_last[4];   // ones on and under the diagonal of [16, 16]: columns of the first and last 8 tokens

    // ldmatrix.x4 and stmatrix.x4 take a [16, 16] block as its quarters (rows 0-7, columns 0-7), (rows 8-15, columns 0-7), (rows 0-7,
    // columns 8-15), (rows 8-15, columns 8-15), lane l giving row l % 8 of quarter l / 8: the register order of an mma A fragment.
    // In a half tile, where a block begins at unit 2 (block % 4) before the swizzle.
    __device__ __forceinline__ uint32_t block_offset(int block) const { return first_block_offset ^ (block % 4 * 32); }

    // Rows past the sequence are its neighbour's. k^ = q^ = v = 0, and a logit whose gate is 0, leave the state and the other rows alone.
    __device__ __forceinline__ void clear_tail(Stage& stage, int valid) const {
        constexpr uint32_t kMinusInfinity = 0xff80ff80;   // twice, in bf16
        const uint32_t address = smem_address(&stage) + lane / 8 * kHalfTileBytes + lane % 8 * 16;
        for (int row = valid; row < kChunk; ++row) {
            store_shared_16_bytes(address + row * 128, {0, 0, 0, 0});   // k and q
            const uint32_t x = lane < 16 ? kMinusInfinity : 0;          // g and v
            store_shared_16_bytes(address + sizeof(Stage::kq) + row * 128, {x, x, x, x});
        }
        __syncwarp();
    }

    // 1 / norms of rows r and r + 8. The squares are the diagonals of q q' and k k'.
    __device__ __forceinline__ void inverse_norms(const Stage& stage, float (&q_norm)[2], float (&k_norm)[2]) const {
        float squares[2][2][4] = {};   // [k, q][with rows 0-7, with rows 8-15]
        for (int block = 0; block < kBlocks; ++block)
            for (int tensor = 0; tensor < 2; ++tensor) {
                uint32_t x[4];
                ldmatrix_x4(x, smem_address(&stage.kq[block / 4][tensor]) + block_offset(block));
                mma_m16n8k16(squares[tensor][0], x, x[0], x[2]);
                mma_m16n8k16(squares[tensor][1], x, x[1], x[3]);
            }
        const int owner = 4 * r + r / 2;   // of the diagonal's elements in rows r and r + 8
        const auto inverse_norm = [&](float even, float odd) {
            return rsqrt_approx(__shfl_sync(~0u, r % 2 ? odd : even, owner) + kNormEpsilon);
        };
        k_norm[0] = inverse_norm(squares[0][0][0], squares[0][0][1]);
        k_norm[1] = inverse_norm(squares[0][1][2], squares[0][1][3]);
        q_norm[0] = inverse_norm(squares[1][0][0], squares[1][0][1]);
        q_norm[1] = inverse_norm(squares[1][1][2], squares[1][1][3]);
    }

    // The cumulated gates of 8 channels, as an accumulator: [16, 16] ones on and under the diagonal @ gate, on the tensor cores. Its
    // columns are taken in the order of the tokens that a lane holds. tf32 cuts 2^-11 off a gate, which next to bf16 factors does
    // not show.
    __device__ __forceinline__ void cumulate(uint32_t first_tokens, uint32_t last_tokens, int channel, float (&G)[4]) const {
        const float offset = gate_offset[channel];
        const float logits[4] = {low_bf16(first_tokens), high_bf16(first_tokens), low_bf16(last_tokens), high_bf16(last_tokens)};
        float gate[4];   // tokens 2 c, 2 c + 1, 2 c + 8, 2 c + 9
        for (int i = 0; i < 4; ++i) {
            const float y = fmaf(gate_slope, logits[i], offset);
            gate[i] = rcp_approx(fmaf(exp2_approx(y), inverse_bound, inverse_bound));
        }
        for (float& x : G)
            x = 0.0f;
        mma_m16n8k8_tf32(G, ones_first, gate[0], gate[1]);
        mma_m16n8k8_tf32(G, ones_last, gate[2], gate[3]);
    }

    // One block: kd, qd and kr in place of k, q and g; E; the block's share of L = kd ki' and Z = qd ki'.
    __device__ __forceinline__ void elementwise(Stage& stage, SmallFactors& small, int block, const float (&q_norm)[2],
                                                const float (&k_norm)[2], float (&L)[2][4], float (&Z)[2][4]) const {
        const uint32_t k_address = smem_address(&stage.kq[block / 4][0]) + block_offset(block);
        const uint32_t q_address = k_address + kHalfTileBytes;
        const uint32_t g_address = smem_address(&stage.g[block / 4]) + block_offset(block);
        uint32_t g[4], k[4], q[4];
        ldmatrix_x4_trans(g, g_address);
        ldmatrix_x4(k, k_address);
        ldmatrix_x4(q, q_address);

        uint32_t kd[4], ki[4], qd[4], kr[4];
        float E[2][2];
        for (int j = 0; j < 2; ++j) {
            float G[4], up[4];
            cumulate(g[2 * j], g[2 * j + 1], block * 16 + j * 8 + r, G);
            for (int i = 0; i < 4; ++i)
                up[i] = exp2_approx(G[i]);
            for (int i = 0; i < 2; ++i)   // row 15 closes the chunk
                E[j][i] = __shfl_sync(~0u, up[2 + i], 28 + c);
            for (int h = 0; h < 2; ++h) {
                const int x = 2 * j + h;
                const float up0 = up[2 * h], up1 = up[2 * h + 1];
                const float k0 = low_bf16(k[x]) * k_norm[h], k1 = high_bf16(k[x]) * k_norm[h];
                const float ki0 = k0 * exp2_approx(-G[2 * h]), ki1 = k1 * exp2_approx(-G[2 * h + 1]);
                kd[x] = pack_bf16(k0 * up0, k1 * up1);
                ki[x] = pack_bf16(ki0, ki1);
                kr[x] = pack_bf16(ki0 * E[j][0], ki1 * E[j][1]);
                qd[x] = pack_bf16(low_bf16(q[x]) * q_norm[h] * up0, high_bf16(q[x]) * q_norm[h] * up1);
            }
        }
        __syncwarp();   // every lane has its part of the input
        stmatrix_x4(g_address, kr);
        stmatrix_x4(k_address, kd);
        stmatrix_x4(q_address, qd);
        if (r == 0)
            *reinterpret_cast<float4*>(&small.e[c][block * 4]) = {E[0][0], E[0][1], E[1][0], E[1][1]};
        for (int n = 0; n < 2; ++n) {
            mma_m16n8k16(L[n], kd, ki[n], ki[2 + n]);
            mma_m16n8k16(Z[n], qd, ki[n], ki[2 + n]);
        }
    }

    // -[T; Z T] = [I; Z] (I + A)^-1 diag(-beta), A = tril(diag(beta) L, -1): one row a lane, by substitution from the last column
    // to the first, in fp32 (a product form of the inverse cancels badly where keys repeat).
    __device__ __forceinline__ void solve(SmallFactors& small, const float (&L)[2][4], const float (&Z)[2][4], float beta) const {
        __syncwarp();   // the previous chunk's scratch has been read
        const float beta_of[2] = {__shfl_sync(~0u, beta, r), __shfl_sync(~0u, beta, r + 8)};
        for (int n = 0; n < 2; ++n)
            for (int h = 0; h < 2; ++h) {
                const int row = r + 8 * h, column = 8 * n + 2 * c;
                *reinterpret_cast<float2*>(&scratch.a[row][column]) = {beta_of[h] * L[n][2 * h], beta_of[h] * L[n][2 * h + 1]};
                *reinterpret_cast<float2*>(&scratch.z[row][column]) = {column <= row ? Z[n][2 * h] : 0.0f,
                                                                       column + 1 <= row ? Z[n][2 * h + 1] : 0.0f};
            }
        if (lane < kChunk)
            scratch.minus_beta[lane] = -beta;
        __syncwarp();

        float y[kChunk];
        for (int j = 0; j < kChunk; j += 4) {
            const float4 z = *reinterpret_cast<const float4*>(&scratch.z[lane % kChunk][j]);
            const float zs[4] = {z.x, z.y, z.z, z.w};
            for (int i = 0; i < 4; ++i)
                y[j + i] = lane < kChunk ? (lane == j + i ? 1.0f : 0.0f) : zs[i];
        }
        for (int j = kChunk - 1; j > 0; --j)
            for (int i = 0; i < j; i += 4) {
                const float4 a = *reinterpret_cast<const float4*>(&scratch.a[j][i]);
                const float as[4] = {a.x, a.y, a.z, a.w};
                for (int x = 0; x < 4 && i + x < j; ++x)
                    y[i + x] = fmaf(-y[j], as[x], y[i + x]);
            }
        const uint32_t address = smem_address(small.minus_t) + lane / 8 * 128 + lane % 8 * 16;
        for (int h = 0; h < 2; ++h) {
            uint32_t packed[4];
            for (int i = 0; i < 4; ++i) {
                const float2 minus_beta = *reinterpret_cast<const float2*>(&scratch.minus_beta[8 * h + 2 * i]);
                packed[i] = pack_bf16(y[8 * h + 2 * i] * minus_beta.x, y[8 * h + 2 * i + 1] * minus_beta.y);
            }
            store_shared_16_bytes(address + h * kTColumnBytes, packed);
        }
    }

    // [-W | qd - Z W] = [0 | qd] - [T | Z T] kd, in place of kd and qd.
    __device__ __forceinline__ void products(Stage& stage, const SmallFactors& small) const {
        __syncwarp();
        uint32_t minus_T[4], minus_ZT[4];
        const uint32_t address = smem_address(small.minus_t) + lane / 16 * kTColumnBytes + lane % 16 * 16;
        ldmatrix_x4(minus_T, address);
        ldmatrix_x4(minus_ZT, address + kTColumnBytes / 2);
        for (int block = 0; block < kBlocks; ++block) {
            const uint32_t kd_address = smem_address(&stage.kq[block / 4][0]) + block_offset(block);
            const uint32_t qd_address = kd_address + kHalfTileBytes;
            uint32_t kd[4], qd[4], minus_W[4];
            ldmatrix_x4_trans(kd, kd_address);
            ldmatrix_x4(qd, qd_address);
            for (int j = 0; j < 2; ++j) {
                float w[4] = {}, q[4] = {low_bf16(qd[2 * j]), high_bf16(qd[2 * j]), low_bf16(qd[2 * j + 1]), high_bf16(qd[2 * j + 1])};
                mma_m16n8k16(w, minus_T, kd[2 * j], kd[2 * j + 1]);
                mma_m16n8k16(q, minus_ZT, kd[2 * j], kd[2 * j + 1]);
                minus_W[2 * j] = pack_bf16(w[0], w[1]);
                minus_W[2 * j + 1] = pack_bf16(w[2], w[3]);
                qd[2 * j] = pack_bf16(q[0], q[1]);
                qd[2 * j + 1] = pack_bf16(q[2], q[3]);
            }
            __syncwarp();
            stmatrix_x4(kd_address, minus_W);
            stmatrix_x4(qd_address, qd);
        }
    }
};

// One warp's part of a chain: every kPrepareWarps-th chunk, from loading to handing over. While it waits for its load the other
// warps compute; to ask for the next chunk early was slower, since a stage that is free so early is rare, and waiting for one
// holds up the chunk in hand.
__device__ __forceinline__ void prepare_chain(const KernelParams& p, const Chain& chain, SharedStorage& smem, int warp) {
    const Preparer preparer(p, chain, smem, smem.scratch[warp]);
    const int lane = threadIdx.x % 32;
    RingCursor<kStages> ring;
    ring.advance(warp);
    for (int chunk = warp; chunk < chain.chunks(); chunk += kPrepareWarps) {
        const int valid = chain.length - chunk * kChunk;
        Stage& stage = smem.stages[ring.slot];
        uint64_t& loaded = smem.loaded[ring.slot];
        mbarrier_wait(smem.empty[ring.slot], ring.phase ^ 1);   // passes in the first turn
        if (elect_one())
            load_chunk(p, chain, chunk, stage, loaded);
        const int token = chunk * kChunk + min(lane, min(valid, kChunk) - 1);
        const float beta = __bfloat162float(p.beta[(chain.first_row + token) * p.heads + chain.head]);
        mbarrier_wait(loaded, ring.phase);
        preparer.prepare(stage, smem.small[ring.slot], beta, valid);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0)
            mbarrier_arrive(smem.ready[ring.slot]);
        ring.advance(kPrepareWarps);
    }
}

}  // namespace flash_kda::sm90
