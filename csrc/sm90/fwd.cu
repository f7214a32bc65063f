// The fused forward kernel: one CTA carries one head of one sequence from its first token to its last.
#include <cutlass/arch/reg_reconfig.h>

#include <stdexcept>
#include <string>

#include "../launch.h"
#include "kernel_params.h"
#include "prepare.cuh"
#include "ptx.h"
#include "recurrence.cuh"
#include "smem.h"
#include "tensor_map.h"

namespace flash_kda {
namespace sm90 {

// For the half of t that stays zero.
__device__ void clear_small_factors(SharedStorage& smem) {
    static_assert(sizeof(smem.small) % sizeof(uint4) == 0);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(smem.small) / sizeof(uint4)); i += kThreads)
        reinterpret_cast<uint4*>(smem.small)[i] = {};
    fence_async_proxy();
}

__global__ void __launch_bounds__(kThreads, 1) fwd_kernel(const __grid_constant__ KernelParams p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(shared);
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
        cutlass::arch::warpgroup_reg_dealloc<kPrepareRegisters>();
        prepare_chain(p, find_chain(p, blockIdx.x), smem, threadIdx.x / 32);
    } else {
        cutlass::arch::warpgroup_reg_alloc<kRecurrenceRegisters>();
        recur_chain(p, find_chain(p, blockIdx.x), smem, warpgroup - kPrepareGroups);
    }
}

}  // namespace sm90

namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes `device` current for as long as it lives.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) {
            check(cudaSetDevice(device), "cudaSetDevice");
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_)
            cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace

void launch(const Params& params, const Plan& plan) {
    using namespace sm90;
    if (plan.grid == 0)
        return;
    DeviceGuard guard(params.device);
    // Cheap, and a device's own: no cache of which devices have had it.
    check(cudaFuncSetAttribute(fwd_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedStorage)),
          "cudaFuncSetAttribute");

    KernelParams p{};
    if (params.rows() > 0) {   // without tokens no map is looked at
        p.q = make_tensor_map(params.q, params.rows(), params.heads, 1);
        p.k = make_tensor_map(params.k, params.rows(), params.heads, 1);
        p.v = make_tensor_map(params.v, params.rows(), params.heads, kHalves);
        p.g = make_tensor_map(params.g, params.rows(), params.heads, kHalves);
    }
    p.beta = static_cast<const bf16*>(params.beta);
    p.out = static_cast<bf16*>(params.out);
    p.A_log = params.A_log;
    p.dt_bias = params.dt_bias;
    p.initial_state = params.initial_state;
    p.final_state = params.final_state;
    p.cu_seqlens = params.cu_seqlens;
    p.tokens = params.tokens;
    p.heads = static_cast<uint32_t>(params.heads);
    p.state_is_fp32 = params.state_is_fp32;
    p.scale = params.scale;
    p.lower_bound = params.lower_bound;

    fwd_kernel<<<plan.grid, kThreads, sizeof(SharedStorage), static_cast<cudaStream_t>(params.stream)>>>(p);
    check(cudaGetLastError(), "launching the forward kernel");
}

}  // namespace flash_kda
