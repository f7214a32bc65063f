// Addresses of 8x8 matrices in the kernel's tiles, as ldmatrix.x4 and stmatrix.x4 want them: lane l gives row l % 8 of
// matrix l / 8, and the four matrices are the quarters of a [16, 16] block: (rows 0-7, columns 0-7), (rows 8-15, columns 0-7),
// (rows 0-7, columns 8-15), (rows 8-15, columns 8-15). That is the register order of an mma A fragment.
#pragma once

#include <cstdint>

namespace flash_kda::sm90 {

// Byte offset, in rows of 128 swizzled bytes, of the block whose first 16-byte unit is `unit`.
__device__ __forceinline__ uint32_t swizzled_block_offset(int lane, int unit) {
    const int row = lane & 15;
    return row * 128 + (((unit + (lane >> 4)) ^ (lane & 7)) << 4);
}

}  // namespace flash_kda::sm90
