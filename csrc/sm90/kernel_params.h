// What the kernel receives, and the work of one CTA.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "config.h"

namespace flash_kda::sm90 {

struct KernelParams {
    CUtensorMap q, k, v, g;   // [rows, heads, kDim]: see tensor_map.h
    const __nv_bfloat16* beta;
    __nv_bfloat16* out;
    const float* A_log;
    const float* dt_bias;
    const void* initial_state;
    void* final_state;
    const int64_t* cu_seqlens;
    int64_t tokens;
    uint32_t heads;
    bool state_is_fp32;
    float scale;
    float lower_bound;
};

// One head of one sequence.
struct Chain {
    uint32_t head;
    int64_t state_offset;   // elements, into the states
    int64_t first_row;      // of its tokens
    int length;             // tokens

    __device__ int chunks() const { return (length + kChunk - 1) / kChunk; }
};

__device__ __forceinline__ Chain find_chain(const KernelParams& p, uint32_t index) {
    const uint32_t sequence = index / p.heads;
    Chain chain;
    chain.head = index - sequence * p.heads;
    chain.state_offset = static_cast<int64_t>(index) * kDim * kDim;
    if (p.cu_seqlens == nullptr) {
        chain.first_row = sequence * p.tokens;
        chain.length = static_cast<int>(p.tokens);
        return chain;
    }
    // The host cannot look at cu_seqlens without a sync. Whatever it holds, no row outside [0, tokens) is touched.
    const auto inside = [&](int64_t x, int64_t low) { return min(max(x, low), p.tokens); };
    chain.first_row = inside(p.cu_seqlens[sequence], 0);
    chain.length = static_cast<int>(inside(p.cu_seqlens[sequence + 1], chain.first_row) - chain.first_row);
    return chain;
}

}  // namespace flash_kda::sm90
