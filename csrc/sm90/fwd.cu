// Launches the forward kernel.
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

#include "../launch.h"
#include "fwd_kernel.cuh"
#include "kernel_params.h"
#include "tensor_map.h"

namespace flash_kda {

static_assert(sizeof(sm90::Handover) == kHandoverBytes);

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

// Another one for every launch, far apart (the finaliser of splitmix64): what workspaces may hold from before is never one by chance.
uint64_t next_ticket() {
    static std::atomic<uint64_t> launches{static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count())};
    uint64_t x = launches.fetch_add(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return (x ^ x >> 31 | 1 << 16) & ~uint64_t{0xffff};   // not zero: that is a ticket used up. The low bits count.
}

struct Kernel {
    void (*function)(sm90::KernelParams);
    int shared_bytes;
};

Kernel kernel_for(sm90::Sharing sharing) {
    using namespace sm90;
    switch (sharing) {
        case Sharing::kSpans: return {fwd_kernel<Sharing::kSpans>, sizeof(SharedStorage)};
        case Sharing::kSegments: return {fwd_kernel<Sharing::kSegments>, sizeof(SharedStorage)};
    }
    return {};
}

}  // namespace

void launch(const Params& params, const Plan& plan) {
    using namespace sm90;
    if (plan.grid == 0)
        return;
    DeviceGuard guard(params.device);
    const Sharing sharing = plan.sharing;
    const Kernel kernel = kernel_for(sharing);
    // Cheap, and a device's own: no cache of which devices have had it.
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes), "cudaFuncSetAttribute");

    KernelParams p{};
    if (params.rows() > 0) {   // without tokens no map is looked at
        p.q = make_tensor_map(params.q, params.rows(), params.heads, kChunk, 1);
        p.k = make_tensor_map(params.k, params.rows(), params.heads, kChunk, 1);
        p.v_map = make_tensor_map(params.v, params.rows(), params.heads, kChunk, 1);
        p.g = make_tensor_map(params.g, params.rows(), params.heads, kChunk, kHalves);
        if (sharing == Sharing::kSegments) {
            p.out_map = make_tensor_map(params.out, params.rows(), params.heads, kCorrected, 1);
            p.Y_map = make_tensor_map(params.workspace, params.rows(), params.heads, kCorrected, kHalves);
        }
    }
    p.v = static_cast<const bf16*>(params.v);
    p.beta = static_cast<const bf16*>(params.beta);
    p.out = static_cast<bf16*>(params.out);
    p.A_log = params.A_log;
    p.dt_bias = params.dt_bias;
    p.initial_state = params.initial_state;
    p.final_state = params.final_state;
    p.cu_seqlens = params.cu_seqlens;
    p.Y = static_cast<bf16*>(params.workspace);
    p.workspace.handovers = reinterpret_cast<Handover*>(static_cast<char*>(params.workspace) + plan.Y_bytes());
    p.workspace.count = static_cast<uint32_t>(plan.handovers);
    p.workspace.ticket = next_ticket();
    p.tokens = params.tokens;
    p.tasks = plan.tasks;
    p.least_chunks = plan.least_chunks;
    p.regular_pairs = static_cast<uint32_t>(plan.pairs() - plan.spare_pairs);
    p.spare_chunks = plan.spare_chunks;
    p.num_sequences = static_cast<uint32_t>(params.num_sequences);
    p.heads = static_cast<uint32_t>(params.heads);
    p.state_is_fp32 = params.state_is_fp32;
    p.scale = params.scale;
    p.lower_bound = params.lower_bound;

    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kPair, 1, 1};
    attributes[1].id = cudaLaunchAttributeCooperative;   // where pairs wait for one another, all must be there at once
    attributes[1].val.cooperative = sharing == Sharing::kSegments;
    cudaLaunchConfig_t config{};
    config.gridDim = plan.grid;
    config.blockDim = kCtaThreads;
    config.dynamicSmemBytes = kernel.shared_bytes;
    config.stream = static_cast<cudaStream_t>(params.stream);
    config.attrs = attributes;
    config.numAttrs = 2;
    check(cudaLaunchKernelEx(&config, kernel.function, p), "launching the forward kernel");
}

}  // namespace flash_kda
