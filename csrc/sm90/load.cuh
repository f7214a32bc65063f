// Loads: which tiles of a chunk go where, by the copy engine. One thread of the prepare group that will use them asks for them.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "kernel_params.h"
#include "ptx.h"
#include "smem.h"

namespace flash_kda::sm90 {

// [kChunk, kDim] of one head, from `row` on. Rows past the tensor arrive as zeros; rows past the sequence belong to its
// neighbour, and whoever reads the tile has to mask them.
__device__ __forceinline__ void load_tile(const CUtensorMap& map, Tile& tile, uint64_t& bar, const Chain& chain, int64_t row) {
    cute::SM90_TMA_LOAD_4D::copy(&map, &bar, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), &tile, 0,
                                 static_cast<int32_t>(row), 0, static_cast<int32_t>(chain.head));
}

__device__ __forceinline__ void load_chunk(const KernelParams& p, const Chain& chain, int chunk, InputStage& input, Tile& v,
                                           uint64_t& full) {
    if (chunk >= chain.chunks())
        return;
    const int64_t row = chain.first_row + chunk * kChunk;
    mbarrier_arrive_expect_bytes(full, sizeof(InputStage) + sizeof(Tile));
    load_tile(p.g, input.g, full, chain, row);
    load_tile(p.k, input.k, full, chain, row);
    load_tile(p.q, input.q, full, chain, row);
    load_tile(p.v, v, full, chain, row);
}

}  // namespace flash_kda::sm90
