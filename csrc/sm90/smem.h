// The shared-memory map of the forward kernel, drawn once.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "config.h"
#include "schedule.cuh"

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
//   kq     k over q, by halves    [-W over qd]: B [2 kChunk, K], K-major
//   g      gate logits            kr: B [kChunk, K], N-major
//
// Or a piece of a summary, or of a correction: see segments.cuh.
struct Stage {
    HalfTile kq[kHalves][2];
    HalfTile g[kHalves];
};

// The rest of a chunk's factors. wgmma takes t and z as B, K-major without swizzle: 8x8 matrices of 128 bytes, [k / 8][n / 8].
struct SmallFactors {
    bf16 t[2 * kChunk * kChunk];   // [T over 0]: what v adds to [R | O]
    union {
        struct {
            bf16 z[kChunk * kChunk];   // Z
            float e[4][36];            // E in the order of the accumulators: [lane % 4][channel / 8][2]; rows kept apart in banks
            float out_scale[kChunk];   // scale / |q|, and the powers of two that O is short of
        };
        float2 powers[kWarpgroup];     // or, of a summary's piece with the first of B, what its rows are short of
    };
};
constexpr int kTColumnBytes = 2 * kChunk * 8 * 2;   // one k / 8 column of matrices in t
constexpr int kZColumnBytes = kChunk * 8 * 2;       // and in z

// One prepare team's own.
struct PrepareScratch {
    float a[2][8 * 8 + 4];                  // the two systems on the diagonal; only what lies under their diagonals is read
    float x[2][8][12];                      // their inverses; rows kept apart in banks
    alignas(16) float columns[2][kChunk];   // scales of T's columns: as the recurrence wants it, and for W = T D kd
    alignas(16) bf16 minus_t[4 * 8 * 8];    // -T D as the quarters of an A operand, of which the third stays zero
    float4 L[2][32], Z[2][32];              // a member's half of the sum over channels, for the other one; and
    float2 q_squares[32];
};

struct SharedStorage {
    Stage stages[kStages];              // those of chunks prepared here, then those of the other CTA's
    HalfTile values[kValueStages];      // v, of this CTA's half of the channels
    SmallFactors small[kStages];
    PrepareScratch scratch[kTeams];
    HalfTile out[kRecurrenceWarps][kHalves];   // a recurrence warp's way to global memory: outputs, [token, 16 value channels] of two chunks, or 16 rows of M
    Span span;                          // the pair's part of the work
    Chain chains[kChains];              // of it, one after the other
    alignas(16) uint32_t zeros[4];      // instead of values, where there are none

    // Who waits is named last. All lanes of a warp arrive that have read or written what is handed over; of a copy, the thread that asks for it.
    uint64_t chains_ready[kChains];      // load -> all others
    uint64_t chains_empty[kChains];      // all others -> load
    uint64_t loaded[kOwnStages];         // copy engine -> prepare; of the very first chunk, load and load values too
    uint64_t ready[kStages];             // prepare -> recurrence, mail; copy engine, from the other CTA or with pieces -> recurrence
    uint64_t empty[kOwnStages];          // recurrence; that of the other CTA, a lane a warp, or mail -> load
    uint64_t free[kMailStages];          // recurrence of the other CTA, a lane a warp -> mail
    uint64_t values_loaded[kValueStages];   // load values, copy engine -> recurrence
    uint64_t values_empty[kValueStages];    // recurrence -> load values
};

}  // namespace flash_kda::sm90
