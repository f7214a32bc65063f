// Prepare: from a chunk's q, k, g and beta to the factors of its step, in place, by a team of two warps, a half of the key channels each.
// One of them finds T meanwhile, for both; the other does what else remains.
//
//   G    inclusive cumulative sum of the gates, base 2                   D     diag(1 / |k|)
//   kd = k 2^G    ki = k 2^-G    kr = ki E    qd = q 2^G                 E     2^G_end
//   L  = tril(kd ki', -1)                                                Z     tril(qd ki')
//   T  = (I + diag(beta) D^2 L)^-1 diag(beta) D                          W     T D kd
//
// All with k and q as they come: no pass over the chunk to find their norms first. Against T and W of unit keys, T and W here
// have rows divided by |k|, so that the residual R = T v - W S comes out divided by |k| as well, which is just what Z and kr, too long by
// |k|, want of it; and q's norm joins the scale at the output. The norms appear only in [16]-vectors. kd and ki stay in registers.
//
// Channels go by in blocks of 16. Registers hold [16, 16] blocks in the mma fragment order: lane 4 r + c has rows r and r + 8, columns
// 2 c, 2 c + 1, 2 c + 8 and 2 c + 9; accumulators of two neighbouring [16, 8] products have just that order, so products chain in
// registers.
#pragma once

#include "kernel_params.h"
#include "ptx.h"
#include "schedule.cuh"
#include "segments.cuh"
#include "smem.h"

namespace flash_kda::sm90 {

constexpr int kHalfBlocks = kBlocks / kHalves;   // of a warp

class Preparer {
public:
    __device__ Preparer(const KernelParams& p, PrepareScratch& scratch, int team, int half)
        : scratch(scratch),
          team(team),
          half(half),
          // No bound of zero: its inverse would be infinite. So small a gate is zero all the same.
          inverse_bound(rcp_approx(fmaxf(-p.lower_bound * kLog2E * kGateUp, 1e-36f))),
          scale(p.scale),
          lane(threadIdx.x % 32),
          r(lane / 4),
          c(lane % 4),
          block_offset(lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4)),
          turned_block_offset((lane % 8 + lane / 16 * 8) * 128 + ((lane / 8 % 2 ^ lane % 8) << 4)) {
        const auto ones = [&](int row, int token) {   // -2^-10 at this token and the next one, where they are no later than the row
            return (token <= row ? 0x9400u : 0) | (token + 1 <= row ? 0x94000000u : 0);
        };
        // Operands are four registers in a row. From values it knows the compiler would gather them before every use: so it gets zeros added
        // that it does not know to be zeros.
        const uint32_t zero = (gridDim.y - 1) * lane;
        for (int i = 0; i < 4; ++i) {
            minus_ones[i] = ones(r + i % 2 * 8, 2 * c + i / 2 * 8) | zero * (i + 1);
            all_minus_ones[i] = 0x94009400u | zero * (i + 5);
        }
    }

    // -gate 2^10 = 1 / (inverse_bound + 2^y), y = gate_slope * g + gate_offset[channel]. Never a slope of zero, nor an infinite slope or offset that
    // a logit could cancel: see clear_tail. What is so steep is a step function all the same.
    __device__ __forceinline__ void set_head(const KernelParams& p, uint32_t head) {
        constexpr float kSteepest = 1e18f;
        gate_slope = fmaxf(fminf(-expf(p.A_log[head]) * kLog2E, -1e-30f), -kSteepest);
        const float offset = log2f(inverse_bound);
        for (int i = 0; i < kHalfBlocks; ++i)
            for (int j = 0; j < 2; ++j) {
                const float bias = p.dt_bias[head * kDim + half * kHalf + 16 * i + 8 * j + r];
                gate_offset[i][j] = fmaf(gate_slope, bias > kSteepest ? kSteepest : bias, offset);
            }
    }

