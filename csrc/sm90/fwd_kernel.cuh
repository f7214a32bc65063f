// The fused forward kernel: raw tensors in, outputs and states out.
#pragma once

#include <type_traits>

#include "kernel_params.h"
#include "load.cuh"
#include "prepare.cuh"
#include "ptx.h"
#include "recurrence.cuh"
#include "schedule.cuh"
#include "segments.cuh"
#include "smem.h"

namespace flash_kda::sm90 {

// By one thread.
__device__ __forceinline__ void init_barriers(SharedStorage& smem) {
    const auto init = [](uint64_t* barriers, int count, int arrivals) {
        for (int i = 0; i < count; ++i)
            mbarrier_init(barriers[i], arrivals);
    };
    init(smem.chains_ready, kChains, 32);
    init(smem.chains_empty, kChains, (kRecurrenceWarps + kPrepareWarps + 2) * 32);
    init(smem.loaded, kOwnStages, 1);
    init(smem.ready, kOwnStages, kTeam * 32);
    init(smem.ready + kOwnStages, kMailStages, 1);
    init(smem.empty, kOwnStages, kRecurrenceWarps * 32 + kRecurrenceWarps);
    init(smem.free, kMailStages, kRecurrenceWarps);
    init(smem.values_loaded, kValueStages, 32);
    init(smem.values_empty, kValueStages, kRecurrenceWarps * 32);
    fence_mbarrier_init();
}

// For what stays zero: half of t, a quarter of minus_t. Called by all warps but the loading ones.
template <class T, int kCount>
__device__ inline void clear(T (&to)[kCount]) {
    static_assert(sizeof(to) % sizeof(uint4) == 0);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(to) / sizeof(uint4)); i += kCtaThreads - kLoadWarps * 32)
        reinterpret_cast<uint4*>(to)[i] = {};
    fence_async_proxy();
}

template <Sharing kSharing>
__global__ void __launch_bounds__(kCtaThreads, 1) fwd_kernel(const __grid_constant__ KernelParams p) {
    static_assert(sizeof(SharedStorage) <= 227 * 1024);
    auto& smem = *static_cast<SharedStorage*>(dynamic_shared_memory());
    constexpr int kLoader = kRecurrenceWarps + kPrepareWarps;   // the first of the loading warps
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);   // the compiler sees that lanes agree
    if constexpr (kSharing == Sharing::kSpans) {
        find_span(p, smem.span);
        __syncthreads();
    }
    // Each role meets the cluster before it looks at a barrier. A CTA ends when the other one has said to it all that it will: its
    // loading warps wait for that.
    if (warp >= kLoader) {
        give_back_registers<kLoadRegisters>();
        if (warp == kLoader)
            load_chunks<kSharing>(p, smem);
        else if (warp == kLoader + 1)
            load_values<kSharing>(p, smem);
        else if (warp == kLoader + 2)
            mail_chunks(smem);
        else
            meet_cluster();
        return;
    }
    if (threadIdx.x == 0)
        init_barriers(smem);
    if (threadIdx.x == 32 && p.tokens > 0) {
        prefetch_map(p.g);
        prefetch_map(p.k);
        prefetch_map(p.q);
        prefetch_map(p.v_map);
        if (kSharing == Sharing::kSegments) {
            prefetch_map(p.out_map);
            prefetch_map(p.Y_map);
        }
    }
    clear(smem.small);
    clear(smem.scratch);
    clear(smem.zeros);
    if (warp < kRecurrenceWarps) {
        take_registers<kRecurrenceRegisters>();
        recur_chains<kSharing>(p, smem);
    } else {
        take_registers<kPrepareRegisters>();
        prepare_chunks(p, smem, warp - kRecurrenceWarps);
    }
}

}  // namespace flash_kda::sm90
