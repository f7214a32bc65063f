// The copy engine, through CuTe's atom.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "smem.h"

namespace flash_kda::sm90 {

// A tensor map's box [tokens, 64 channels] of as many halves as it has, from this row, half and head on. Called by one thread; the bytes
// count for `loaded`. Whoever reads them does so once: L2 need not keep them.
__device__ __forceinline__ void load_box(const CUtensorMap& map, uint64_t& loaded, HalfTile& to, int row, int half, int head) {
    cute::SM90_TMA_LOAD_4D::copy(&map, &loaded, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), &to, 0, row, half, head);
}

}  // namespace flash_kda::sm90
