// pybind11 face of the kernels. Tensors arrive as addresses, so that the module needs no symbol of PyTorch's.
#include <pybind11/pybind11.h>

#include "launch.h"
#include "params.h"
#include "plan.h"

namespace py = pybind11;

namespace flash_kda {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void fwd(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t g, uintptr_t beta, uintptr_t out, uintptr_t A_log,
         uintptr_t dt_bias, uintptr_t initial_state, uintptr_t final_state, uintptr_t cu_seqlens, int64_t num_sequences,
         int64_t tokens, int64_t heads, bool state_is_fp32, double scale, double lower_bound, int device,
         uintptr_t stream) {
    Params params{};
    params.q = pointer<const void>(q);
    params.k = pointer<const void>(k);
    params.v = pointer<const void>(v);
    params.g = pointer<const void>(g);
    params.beta = pointer<const void>(beta);
    params.out = pointer<void>(out);
    params.A_log = pointer<const float>(A_log);
    params.dt_bias = pointer<const float>(dt_bias);
    params.initial_state = pointer<const void>(initial_state);
    params.final_state = pointer<void>(final_state);
    params.cu_seqlens = pointer<const int64_t>(cu_seqlens);
    params.num_sequences = num_sequences;
    params.tokens = tokens;
    params.heads = heads;
    params.state_is_fp32 = state_is_fp32;
    params.scale = static_cast<float>(scale);
    params.lower_bound = static_cast<float>(lower_bound);
    params.device = device;
    params.stream = pointer<void>(stream);
    launch(params, make_plan(num_sequences, tokens, heads, cu_seqlens != 0));
}

py::dict plan(int64_t num_sequences, int64_t tokens, int64_t heads, bool packed) {
    const Plan p = make_plan(num_sequences, tokens, heads, packed);
    py::dict d;
    d["chains"] = p.chains;
    d["grid"] = p.grid;
    return d;
}

}  // namespace
}  // namespace flash_kda

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of flash_kda; call flash_kda.fwd, which validates, instead.";
    m.attr("CUDA_ARCHS") = FLASH_KDA_CUDA_ARCHS;
    m.def("fwd", &flash_kda::fwd, "Launches the forward pass on addresses that the caller has validated.");
    m.def("plan", &flash_kda::plan, py::arg("num_sequences"), py::arg("tokens"), py::arg("heads"), py::arg("packed"),
          "How a call would be laid out. Raises ValueError for sizes that cannot be launched.");
}