    // `valid` tokens of the chunk are the sequence's own; the rest must leave no trace. Lane l holds token l's beta, a bf16. Called by
    // both warps.
    __device__ __forceinline__ void prepare(Stage& stage, SmallFactors& small, uint32_t beta_logit, int valid) const {
        if (valid < kChunk)
            clear_tail(stage, valid);
        float L[2][4] = {}, Z[2][4] = {}, Q[2][4] = {};   // sums over this warp's channels
        uint32_t kd[kHalfBlocks][4];   // as B operands
        factors(stage, small, kd, L, Z, Q);
        if (half == 0) {
            give(scratch.Z, Z);
            give_diagonal(Q);
            meet();
            add(scratch.L, L);
            const float beta = lane < valid ? rcp_approx(1.0f + exp2_approx(-kLog2E * low_bf16(beta_logit))) : 0.0f;
            solve(small, beta, L);
        } else {
            give(scratch.L, L);
            meet();
            outputs(small, Z, Q);
        }
        meet();
        products(stage, kd);
    }

private:
    PrepareScratch& scratch;
    const int team, half;
    float gate_slope;
    const float inverse_bound, scale;
    const int lane, r, c;
    float gate_offset[kHalfBlocks][2];   // of the warp's channels 16 i + 8 j + r
    // ldmatrix.x4 and stmatrix.x4 take a [16, 16] block as its quarters (rows 0-7, columns 0-7), (rows 8-15, columns 0-7), (rows 0-7,
    // columns 8-15), (rows 8-15, columns 8-15), lane l giving row l % 8 of quarter l / 8: the register order of an mma A fragment. This
    // is the lane's row of the first block of a half tile, the others' is this ^ 32 block.
    const uint32_t block_offset;
    // The same with the off-diagonal quarters exchanged: the register order of two mma B fragments, of rows 0-7 and of rows 8-15.
    const uint32_t turned_block_offset;
    uint32_t minus_ones[4];       // -2^-10 on and under the diagonal of [16, 16], in fp16,
    uint32_t all_minus_ones[4];   // and everywhere

    __device__ __forceinline__ void meet() const { barrier(kTeamBarrier + team, kTeam * 32); }

    // Rows past the sequence are its neighbour's. k = q = 0, and a logit whose gate is 0, leave the state and the other rows alone.
    __device__ __forceinline__ void clear_tail(Stage& stage, int valid) const {
        constexpr uint32_t kMinusInfinity = 0xff80ff80;   // twice, in bf16
        const HalfTile& tile = lane < 8 ? stage.kq[half][0] : lane < 16 ? stage.kq[half][1] : stage.g[half];
        const uint32_t x = lane < 16 ? 0 : kMinusInfinity;
        for (int row = valid; row < kChunk; ++row)
            if (lane < 24)
                store_shared_16_bytes(smem_address(&tile) + row * 128 + lane % 8 * 16, {x, x, x, x});
        __syncwarp();
    }

    __device__ __forceinline__ void give(float4 (&to)[2][32], const float (&X)[2][4]) const {
        for (int n = 0; n < 2; ++n)
            to[n][lane] = {X[n][0], X[n][1], X[n][2], X[n][3]};
    }

    __device__ __forceinline__ void add(const float4 (&from)[2][32], float (&X)[2][4]) const {
        for (int n = 0; n < 2; ++n) {
            const float4 x = from[n][lane];
            X[n][0] += x.x, X[n][1] += x.y, X[n][2] += x.z, X[n][3] += x.w;
        }
    }

    // The diagonal of [16, 16], an element to each lane of its row: rows r and r + 8. Lane 4 r + r / 2 has it.
    __device__ __forceinline__ float2 diagonal(const float (&X)[2][4]) const {
        const int from = 4 * r + r / 2;
        return {__shfl_sync(~0u, r % 2 ? X[0][1] : X[0][0], from), __shfl_sync(~0u, r % 2 ? X[1][3] : X[1][2], from)};
    }

    __device__ __forceinline__ void give_diagonal(const float (&Q)[2][4]) const { scratch.q_squares[lane] = diagonal(Q); }

