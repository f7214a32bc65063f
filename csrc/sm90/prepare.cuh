// Prepare: from a chunk's q, k, g and beta to the factors of its step, one warpgroup a chunk.
//
//   k^, q^   unit keys and queries; qd carries the scale          G     inclusive cumulative sum of the gates, base 2
//   kd = k^ exp(G)    ki = k^ exp(-G)    qd = scale q^ exp(G)     kr = k^ exp(G_end - G)    E = exp(G_end)
//   T = (I + tril(diag(beta) kd ki', -1))^-1 diag(beta)           Z = tril(qd ki')
//   W = T kd
//
// and what leaves is [-W | qd - Z W], [T | Z T], kr and E. Warp w owns channels 32 w to 32 w + 31 in every elementwise step and
// product. Registers hold [16, 16] blocks in the mma fragment order: lane 4 r + c has rows r and r + 8, columns 2 c, 2 c + 1,
// 2 c + 8 and 2 c + 9; accumulators of two neighbouring [16, 8] products have just that order, so products chain in registers.
#pragma once

#include "fragments.h"
#include "kernel_params.h"
#include "load.cuh"
#include "ptx.h"
#include "ring.h"
#include "smem.h"

namespace flash_kda::sm90 {

constexpr float kUp = static_cast<float>(1 << kShift);
constexpr float kDown = 1.0f / kUp;

class Preparer {
public:
    __device__ Preparer(const KernelParams& p, const Chain& chain, SharedStorage& smem, int group)
        : scratch(smem.scratch[group]),
          group(group),
          warp(threadIdx.x / 32 % 4),
          lane(threadIdx.x % 32),
          r(lane / 4),
          c(lane % 4),
          half(warp / 2),
          tile_offset(half * kTileHalfBytes + swizzled_block_offset(lane, warp % 2 * 4)),
          scale(p.scale),
          gate_bound(p.lower_bound * kLog2E) {
        // sigmoid(x) = 1 / (1 + 2^y) with y = gate_slope * g + gate_offset
        gate_slope = -expf(p.A_log[chain.head]) * kLog2E;
        for (int j = 0; j < 4; ++j)
            gate_offset[j] = gate_slope * p.dt_bias[chain.head * kDim + warp * 32 + j * 8 + r];
        lower_ones = pack_bf16(2 * c <= r ? 1.0f : 0.0f, 2 * c + 1 <= r ? 1.0f : 0.0f);
    }

    // beta of a chunk's token `lane`; asked for one chunk ahead, since it comes straight from global memory.
    __device__ float load_beta(const KernelParams& p, const Chain& chain, int chunk) const {
        const int token = chunk * kChunk + lane;
        if (lane >= kChunk || token >= chain.length)
            return -INFINITY;   // sigmoid: 0
        return __bfloat162float(p.beta[(chain.first_row + token) * p.heads + chain.head]);
    }

    // All of one chunk. `valid` tokens of it are the sequence's own; the rest must leave no trace. `input_free` is called once no
    // warp of the group needs `in` any longer.
    template <class InputFree>
    __device__ __forceinline__ void prepare(const InputStage& in, FactorStage& out, float beta_logit, int valid, InputFree input_free) {
        uint32_t q[8], k[8];
        float gate[16], G[4][4];
        load(in, q, k, gate, valid);
        sum_squares(q, k);
        cumulate(gate, G);
        const float beta = rcp_approx(1.0f + exp2_approx(-kLog2E * beta_logit));

        named_barrier(barrier(), kWarpgroup);
        input_free();
        float qd[4][4];
        uint32_t kd_columns[8];
        factors(q, k, G, out, qd, kd_columns);

        named_barrier(barrier(), kWarpgroup);
        reduce(beta);

        named_barrier(barrier(), kWarpgroup);
        if (warp == group * 2)   // the two groups' solvers sit on different schedulers
            solve(out);

        named_barrier(barrier(), kWarpgroup);
        products(out, qd, kd_columns);
    }

private:
    PrepareScratch& scratch;
    const int group, warp, lane, r, c;
    const int half;               // of a tile: where the warp's channels lie
    const uint32_t tile_offset;   // of this lane's row of the warp's first [16, 16] block
    const float scale, gate_bound;
    float gate_slope, gate_offset[4];
    uint32_t lower_ones;   // 8x8 matrix of ones on and under the diagonal

    __device__ int barrier() const { return 1 + group; }

    // The warp's second block starts two 16-byte units on, which under the swizzle is one flipped bit.
    __device__ uint32_t block_offset(int s) const { return tile_offset ^ (s * 32); }

