// The fused forward kernel: one CTA carries one head of one sequence from its first token to its last.
#pragma once

#include "kernel_params.h"
#include "prepare.cuh"
#include "ptx.h"
#include "recurrence.cuh"
#include "smem.h"

namespace flash_kda::sm90 {

// For the half of t that stays zero.
__device__ void clear_small_factors(SharedStorage& smem) {
    static_assert(sizeof(smem.small) % sizeof(uint4) == 0);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(smem.small) / sizeof(uint4)); i += kThreads)
        reinterpret_cast<uint4*>(smem.small)[i] = {};
    fence_async_proxy();
}

__global__ void __launch_bounds__(kThreads, 1) fwd_kernel(const __grid_constant__ KernelParams p) {
    SharedStorage& smem = *static_cast<SharedStorage*>(dynamic_shared_memory());
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            mbarrier_init(smem.loaded[s], 1);
            mbarrier_init(smem.ready[s], 1);
            mbarrier_init(smem.empty[s], kRecurrenceWarps);
        }
        fence_mbarrier_init();
    }
    Preparer::fill_gate_offset(p, find_chain(p, blockIdx.x), smem);
    clear_small_factors(smem);
    __syncthreads();

    // Each role finds the chain for itself: carried across the branch, one register of it was spilled.
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup < kPrepareGroups) {
        give_back_registers<kPrepareRegisters>();
        prepare_chain(p, find_chain(p, blockIdx.x), smem, threadIdx.x / 32);
    } else {
        take_registers<kRecurrenceRegisters>();
        recur_chain(p, find_chain(p, blockIdx.x), smem, warpgroup - kPrepareGroups);
    }
}

}  // namespace flash_kda::sm90
