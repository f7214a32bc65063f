// Stands for CUDA's header: a tensor map is what csrc/sm90/tensor_map.h encodes.
#pragma once

#include <cstdint>

struct CUtensorMap {
    const void* data;   // bf16 [rows, heads, 128]
    int64_t rows, heads;
    int tokens, halves; // of 64 channels, a box
};