    // q, k: fragments of the warp's two [16, 16] blocks. gate: transposed fragments, [8-channel block][token 2 c, 2 c + 1, + 8, + 9]
    // of channel r.
    __device__ __forceinline__ void load(const InputStage& in, uint32_t* q, uint32_t* k, float* gate, int valid) const {
        uint32_t g[8];
        for (int s = 0; s < 2; ++s) {
            ldmatrix_x4_trans(g + 4 * s, smem_address(&in.g) + block_offset(s));
            ldmatrix_x4(k + 4 * s, smem_address(&in.k) + block_offset(s));
            ldmatrix_x4(q + 4 * s, smem_address(&in.q) + block_offset(s));
        }
        for (int i = 0; i < 8; ++i) {
            const float offset = gate_offset[i / 2];
            const float low = fmaf(gate_slope, low_bf16(g[i]), offset), high = fmaf(gate_slope, high_bf16(g[i]), offset);
            gate[2 * i] = gate_bound * rcp_approx(1.0f + exp2_approx(low));
            gate[2 * i + 1] = gate_bound * rcp_approx(1.0f + exp2_approx(high));
        }
        if (valid < kChunk) {
            for (int i = 0; i < 8; ++i) {
                const int row = r + i % 2 * 8, token = 2 * c + i % 2 * 8;
                if (row >= valid)
                    q[i] = k[i] = 0;
                if (token >= valid)
                    gate[2 * i] = 0.0f;
                if (token + 1 >= valid)
                    gate[2 * i + 1] = 0.0f;
            }
        }
    }

    // The warp's share of the squared norms of q and k.
    __device__ __forceinline__ void sum_squares(const uint32_t* q, const uint32_t* k) const {
        float sum[4] = {};   // q row r, q row r + 8, k row r, k row r + 8
        for (int i = 0; i < 8; ++i) {
            sum[i % 2] = fmaf(low_bf16(q[i]), low_bf16(q[i]), fmaf(high_bf16(q[i]), high_bf16(q[i]), sum[i % 2]));
            sum[2 + i % 2] = fmaf(low_bf16(k[i]), low_bf16(k[i]), fmaf(high_bf16(k[i]), high_bf16(k[i]), sum[2 + i % 2]));
        }
        // Four sums over four lanes: each lane keeps the half that its partner sends away, and ends with sum number c.
        const bool odd = c & 1, upper = c & 2;
        float a = odd ? sum[1] : sum[0], b = odd ? sum[3] : sum[2];
        a += __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 1);
        b += __shfl_xor_sync(~0u, odd ? sum[2] : sum[3], 1);
        const float total = (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 2);
        scratch.norm[c / 2][r + odd * 8][warp] = total;
    }

    __device__ __forceinline__ float inverse_norm(int tensor, int row) const {
        const float4 s = *reinterpret_cast<const float4*>(scratch.norm[tensor][row]);
        return rsqrt_approx((s.x + s.y) + (s.z + s.w) + kNormEpsilon);
    }

    // G = [16, 16] ones on and under the diagonal @ gate + kShift on the tensor cores. The gates go in as bf16 high and low parts, 16 bits together: an error
    // of 2^-17 of a gate, far under what bf16 factors see of it.
    __device__ __forceinline__ void cumulate(const float* gate, float (*G)[4]) const {
        const uint32_t ones = pack_bf16(1.0f, 1.0f);
        const uint32_t lower[4] = {lower_ones, ones, 0, lower_ones};
        for (int j = 0; j < 4; ++j) {
            uint32_t high[2], low[2];
            for (int i = 0; i < 2; ++i) {
                const float a = gate[4 * j + 2 * i], b = gate[4 * j + 2 * i + 1];
                high[i] = pack_bf16(a, b);
                low[i] = pack_bf16(a - low_bf16(high[i]), b - high_bf16(high[i]));
            }
            for (int i = 0; i < 4; ++i)
                G[j][i] = kShift;
            mma_m16n8k16(G[j], lower, low[0], low[1]);
            mma_m16n8k16(G[j], lower, high[0], high[1]);
        }
    }

