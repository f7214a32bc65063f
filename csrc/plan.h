// How a call is laid out on the machine. Host C++ without CUDA, so that it is read and tested without a GPU.
#pragma once

#include <cstdint>

namespace flash_kda {

struct Plan {
    int64_t chains;   // (sequence, head) pairs: independent, each one serial in time
    uint32_t grid;    // CTAs: one a chain, so that the hardware hands the next chain to the first free SM
};

// Throws std::invalid_argument where the sizes cannot be launched or addressed.
Plan make_plan(int64_t num_sequences, int64_t tokens, int64_t heads, bool packed);

}  // namespace flash_kda
