// A chunk's way from global memory into its stage, by the copy engine.
#pragma once

#include "kernel_params.h"
#include "ptx.h"
#include "smem.h"
#include "tma.h"

namespace flash_kda::sm90 {

// Called by one thread. Rows past the tensor arrive as zeros; rows past the sequence are its neighbour's, and are cleared
// before anything looks at them.
__device__ __forceinline__ void load_chunk(const KernelParams& p, const Chain& chain, int chunk, Stage& stage, uint64_t& loaded) {
    const int row = static_cast<int>(chain.first_row) + chunk * kChunk, head = static_cast<int>(chain.head);
    const auto load = [&](const CUtensorMap& map, HalfTile& to, int half) { load_box(map, loaded, to, row, half, head); };
    mbarrier_arrive_expect_bytes(loaded, sizeof(Stage));
    for (int half = 0; half < kHalves; ++half) {
        load(p.k, stage.kq[half][0], half);
        load(p.q, stage.kq[half][1], half);
    }
    load(p.g, stage.g[0], 0);   // both halves at once
    load(p.v, stage.v[0], 0);
}

}  // namespace flash_kda::sm90