    // Everything elementwise; the warp's share of L = kd ki' and Z = qd ki'; kr and E.
    __device__ __forceinline__ void factors(const uint32_t* q, const uint32_t* k, const float (*G)[4], FactorStage& out,
                                            float (*qd_out)[4], uint32_t* kd_columns) {
        const float q_norm[2] = {inverse_norm(0, r) * scale, inverse_norm(0, r + 8) * scale};
        const float k_norm[2] = {inverse_norm(1, r), inverse_norm(1, r + 8)};
        float L[2][4] = {}, Z[2][4] = {};
        for (int s = 0; s < 2; ++s) {
            uint32_t kd[4], ki[4], qd[4], kr[4];
            float E[2][2];
            for (int x = 0; x < 4; ++x) {
                const int j = x / 2, row = x % 2, i = 4 * s + x;
                const float* g = G[2 * s + j] + 2 * row;
                const float up[2] = {exp2_approx(g[0]), exp2_approx(g[1])};
                const float down[2] = {exp2_approx(-g[0]), exp2_approx(-g[1])};
                const float k0 = low_bf16(k[i]) * k_norm[row], k1 = high_bf16(k[i]) * k_norm[row];
                const float q0 = low_bf16(q[i]) * q_norm[row], q1 = high_bf16(q[i]) * q_norm[row];
                kd[x] = pack_bf16(k0 * up[0], k1 * up[1]);
                qd[x] = pack_bf16(q0 * up[0], q1 * up[1]);
                qd_out[2 * s + j][2 * row] = q0 * up[0] * kDown;
                qd_out[2 * s + j][2 * row + 1] = q1 * up[1] * kDown;
                const float ki0 = k0 * down[0], ki1 = k1 * down[1];
                ki[x] = pack_bf16(ki0, ki1);
                // Row 15 closes the chunk: kr = ki exp(G_end), whose shifts cancel.
                if (row == 0) {
                    E[j][0] = exp2_approx(__shfl_sync(~0u, G[2 * s + j][2], 28 + c));
                    E[j][1] = exp2_approx(__shfl_sync(~0u, G[2 * s + j][3], 28 + c));
                }
                kr[x] = pack_bf16(ki0 * E[j][0], ki1 * E[j][1]);
            }
            stmatrix_x4(smem_address(&out.kr) + block_offset(s), kr[0], kr[1], kr[2], kr[3]);
            if (r == 0) {
                const float4 e = {E[0][0] * kDown, E[0][1] * kDown, E[1][0] * kDown, E[1][1] * kDown};
                *reinterpret_cast<float4*>(&out.e[c][(warp * 4 + 2 * s) * 2]) = e;
            }
            for (int n = 0; n < 2; ++n) {
                mma_m16n8k16(L[n], kd, ki[n], ki[2 + n]);
                mma_m16n8k16(Z[n], qd, ki[n], ki[2 + n]);
            }
            for (int x = 0; x < 4; ++x)
                kd_columns[4 * s + x] = movmatrix_trans(kd[x]);
        }
        for (int n = 0; n < 2; ++n) {
            scratch.partial[warp][n][lane] = {L[n][0], L[n][1], L[n][2], L[n][3]};
            scratch.partial[warp][2 + n][lane] = {Z[n][0], Z[n][1], Z[n][2], Z[n][3]};
        }
    }

    // Sums the four warps' shares, a quarter each: warps 0 and 1 the column halves of L, 2 and 3 those of Z.
    __device__ __forceinline__ void reduce(float beta) const {
        float4 sum = scratch.partial[0][warp][lane];
        for (int w = 1; w < 4; ++w) {
            const float4 x = scratch.partial[w][warp][lane];
            sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
        }
        const int column = warp % 2 * 8 + 2 * c;
        if (warp < 2) {
            const float beta_r = __shfl_sync(~0u, beta, r), beta_r8 = __shfl_sync(~0u, beta, r + 8);
            *reinterpret_cast<float2*>(&scratch.a[r][column]) = {beta_r * sum.x, beta_r * sum.y};
            *reinterpret_cast<float2*>(&scratch.a[r + 8][column]) = {beta_r8 * sum.z, beta_r8 * sum.w};
        } else {
            const auto lower = [&](int row, float x, float y) -> float2 {
                return {column <= row ? x : 0.0f, column + 1 <= row ? y : 0.0f};
            };
            *reinterpret_cast<float2*>(&scratch.z[r][column]) = lower(r, sum.x, sum.y);
            *reinterpret_cast<float2*>(&scratch.z[r + 8][column]) = lower(r + 8, sum.z, sum.w);
            if (warp == 3 && lane < kChunk)
                scratch.beta[lane] = beta;
        }
    }

