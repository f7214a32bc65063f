// Descriptors of matrices in shared memory, as wgmma takes them.
#pragma once

#include <cstdint>

namespace flash_kda::sm90 {

enum class Swizzle : uint32_t { kNone = 0, k128Bytes = 1 };

using MatrixDescriptor = uint64_t;

// Where a matrix begins, as a descriptor has it: in units of 16 bytes, and without the CTA's rank in its cluster, which is in the upper
// bits of an address and would spill over into the descriptor's next field.
__device__ __forceinline__ uint32_t in_sixteenths(uint32_t address) { return (address & 0x3ffff) >> 4; }

// Offsets in bytes. K-major: `leading` from one 16-byte column of 8x8 matrices to the next (unused when swizzled), `stride` from 8 rows to
// the next. N-major, swizzled: `leading` from 64 columns to the next, `stride` from 8 rows to the next. Sums and shifts rather than bit
// fields: with these the compiler makes the descriptor of another place by a single addition.
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(uint32_t sixteenths, Swizzle swizzle, uint32_t leading, uint32_t stride) {
    const uint32_t low = sixteenths + (leading >> 4 << 16), high = stride >> 4 | static_cast<uint32_t>(swizzle) << 30;
    return static_cast<MatrixDescriptor>(high) << 32 | low;
}

}  // namespace flash_kda::sm90
