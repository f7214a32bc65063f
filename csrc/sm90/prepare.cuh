// Prepare: from a chunk's q, k, g and beta to the factors of its step, in place, by one warp.
//
//   G    inclusive cumulative sum of the gates, base 2                   D     diag(1 / |k|)
//   kd = k 2^G    ki = k 2^-G    qd = q 2^G                              E     2^G_end
//   L  = tril(kd ki', -1)                                                Z     tril(qd ki')
//   T  = (I + diag(beta) D^2 L)^-1 diag(beta) D                          W     T D kd
//
// All with k and q as they come: no pass over the chunk to find their norms first. Against T and W of unit keys, T and W here
// have rows divided by |k|, so that the residual R = T v - W S comes out divided by |k| as well, which is just what Z and ki, too long by
// |k|, want of it; and q's norm joins the scale at the output. The norms appear only in [16]-vectors. There is no kr = ki E either:
// the recurrence adds R' ki to the state before it lets the state decay.
//
// Channels go by in blocks of 16. Registers hold [16, 16] blocks in the mma fragment order: lane 4 r + c has rows r and r + 8, columns
// 2 c, 2 c + 1, 2 c + 8 and 2 c + 9; accumulators of two neighbouring [16, 8] products have just that order, so products chain in
// registers.
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
          scale(p.scale),
          lane(threadIdx.x % 32),
          r(lane / 4),
          c(lane % 4),
          first_block_offset(lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4)) {
        for (int i = 0; i < 4; ++i) {
            const int row = r + i % 2 * 8, token = 2 * c + i / 2;
            shift[i] = resident(kShift);
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

    // `valid` tokens of the chunk are the sequence's own; the rest must leave no trace. Lane l holds token l's beta, a bf16.
    // `meanwhile` is called once most of the work is done.
    template <class Meanwhile>
    __device__ __forceinline__ void prepare(Stage& stage, SmallFactors& small, uint32_t beta_logit, int valid, Meanwhile meanwhile) const {
        if (valid < kChunk)
            clear_tail(stage, valid);
        float L[2][4] = {}, Z[2][4] = {}, k_squares[2] = {}, q_squares[2] = {};
#pragma unroll 2   // two chains of dependent instructions; 1 was 4 % slower, 4 was 1 %
        for (int block = 0; block < kBlocks; ++block) {
            float G[2][4];
            cumulated_gates(stage, block, G);
            elementwise(stage, small, block, G, k_squares, q_squares, L, Z);
        }
        const float beta = lane < valid ? rcp_approx(1.0f + exp2_approx(-kLog2E * low_bf16(beta_logit))) : 0.0f;
        normalise(small, k_squares, q_squares, beta, L, Z);
        solve(small);
        meanwhile();
        products(stage);
    }

private:
    PrepareScratch& scratch;
    const float* gate_offset;
    const float gate_slope, inverse_bound, scale;
    const int lane, r, c;
    const uint32_t first_block_offset;
    float shift[4];                      // kShift
    float ones_first[4], ones_last[4];   // ones on and under the diagonal of [16, 16]: columns of the first and last 8 tokens

    // ldmatrix.x4 and stmatrix.x4 take a [16, 16] block as its quarters (rows 0-7, columns 0-7), (rows 8-15, columns 0-7), (rows 0-7,
    // columns 8-15), (rows 8-15, columns 8-15), lane l giving row l % 8 of quarter l / 8: the register order of an mma A fragment.
    // In a half tile, where a block begins at unit 2 (block % 4) before the swizzle.
    __device__ __forceinline__ uint32_t block_offset(int block) const { return first_block_offset ^ (block % 4 * 32); }

    // Rows past the sequence are its neighbour's. k = q = v = 0, and a logit whose gate is 0, leave the state and the other rows alone.
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

    // kShift + the cumulated gates of a block, as two accumulators: [16, 16] ones on and under the diagonal @ gate, on the tensor cores.
    // Its columns are taken in the order of the tokens that a lane holds. tf32 cuts 2^-11 off a gate, which next to bf16 factors does
    // not show.
    __device__ __forceinline__ void cumulated_gates(const Stage& stage, int block, float (&G)[2][4]) const {
        uint32_t g[4];   // of 8 channels each, tokens 2 c and 2 c + 1, 2 c + 8 and 2 c + 9
        ldmatrix_x4_trans(g, smem_address(&stage.g[block / 4]) + block_offset(block));
        for (int j = 0; j < 2; ++j) {
            const float offset = gate_offset[block * 16 + j * 8 + r];
            float gate[4];
            for (int i = 0; i < 4; ++i) {
                const uint32_t pair = g[2 * j + i / 2];
                const float y = fmaf(gate_slope, i % 2 ? high_bf16(pair) : low_bf16(pair), offset);
                gate[i] = rcp_approx(fmaf(exp2_approx(y), inverse_bound, inverse_bound));
            }
            mma_m16n8k8_tf32(G[j], ones_first, gate[0], gate[1], shift);
            mma_m16n8k8_tf32(G[j], ones_last, gate[2], gate[3], G[j]);
        }
    }

    // One block: kd, qd and ki in place of k, q and g; E; the block's share of |k|^2, |q|^2, L and Z.
    __device__ __forceinline__ void elementwise(Stage& stage, SmallFactors& small, int block, const float (&G)[2][4],
                                                float (&k_squares)[2], float (&q_squares)[2], float (&L)[2][4],
                                                float (&Z)[2][4]) const {
        const uint32_t k_address = smem_address(&stage.kq[block / 4][0]) + block_offset(block);
        const uint32_t q_address = k_address + kHalfTileBytes;
        uint32_t k[4], q[4], kd[4], ki[4], qd[4];
        ldmatrix_x4(k, k_address);
        ldmatrix_x4(q, q_address);
        float up[2][4];
        for (int j = 0; j < 2; ++j)
            for (int i = 0; i < 4; ++i)
                up[j][i] = exp2_approx(G[j][i]);
        for (int x = 0; x < 4; ++x) {
            const int j = x / 2, h = x % 2;
            const float k0 = low_bf16(k[x]), k1 = high_bf16(k[x]), q0 = low_bf16(q[x]), q1 = high_bf16(q[x]);
            k_squares[h] = fmaf(k0, k0, fmaf(k1, k1, k_squares[h]));
            q_squares[h] = fmaf(q0, q0, fmaf(q1, q1, q_squares[h]));
            kd[x] = pack_bf16(k0 * up[j][2 * h], k1 * up[j][2 * h + 1]);
            qd[x] = pack_bf16(q0 * up[j][2 * h], q1 * up[j][2 * h + 1]);
            ki[x] = pack_bf16(k0 * exp2_approx(-G[j][2 * h]), k1 * exp2_approx(-G[j][2 * h + 1]));
        }
        __syncwarp();   // every lane has its part of the input
        stmatrix_x4(smem_address(&stage.g[block / 4]) + block_offset(block), ki);
        stmatrix_x4(k_address, kd);
        stmatrix_x4(q_address, qd);
        if (r == 7)   // row 15 closes the chunk
            *reinterpret_cast<float4*>(&small.e[c][block * 4]) = {up[0][2] / kShiftUp, up[0][3] / kShiftUp, up[1][2] / kShiftUp,
                                                                  up[1][3] / kShiftUp};
        for (int n = 0; n < 2; ++n) {
            mma_m16n8k16(L[n], kd, ki[n], ki[2 + n]);
            mma_m16n8k16(Z[n], qd, ki[n], ki[2 + n]);
        }
    }

    // Z, and what `solve` works on.
    __device__ __forceinline__ void normalise(SmallFactors& small, const float (&k_squares)[2], const float (&q_squares)[2], float beta,
                                              const float (&L)[2][4], const float (&Z)[2][4]) const {
        const auto inverse_norm = [](float squares) {   // of a row, from its four lanes
            squares += __shfl_xor_sync(~0u, squares, 1);
            squares += __shfl_xor_sync(~0u, squares, 2);
            return rsqrt_approx(squares + kNormEpsilon);
        };
        uint32_t z[4];
        for (int h = 0; h < 2; ++h) {
            const int row = r + 8 * h;
            const float k_norm = inverse_norm(k_squares[h]), q_norm = inverse_norm(q_squares[h]);
            const float beta_d = __shfl_sync(~0u, beta, row) * k_norm, beta_d2 = beta_d * k_norm;
            for (int n = 0; n < 2; ++n) {
                const int column = 8 * n + 2 * c;
                *reinterpret_cast<float2*>(&scratch.a[row][column]) = {beta_d2 * L[n][2 * h], beta_d2 * L[n][2 * h + 1]};
                z[2 * n + h] = pack_bf16(column <= row ? Z[n][2 * h] : 0.0f, column + 1 <= row ? Z[n][2 * h + 1] : 0.0f);
            }
            if (c == 0) {
                scratch.columns[0][row] = beta_d / kShiftUp;   // R is short of kShift powers of two
                scratch.columns[1][row] = -beta_d2;            // so is W, but the state of twice as many; kd has as many too many
                small.out_scale[row] = scale * q_norm * kShiftUp;
            }
        }
        stmatrix_x4(smem_address(small.z) + lane * 16, z);
        __syncwarp();
    }

    // T, twice over with different scales of its columns: one row a lane, by substitution from the last column to the first, in fp32 (a
    // product form of the inverse cancels badly where keys repeat). Row i of (I + A)^-1 is the y with y (I + A) = row i of I.
    __device__ __forceinline__ void solve(SmallFactors& small) const {
        float y[kChunk];
        for (int j = 0; j < kChunk; ++j)
            y[j] = lane % kChunk == j ? 1.0f : 0.0f;
        for (int j = kChunk - 1; j > 0; --j)
            for (int i = 0; i < j; i += 4) {
                const float4 a = *reinterpret_cast<const float4*>(&scratch.a[j][i]);
                const float as[4] = {a.x, a.y, a.z, a.w};
                for (int x = 0; x < 4 && i + x < j; ++x)
                    y[i + x] = fmaf(-y[j], as[x], y[i + x]);
            }
        const float* columns = scratch.columns[lane / kChunk];
        const uint32_t address = smem_address(lane < kChunk ? small.t : scratch.t_for_w) + lane % kChunk * 16;
        const int column_bytes = lane < kChunk ? kTColumnBytes : kZColumnBytes;
        for (int h = 0; h < 2; ++h) {
            uint32_t packed[4];
            for (int i = 0; i < 4; ++i) {
                const float2 column = *reinterpret_cast<const float2*>(&columns[8 * h + 2 * i]);
                packed[i] = pack_bf16(y[8 * h + 2 * i] * column.x, y[8 * h + 2 * i + 1] * column.y);
            }
            store_shared_16_bytes(address + h * column_bytes, packed);
        }
        __syncwarp();
    }

    // -W in place of kd.
    __device__ __forceinline__ void products(Stage& stage) const {
        uint32_t minus_T[4];
        ldmatrix_x4(minus_T, smem_address(scratch.t_for_w) + lane * 16);
        for (int block = 0; block < kBlocks; ++block) {
            const uint32_t address = smem_address(&stage.kq[block / 4][0]) + block_offset(block);
            uint32_t kd[4], minus_W[4];
            ldmatrix_x4_trans(kd, address);
            for (int j = 0; j < 2; ++j) {
                float w[4] = {};
                mma_m16n8k16(w, minus_T, kd[2 * j], kd[2 * j + 1]);
                minus_W[2 * j] = pack_bf16(w[0], w[1]);
                minus_W[2 * j + 1] = pack_bf16(w[2], w[3]);
            }
            __syncwarp();
            stmatrix_x4(address, minus_W);
        }
    }
};

// One warp's part of a chain: every kPrepareWarps-th chunk, from loading to handing over.
__device__ __forceinline__ void prepare_chain(const KernelParams& p, const Chain& chain, SharedStorage& smem, int warp) {
    const Preparer preparer(p, chain, smem, smem.scratch[warp]);
    const int lane = threadIdx.x % 32;
    RingCursor<kStages> ring;
    ring.advance(warp);
    // Asks for a chunk once its stage is free, and returns this lane's beta of it.
    const auto load = [&](int chunk) -> uint32_t {
        if (chunk >= chain.chunks())
            return 0;
        mbarrier_wait(smem.empty[ring.slot], ring.phase ^ 1);   // passes in the first turn
        if (elect_one())
            load_chunk(p, chain, chunk, smem.stages[ring.slot], smem.loaded[ring.slot]);
        const int token = min(chunk * kChunk + lane % kChunk, chain.length - 1);
        return load_global_bf16(p.beta + (chain.first_row + token) * p.heads + chain.head);
    };
    uint32_t next_beta = load(warp);
    for (int chunk = warp; chunk < chain.chunks(); chunk += kPrepareWarps) {
        const int slot = ring.slot;
        const uint32_t beta = next_beta;
        mbarrier_wait(smem.loaded[slot], ring.phase);
        // The next chunk is asked for early, to have landed by its turn. Its stage was that of a chunk which the recurrence gets to
        // without waiting for this one: kStages > kPrepareWarps.
        preparer.prepare(smem.stages[slot], smem.small[slot], beta, chain.length - chunk * kChunk, [&] {
            ring.advance(kPrepareWarps);
            next_beta = load(chunk + kPrepareWarps);
        });
        fence_async_proxy();
        __syncwarp();
        if (lane == 0)
            mbarrier_arrive(smem.ready[slot]);
    }
}

}  // namespace flash_kda::sm90
