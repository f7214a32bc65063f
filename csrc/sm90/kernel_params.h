// What the kernel receives.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "config.h"

namespace flash_kda::sm90 {

// What a pair leaves for others: a state or B in the order of its two warpgroups' registers, M as wgmma reads it.
struct alignas(64) Handover {   // whole sectors, however many
    union {
        float4 state[kHalves][kStateRegisters / 4][kWarpgroup];
        struct {   // or a segment's B, or its M, in fp16: see segments.cuh
            uint4 B[kHalves][kStateRegisters / 8][kWarpgroup];
            float2 powers[kHalves][kWarpgroup];   // of two that B's rows are short of
        };
        struct {
            __half M[kBlocks][kHalves][16 * kHalf];
            int memory[kHalves * kRecurrenceWarps];   // chunks before a warp's rows of it were as good as zero
        };
    };
    uint64_t left[kHalves];   // the ticket, once a CTA has left its half, and one more for each fetch of it
};

struct Workspace {
    Handover* handovers;   // What they hold before the call does not matter.
    uint32_t count;        // so many fit
    uint64_t ticket;       // this launch's own; never seen in memory by chance. Its low 16 bits are zero.
};

struct KernelParams {
    CUtensorMap q, k, v_map, g;   // [rows, heads, kDim]: see tensor_map.h
    CUtensorMap out_map, Y_map;   // of kCorrected tokens a box
    // What finds the chains: in a constant cache's line of its own, for a launch begins with a miss for every line it looks at.
    uint32_t num_sequences, heads;
    int64_t tokens;
    const int64_t* cu_seqlens;
    Workspace workspace;
    int tasks;                // of a chain that is cut, at most,
    int least_chunks;         // and of a unit, at least, on average
    uint32_t regular_pairs;   // of CTAs; the others are spare,
    int spare_chunks;         // and so long are the two units of a chain that are theirs. Zero: it has none

    const __nv_bfloat16* v;
    const __nv_bfloat16* beta;
    __nv_bfloat16* out;
    __nv_bfloat16* Y;         // [rows, heads, kDim], of segments: see segments.cuh. What it holds before the call does not matter.
    const float* A_log;
    const float* dt_bias;
    const void* initial_state;
    void* final_state;
    bool state_is_fp32;
    float scale;
    float lower_bound;
};

}  // namespace flash_kda::sm90