    // qd, kr and E of the half, and its share of L, Z and Q. kd as B operands.
    __device__ __forceinline__ void factors(Stage& stage, SmallFactors& small, uint32_t (&kd)[kHalfBlocks][4], float (&L)[2][4], float (&Z)[2][4],
                                            float (&Q)[2][4]) const {
        const uint32_t k = smem_address(stage.kq[half]) + block_offset, g = smem_address(&stage.g[half]) + block_offset;
        const uint32_t kr = smem_address(&stage.g[half]) + turned_block_offset;
        const uint32_t e = smem_address(small.e[c]) + half * (kHalf / 16) * 16;
        constexpr int kAtOnce = 2;   // chains of dependent instructions, to hide each other's latencies
        uint32_t logits[kHalfBlocks][4];   // of channels r and r + 8, tokens 2 c and 2 c + 1, 2 c + 8 and 2 c + 9
        for (int i = 0; i < kHalfBlocks; ++i)
            ldmatrix_x4_trans(logits[i], g ^ i * 32);   // 32 bytes are 16 channels, before the swizzle
        for (int first = 0; first < kHalfBlocks; first += kAtOnce) {
            uint32_t k_block[kAtOnce][4], q_block[kAtOnce][4];
            Gates gates[kAtOnce];
            for (int i = 0; i < kAtOnce; ++i)
                gates[i] = cumulated_gates(logits[first + i], gate_offset[first + i]);
            for (int i = 0; i < kAtOnce; ++i) {
                ldmatrix_x4(k_block[i], k ^ (first + i) * 32);
                ldmatrix_x4(q_block[i], (k ^ (first + i) * 32) + kHalfTileBytes);
            }
            for (int i = 0; i < kAtOnce; ++i)
                elementwise(k_block[i], q_block[i], k ^ (first + i) * 32, kr ^ (first + i) * 32, e + (first + i) * 16, gates[i],
                            kd[first + i], L, Z, Q);
        }
    }

    // Of a block, as accumulators.
    struct Gates {
        float G[2][4];       // kShift + the cumulated ones
        float total[2][4];   // all of a channel, in every row
    };

    // On the tensor cores: [16, 16] ones on and under the diagonal, or everywhere, @ gate, the gates in fp16: 2^-11 of a gate, which next to
    // bf16 factors does not show.
    __device__ __forceinline__ Gates cumulated_gates(const uint32_t (&g)[4], const float (&offset)[2]) const {
        constexpr float kShifts[4] = {kShift, kShift, kShift, kShift}, kZero[4] = {};
        Gates sums;
        for (int j = 0; j < 2; ++j) {
            const auto gate = [&](float logit) { return rcp_approx(inverse_bound + exp2_approx(fmaf(gate_slope, logit, offset[j]))); };
            const auto gates = [&](uint32_t pair) { return pack_fp16(gate(low_bf16(pair)), gate(high_bf16(pair))); };
            const uint32_t early = gates(g[2 * j]), late = gates(g[2 * j + 1]);
            mma_m16n8k16_fp16(sums.G[j], minus_ones, early, late, kShifts);
            mma_m16n8k16_fp16(sums.total[j], all_minus_ones, early, late, kZero);
        }
        return sums;
    }

    // One block: qd and kr in place of q and g; kd; E; the block's share of L, Z and Q = q q'.
    __device__ __forceinline__ void elementwise(const uint32_t (&k)[4], const uint32_t (&q)[4], uint32_t k_address, uint32_t kr_address,
                                                uint32_t e_address, const Gates& gates, uint32_t (&kd_operand)[4], float (&L)[2][4],
                                                float (&Z)[2][4], float (&Q)[2][4]) const {
        uint32_t kd[4], ki[4], kr[4], qd[4];
        float up[2][4], E[2][2];
        for (int j = 0; j < 2; ++j) {
            for (int i = 0; i < 4; ++i)
                up[j][i] = exp2_approx(gates.G[j][i]);
            for (int i = 0; i < 2; ++i)
                E[j][i] = exp2_approx(gates.total[j][i]);
        }
        for (int x = 0; x < 4; ++x) {
            const int j = x / 2, h = x % 2;
            const float up0 = up[j][2 * h], up1 = up[j][2 * h + 1];
            const uint32_t up_b = pack_bf16(up0, up1);
            kd[x] = multiply_bf16(k[x], up_b);
            qd[x] = multiply_bf16(q[x], up_b);
            const float ki0 = low_bf16(k[x]) * exp2_approx(-gates.G[j][2 * h]), ki1 = high_bf16(k[x]) * exp2_approx(-gates.G[j][2 * h + 1]);
            ki[2 * h + j] = pack_bf16(ki0, ki1);
            kr[2 * h + j] = pack_bf16(ki0 * E[j][0], ki1 * E[j][1]);
        }
        __syncwarp();   // every lane has its part of the input
        stmatrix_x4(kr_address, kr);
        stmatrix_x4(k_address + kHalfTileBytes, qd);
        if (r == 0)
            store_shared_16_bytes(e_address, E[0][0], E[0][1], E[1][0], E[1][1]);
        for (int n = 0; n < 2; ++n) {
            mma_m16n8k16(L[n], kd, ki[2 * n], ki[2 * n + 1]);
            mma_m16n8k16(Z[n], qd, ki[2 * n], ki[2 * n + 1]);
            for (int j = 0; j < 2; ++j)
                mma_m16n8k8(Q[n], &q[2 * j], q[2 * j + n]);
        }
        for (int x = 0; x < 4; ++x)
            kd_operand[x] = transposed(kd[x]);
    }

