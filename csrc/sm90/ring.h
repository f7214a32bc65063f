// Where one side stands in a ring of shared-memory slots.
#pragma once

#include <cstdint>

namespace flash_kda::sm90 {

template <int kStages>
struct RingCursor {
    int slot = 0;
    uint32_t phase = 0;   // flips at each turn: the parity to wait for where a slot was filled, and its inverse where it was emptied

    __device__ void advance(int steps = 1) {
        slot += steps;
        if (slot >= kStages) {
            slot -= kStages;
            phase ^= 1;
        }
    }
};

}  // namespace flash_kda::sm90
