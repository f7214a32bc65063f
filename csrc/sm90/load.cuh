// A chunk's way from global memory into its stage, by the copy engine.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernel_params.h"
#include "ptx.h"
#include "smem.h"

namespace flash_kda::sm90 {

// Called by one thread. Rows past the tensor arrive as zeros; rows past the sequence are its neighbour's, and are cleared
// before anything looks at them.
__device__ __forceinline__ void load_chunk(const KernelParams& p, const Chain& chain, int chunk, Stage& stage, uint64_t& loaded) {
    const int32_t row = static_cast<int32_t>(chain.first_row) + chunk * kChunk;
    const int32_t head = static_cast<int32_t>(chain.head);
    const auto load = [&](const CUtensorMap& map, HalfTile& to, int half) {
        cute::SM90_TMA_LOAD_4D::copy(&map, &loaded, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), &to, 0, row, half,
                                     head);
    };
    mbarrier_arrive_expect_bytes(loaded, sizeof(Stage));
    for (int half = 0; half < kHalves; ++half) {
        load(p.k, stage.kq[half][0], half);
        load(p.q, stage.kq[half][1], half);
    }
    load(p.g, stage.g[0], 0);   // both halves at once
    load(p.v, stage.v[0], 0);
}

}  // namespace flash_kda::sm90
