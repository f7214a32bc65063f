// The shared-memory map of the forward kernel, drawn once.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "config.h"

namespace flash_kda::sm90 {

using bf16 = __nv_bfloat16;

// [kChunk, kHalf] bf16: 16 rows of 128 bytes whose 16-byte units are xor-swizzled by row % 8, the 128-byte swizzle of the copy
// engine and of wgmma; ldmatrix and stmatrix meet no bank conflict in it either.
struct alignas(1024) HalfTile {
    bf16 data[kChunk * kHalf];
};
constexpr int kHalfTileBytes = sizeof(HalfTile);

// A chunk, from raw input to the factors of its step, which take the place of the input they came from.
//
//          copy engine writes     prepare makes of it, for wgmma
//   kq     k over q, by halves    [-W over qd]: B [2 kChunk, K], K-major     (in between: kd over qd)
//   g      gate logits            ki: B [kChunk, K], N-major
//   v      v                      left alone; the recurrence takes it as A through registers
struct Stage {
    HalfTile kq[kHalves][2];
    HalfTile g[kHalves];
    HalfTile v[kHalves];
};

// The rest of a chunk's factors. wgmma takes t and z as B, K-major without swizzle: 8x8 matrices of 128 bytes, [k / 8][n / 8].
struct SmallFactors {
    bf16 t[2 * kChunk * kChunk];   // [T over 0]: what v adds to [R | O]
    bf16 z[kChunk * kChunk];       // Z
    float e[4][36];                // E in the order of the accumulators: [lane % 4][channel / 8][2]; rows kept apart in banks
    float out_scale[kChunk];       // scale / |q|, and the powers of two that O is short of
};
constexpr int kTColumnBytes = 2 * kChunk * 8 * 2;   // one k / 8 column of matrices in t
constexpr int kZColumnBytes = kChunk * 8 * 2;       // and in z

// One prepare warp's own.
struct PrepareScratch {
    float a[kChunk][kChunk + 4];                 // the system that T solves; only what lies under the diagonal is read
    alignas(16) float columns[2][kChunk];        // scales of T's columns: as the recurrence wants it, and for W = T D kd
    alignas(16) bf16 t_for_w[kChunk * kChunk];   // -T D, in the order of z
};

struct SharedStorage {
    Stage stages[kStages];
    SmallFactors small[kStages];
    PrepareScratch scratch[kPrepareWarps];
    bf16 out[kRecurrenceWarps][kChunk * 16];   // one warp's [token, 16 value channels], on its way to global memory
    float gate_offset[kDim];                   // of this head; see prepare.cuh
    uint64_t loaded[kStages];                  // copy engine -> prepare
    uint64_t ready[kStages];                   // prepare -> recurrence, one arrival
    uint64_t empty[kStages];                   // recurrence -> prepare, an arrival a warp
};
static_assert(sizeof(SharedStorage) <= 227 * 1024);

}  // namespace flash_kda::sm90