    // Z and out_scale, once the other warp's half is there.
    __device__ __forceinline__ void outputs(SmallFactors& small, float (&Z)[2][4], const float (&Q)[2][4]) const {
        add(scratch.Z, Z);
        const float2 own = diagonal(Q), others = scratch.q_squares[lane];
        const float q_squares[2] = {own.x + others.x, own.y + others.y};
        uint32_t z[4];
        for (int h = 0; h < 2; ++h) {
            const int row = r + 8 * h;
            for (int n = 0; n < 2; ++n) {
                const int column = 8 * n + 2 * c;
                z[2 * n + h] = pack_bf16(column <= row ? Z[n][2 * h] : 0.0f, column + 1 <= row ? Z[n][2 * h + 1] : 0.0f);
            }
            if (c == 0)
                small.out_scale[row] = scale * rsqrt_approx(q_squares[h] + kNormEpsilon) * kShiftUp;
        }
        stmatrix_x4(smem_address(small.z) + lane * 16, z);
    }

    // T, of which `small` gets one copy scaled for v and the scratch, as the A operand of W, another.
    //
    // X = (I + A)^-1, A = diag(beta) D^2 L, by halves of 8 tokens: X11 and X22 by substitution in fp32 (a product form of the inverse
    // cancels badly where keys repeat), one row a lane, and X21 = -X22 A21 X11 on the tensor cores.
    __device__ __forceinline__ void solve(SmallFactors& small, float beta, const float (&L)[2][4]) const {
        const float2 diagonal_of_L = diagonal(L);   // kd ki' has k k' there: the gates cancel
        const float k_squares[2] = {diagonal_of_L.x, diagonal_of_L.y};
        float A21[2];
        for (int h = 0; h < 2; ++h) {
            const int row = r + 8 * h;
            const float k_norm = rsqrt_approx(k_squares[h] + kNormEpsilon);
            const float beta_d = __shfl_sync(~0u, beta, row) * k_norm, beta_d2 = beta_d * k_norm;
            *reinterpret_cast<float2*>(&scratch.a[h][8 * r + 2 * c]) = {beta_d2 * L[h][2 * h], beta_d2 * L[h][2 * h + 1]};
            if (h == 1)
                for (int i = 0; i < 2; ++i)
                    A21[i] = beta_d2 * L[0][2 + i];
            if (c == 0) {
                scratch.columns[0][row] = beta_d / kShiftUp;   // R is short of kShift powers of two
                scratch.columns[1][row] = -beta_d2;            // so is W, but the state of twice as many; kd has as many too many
            }
        }
        __syncwarp();

        // Row i of X11 (half 0) or X22 is the y with y (I + A) = row i of I, from its last column to the first. The upper half warp does the
        // same again, for the second scaling.
        const int block = lane / 8 % 2, i = lane % 8;
        float y[8];
        for (int j = 0; j < 8; ++j)
            y[j] = i == j ? 1.0f : 0.0f;
        for (int j = 7; j > 0; --j)
            for (int x = 0; x < j; x += 4) {
                const float4 a = *reinterpret_cast<const float4*>(&scratch.a[block][8 * j + x]);
                const float as[4] = {a.x, a.y, a.z, a.w};
                for (int n = 0; n < 4 && x + n < j; ++n)
                    y[x + n] = fmaf(-y[j], as[n], y[x + n]);
            }
        const float* columns = &scratch.columns[lane / 16][8 * block];
        uint32_t packed[4];
        for (int n = 0; n < 4; ++n)
            packed[n] = pack_bf16(y[2 * n] * columns[2 * n], y[2 * n + 1] * columns[2 * n + 1]);
        store_shared_16_bytes(lane < 16 ? smem_address(small.t) + block * kTColumnBytes + lane * 16
                                        : smem_address(scratch.minus_t) + (block * 24 + i) * 16, packed);
        if (lane < 16)
            for (int n = 0; n < 2; ++n)
                *reinterpret_cast<float4*>(&scratch.x[block][i][4 * n]) = {y[4 * n], y[4 * n + 1], y[4 * n + 2], y[4 * n + 3]};
        __syncwarp();

        // The depth of both products is taken in the order 0 2 4 6 1 3 5 7, in which accumulators are operands.
        const float X11[4] = {scratch.x[0][2 * c][r], 0.0f, scratch.x[0][2 * c + 1][r], 0.0f};   // transposed
        const float2 x22 = *reinterpret_cast<const float2*>(&scratch.x[1][r][2 * c]);
        const float X22[4] = {x22.x, 0.0f, x22.y, 0.0f}, zero[4] = {};
        float A21_X11[4], minus_X21[4];
        mma_m16n8k8_tf32(A21_X11, X11, A21[0], A21[1], zero);   // transposed
        mma_m16n8k8_tf32(minus_X21, X22, A21_X11[0], A21_X11[1], zero);
        const float2 for_v = *reinterpret_cast<const float2*>(&scratch.columns[0][2 * c]);
        const float2 for_w = *reinterpret_cast<const float2*>(&scratch.columns[1][2 * c]);
        store_shared_4_bytes(smem_address(small.t) + (8 + r) * 16 + c * 4, pack_bf16(-minus_X21[0] * for_v.x, -minus_X21[1] * for_v.y));
        store_shared_4_bytes(smem_address(scratch.minus_t) + (8 + r) * 16 + c * 4, pack_bf16(-minus_X21[0] * for_w.x, -minus_X21[1] * for_w.y));
    }

