// Everything one call carries from the binding to the kernel. Plain data: no PyTorch, no CUDA headers.
#pragma once

#include <cstdint>

namespace flash_kda {

struct Params {
    // Device pointers. Row-major, contiguous; the last dimension is 128 unless said otherwise.
    const void* q;               // bf16 [rows, heads, K]
    const void* k;               // bf16 [rows, heads, K]
    const void* v;               // bf16 [rows, heads, V]
    const void* g;               // bf16 [rows, heads, K], gate logits
    const void* beta;            // bf16 [rows, heads], logits
    void* out;                   // bf16 [rows, heads, V]
    const float* A_log;          // [heads]
    const float* dt_bias;        // [heads, K]
    const void* initial_state;   // bf16 or fp32 [num_sequences, heads, V, K], or null: zeros
    void* final_state;           // same dtype and shape, or null: not wanted; may be initial_state itself
    const int64_t* cu_seqlens;   // [num_sequences + 1], or null: every sequence has `tokens` tokens

    void* workspace;             // of Plan::workspace_bytes, aligned to 16 bytes; whatever it holds

    int64_t num_sequences;
    int64_t tokens;              // of one sequence; with cu_seqlens, of the whole pack
    int64_t heads;
    bool state_is_fp32;
    float scale;
    float lower_bound;

    int device;
    void* stream;                // cudaStream_t

    // Token rows in q, k, v, g, beta and out.
    int64_t rows() const { return cu_seqlens ? tokens : num_sequences * tokens; }
};

}  // namespace flash_kda
