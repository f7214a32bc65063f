// The copy engine, through CuTe's atom.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "smem.h"

namespace flash_kda::sm90 {

// A tensor map's box [tokens, 64 channels] of as many tokens and halves as it has, from this row, half and head on. Called by one thread; the bytes
// count for `loaded`. `kOnce`: nobody else will want them from L2.
template <bool kOnce>
__device__ __forceinline__ void load_box(const CUtensorMap& map, uint64_t& loaded, HalfTile& to, int row, int half, int head) {
    constexpr auto hint = kOnce ? cute::TMA::CacheHintSm90::EVICT_FIRST : cute::TMA::CacheHintSm90::EVICT_NORMAL;
    cute::SM90_TMA_LOAD_4D::copy(&map, &loaded, static_cast<uint64_t>(hint), &to, 0, row, half, head);
}

// Saves the first load the time that it takes to get there.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) { cute::prefetch_tma_descriptor(&map); }

}  // namespace flash_kda::sm90
