// Launches the forward kernel.
#include <stdexcept>
#include <string>

#include "../launch.h"
#include "fwd_kernel.cuh"
#include "kernel_params.h"
#include "tensor_map.h"

namespace flash_kda {

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
