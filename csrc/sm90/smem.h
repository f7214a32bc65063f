// The shared-memory map of the forward kernel, drawn once.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "config.h"

namespace flash_kda::sm90 {

using bf16 = __nv_bfloat16;

// [kChunk, kDim] bf16 as two halves of kHalf channels: [half][token][128 bytes], 16-byte units xor-swizzled by token % 8 (the
// 128-byte swizzle of the copy engine and of wgmma), so that ldmatrix, stmatrix and wgmma all meet no bank conflict.
struct alignas(1024) Tile {
    bf16 data[kChunk * kDim];
};
constexpr int kTileBytes = sizeof(Tile);
constexpr int kTileHalfBytes = kTileBytes / 2;

// Written by the copy engine, read by one prepare group.
struct InputStage {
    Tile q, k, g;
};

// Written by one prepare group, read by both recurrence groups.
struct alignas(1024) FactorStage {
    bf16 w[2 * kChunk * kDim];   // [-W | qd - Z W]: wgmma B, [half][2 * kChunk rows][128 bytes] swizzled, K-major
    Tile kr;                     // wgmma B, N-major
    bf16 t[2 * kChunk * kChunk]; // [T | Z T]: wgmma B, K-major without swizzle: 8x8 matrices of 128 bytes, [k / 8][n / 8]
    float e[4][36];              // E in the order of the accumulators: [lane % 4][channel / 8][2], rows padded apart in banks
};
constexpr int kWHalfBytes = 2 * kChunk * kHalf * 2;
constexpr int kTColumnBytes = 2 * kChunk * 8 * 2;   // one k / 8 column of matrices in t

// One prepare group's own.
struct PrepareScratch {
    float4 partial[4][4][32];      // [warp][L or Z, column half][lane]: sums over each warp's channels
    float a[kChunk][kChunk + 4];   // diag(beta) L; only what lies under the diagonal is read
    float z[kChunk][kChunk + 4];   // Z, zero above the diagonal
    float norm[2][kChunk][4];      // [q or k][token][warp]: sums of squares over each warp's channels
    float beta[kChunk];
};

struct SharedStorage {
    InputStage input[kInputStages];
    Tile v[kValueStages];                           // written by the copy engine, read by both recurrence groups
    FactorStage factors[kFactorStages];
    PrepareScratch scratch[kPrepareGroups];
    bf16 out[kRecurrenceGroups * 4][kChunk * 16];   // one warp's [token, 16 value channels], on its way to global memory
    uint64_t input_full[kInputStages];              // q, k, g and the v of the same chunk have landed
    uint64_t factor_full[kFactorStages];            // an arrival a prepare warp
    uint64_t factor_empty[kFactorStages];           // an arrival a recurrence warp
};
static_assert(sizeof(SharedStorage) <= 227 * 1024);

}  // namespace flash_kda::sm90