    // [T; Z T] = [I; Z] (I + A)^-1 diag(beta), A = tril(diag(beta) L, -1): one row a lane, by substitution from the last column
    // to the first, in fp32 (a product form of the inverse cancels badly where keys repeat).
    __device__ __forceinline__ void solve(FactorStage& out) const {
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
        const uint32_t address = smem_address(out.t) + lane / 8 * 128 + lane % 8 * 16;
        for (int h = 0; h < 2; ++h) {
            uint32_t packed[4];
            for (int i = 0; i < 4; ++i) {
                const float2 beta = *reinterpret_cast<const float2*>(&scratch.beta[8 * h + 2 * i]);
                packed[i] = pack_bf16(y[8 * h + 2 * i] * beta.x, y[8 * h + 2 * i + 1] * beta.y);
            }
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address + h * kTColumnBytes), "r"(packed[0]), "r"(packed[1]),
                         "r"(packed[2]), "r"(packed[3])
                         : "memory");
        }
    }

    // [-W | qd - Z W] = [0 | qd] - [T | Z T] kd for the warp's channels.
    __device__ __forceinline__ void products(FactorStage& out, float (*qd)[4], const uint32_t* kd_columns) const {
        uint32_t T[4], ZT[4];
        const uint32_t address = smem_address(out.t) + (lane >> 4) * kTColumnBytes + (lane & 15) * 16;
        ldmatrix_x4(T, address);
        ldmatrix_x4(ZT, address + kTColumnBytes / 2);
        const uint32_t minus_down = pack_bf16(-kDown, -kDown);   // also takes kd's shift back
        for (int x = 0; x < 4; ++x) {
            T[x] = mul_bf16x2(T[x], minus_down);
            ZT[x] = mul_bf16x2(ZT[x], minus_down);
        }
        for (int s = 0; s < 2; ++s) {
            float W[2][4] = {};
            for (int j = 0; j < 2; ++j) {
                const uint32_t b0 = kd_columns[4 * s + 2 * j], b1 = kd_columns[4 * s + 2 * j + 1];
                mma_m16n8k16(W[j], T, b0, b1);
                mma_m16n8k16(qd[2 * s + j], ZT, b0, b1);
            }
            const uint32_t block = smem_address(out.w) + half * (kWHalfBytes - kTileHalfBytes) + block_offset(s);
            const float(*Q)[4] = qd + 2 * s;
            stmatrix_x4(block, pack_bf16(W[0][0], W[0][1]), pack_bf16(W[0][2], W[0][3]), pack_bf16(W[1][0], W[1][1]),
                        pack_bf16(W[1][2], W[1][3]));
            stmatrix_x4(block + kChunk * 128, pack_bf16(Q[0][0], Q[0][1]), pack_bf16(Q[0][2], Q[0][3]), pack_bf16(Q[1][0], Q[1][1]),
                        pack_bf16(Q[1][2], Q[1][3]));
        }
    }
};

// One prepare group's part of a chain: every kPrepareGroups-th chunk.
__device__ __forceinline__ void prepare_chain(const KernelParams& p, const Chain& chain, SharedStorage& smem, int group) {
    const bool loader = threadIdx.x % kWarpgroup == 0;
    if (loader)
        for (int chunk = group; chunk < kInputStages; chunk += kPrepareGroups)
            load_chunk(p, chain, chunk, smem.input[chunk], smem.v[chunk], smem.input_full[chunk]);

    Preparer preparer(p, chain, smem, group);
    RingCursor<kInputStages> input;
    RingCursor<kValueStages> next_v;
    RingCursor<kFactorStages> factor;
    input.advance(group);
    next_v.advance(kInputStages + group);
    factor.advance(group);
    float beta = preparer.load_beta(p, chain, group);
    for (int chunk = group; chunk < chain.chunks(); chunk += kPrepareGroups) {
        const float next_beta = preparer.load_beta(p, chain, chunk + kPrepareGroups);
        InputStage& in = smem.input[input.slot];
        uint64_t& full = smem.input_full[input.slot];
        mbarrier_wait(full, input.phase);
        mbarrier_wait(smem.factor_empty[factor.slot], factor.phase ^ 1);
        preparer.prepare(in, smem.factors[factor.slot], beta, chain.length - chunk * kChunk, [&] {
            if (loader)
                load_chunk(p, chain, chunk + kInputStages, in, smem.v[next_v.slot], full);
        });
        fence_async_proxy();
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            mbarrier_arrive(smem.factor_full[factor.slot]);
        input.advance(kPrepareGroups);
        next_v.advance(kPrepareGroups);
        factor.advance(kPrepareGroups);
        beta = next_beta;
    }
}

}  // namespace flash_kda::sm90
