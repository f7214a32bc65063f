// Where something stands in a ring of slots in shared memory.
#pragma once

#include <cstdint>

namespace flash_kda::sm90 {

// The slot of the n-th thing, and the parity of its turn: what to wait for where the slot is filled, and the inverse where it is emptied.
// A wait tells only odd turns from even ones: whoever waits for a slot must have seen, or know of, every turn before.
template <int kSlots>
struct Turn {
    static_assert((kSlots & (kSlots - 1)) == 0);
    uint32_t slot, parity;

    __device__ __forceinline__ explicit Turn(uint32_t n) : slot(n % kSlots), parity(n / kSlots % 2) {}
};

}  // namespace flash_kda::sm90