    // -W in place of k, in this warp's half.
    __device__ __forceinline__ void products(Stage& stage, const uint32_t (&kd)[kHalfBlocks][4]) const {
        const uint32_t address = smem_address(stage.kq[half]) + block_offset;
        uint32_t minus_T[4];
        ldmatrix_x4(minus_T, smem_address(scratch.minus_t) + lane * 16);
        for (int i = 0; i < kHalfBlocks; ++i) {
            uint32_t minus_W[4];
            for (int j = 0; j < 2; ++j) {
                float w[4] = {};
                mma_m16n8k16(w, minus_T, kd[i][2 * j], kd[i][2 * j + 1]);
                minus_W[2 * j] = pack_bf16(w[0], w[1]);
                minus_W[2 * j + 1] = pack_bf16(w[2], w[3]);
            }
            stmatrix_x4(address ^ i * 32, minus_W);
        }
    }
};

// One warp's part of what its CTA prepares: the chunks that load.cuh loads, by the teams in turn.
__device__ __forceinline__ void prepare_chunks(const KernelParams& p, SharedStorage& smem, int warp) {
    const int team = warp / kTeam, lane = threadIdx.x % 32;
    Preparer preparer(p, smem.scratch[team], team, warp % kTeam);
    const uint32_t rank = blockIdx.x % kPair;
    uint32_t number = team, begun = 0;   // of this CTA's chunks through all chains; chunks of both CTAs' before this chain
    uint32_t pieces = 0, head = ~0u;     // stages taken by pieces so far
    meet_cluster();
    for (uint32_t n = 0; const Chain* next = await_chain(smem, n); give_back_chain(smem, n++)) {
        const Chain& chain = *next;
        pieces += pieces_of(chain);
        const uint32_t chunks = chain.chunks();
        for (uint32_t chunk; (chunk = kPair * number + rank - begun) < chunks; number += kTeams) {
            const uint32_t slot = (number + pieces) % kOwnStages;
            const int valid = chain.length - chunk * kChunk, token = min(lane % kChunk, valid - 1);
            const uint32_t beta = load_global_bf16(p.beta + (chain.first_row + chunk * kChunk + token) * p.heads + chain.head);
            if (head != chain.head) {
                head = chain.head;
                preparer.set_head(p, head);
            }
            const Turn<kOwnStages> loaded(number);   // its turns are the same team's
            static_assert(kOwnStages % kTeams == 0);
            mbarrier_wait(smem_address(&smem.loaded[loaded.slot]), loaded.parity);
            preparer.prepare(smem.stages[slot], smem.small[slot], beta, valid);
            fence_async_proxy();
            mbarrier_arrive(smem_address(&smem.ready[slot]));
        }
        begun += chunks;
    }
}

}  // namespace flash_kda::sm90
