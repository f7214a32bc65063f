#pragma once

#include <cuda.h>

#include <cstdint>

namespace flash_kda::sm90 {

// The copy engine's view of a bf16 [rows, heads, 128] tensor: coordinates (channel % 64, row, channel / 64, head), boxes of one
// head's [tokens, 64 * halves], written half by half with the 128-byte swizzle. Throws std::runtime_error. Encoding is host work: nothing is enqueued.
CUtensorMap make_tensor_map(const void* data, int64_t rows, int64_t heads, int tokens, int halves);

}  // namespace flash_kda::sm90
