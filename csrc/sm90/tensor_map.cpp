#include "tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "config.h"

namespace flash_kda::sm90 {

namespace {

// Asked of the driver at run time, so that the module loads where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    static const auto found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
            throw std::runtime_error("the CUDA driver offers no cuTensorMapEncodeTiled (needs a driver for CUDA 12 or newer)");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return found;
}

}  // namespace

CUtensorMap make_tensor_map(const void* data, int64_t rows, int64_t heads, int tokens, int halves) {
    constexpr uint64_t kRowBytes = kDim * 2;
    const uint64_t sizes[4] = {kHalf, static_cast<uint64_t>(rows), kHalves, static_cast<uint64_t>(heads)};
    const uint64_t strides[3] = {heads * kRowBytes, kHalf * 2, kRowBytes};   // of all but the first coordinate
    const uint32_t box[4] = {kHalf, static_cast<uint32_t>(tokens), static_cast<uint32_t>(halves), 1};
    const uint32_t steps[4] = {1, 1, 1, 1};
    CUtensorMap map;
    const CUresult error = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), sizes, strides, box, steps,
                                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(error));
    return map;
}

}  // namespace flash_kda::sm90
