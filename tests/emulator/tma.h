// Stands for csrc/sm90/tma.h: a box lands at once.
#pragma once

#include <cuda.h>

#include "ptx.h"
#include "smem.h"

namespace flash_kda::sm90 {

template <bool kOnce>
void load_box(const CUtensorMap& map, uint64_t& loaded, HalfTile& to, int row, int half, int head) {
    if (smem_address(&to) % alignof(HalfTile) != 0 || half + map.halves > kHalves || head < 0 || head >= map.heads)
        emulator::fail("a box that cannot be copied");
    Barrier& b = barrier(loaded);
    const int bytes = map.halves * map.tokens * kHalf * 2;
    emulator::races::copied(&to, nullptr, bytes, &b);
    emulator::races::Quiet quiet;
    for (int h = 0; h < map.halves; ++h)
        for (int t = 0; t < map.tokens; ++t)
            for (int unit = 0; unit < 8; ++unit) {
                uint8_t* place = emulator::shared(smem_address(&to) + (h * map.tokens + t) * 128 + (unit ^ t % 8) * 16, 16);
                const int64_t element = ((row + t) * map.heads + head) * kDim + (half + h) * kHalf + unit * 8;
                if (row + t >= 0 && row + t < map.rows)
                    memcpy(place, static_cast<const __nv_bfloat16*>(map.data) + element, 16);
                else
                    memset(place, 0, 16);
            }
    b.bytes -= bytes;
    settle(b);
}

inline void prefetch_map(const CUtensorMap&) {}

}  // namespace flash_kda::sm90
