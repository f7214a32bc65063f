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
         uintptr_t dt_bias, uintptr_t initial_state, uintptr_t final_state, uintptr_t cu_seqlens, uintptr_t workspace, int64_t num_sequences,
         int64_t tokens, int64_t heads, bool state_is_fp32, double scale, double lower_bound, const Plan& plan, int device, uintptr_t stream) {
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
    params.workspace = pointer<void>(workspace);
    params.num_sequences = num_sequences;
    params.tokens = tokens;
    params.heads = heads;
    params.state_is_fp32 = state_is_fp32;
    params.scale = static_cast<float>(scale);
    params.lower_bound = static_cast<float>(lower_bound);
    params.device = device;
    params.stream = pointer<void>(stream);
    launch(params, plan);
}

const char* name_of(sm90::Sharing sharing) {
    switch (sharing) {
        case sm90::Sharing::kSpans: return "spans";
        case sm90::Sharing::kSegments: return "segments";
    }
    return "";
}

}  // namespace
}  // namespace flash_kda

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of flash_kda; call flash_kda.fwd, which validates, instead.";
    m.attr("CUDA_ARCHS") = FLASH_KDA_CUDA_ARCHS;
    // A launch may wait for room in the stream, and what the stream waits for may be another Python thread's.
    m.def("fwd", &flash_kda::fwd, py::call_guard<py::gil_scoped_release>(), "Launches the forward pass on addresses that the caller has validated.");
    using flash_kda::Plan;
    using flash_kda::Work;
    py::class_<Work>(m, "Work", "What the busiest CTA does, one after the other.")
        .def_readonly("steps", &Work::steps)
        .def_readonly("summaries", &Work::summaries)
        .def_readonly("compositions", &Work::compositions)
        .def_readonly("corrections", &Work::corrections)
        .def_property_readonly("microseconds", &Work::microseconds);
    py::class_<Plan>(m, "Plan", "How a call is laid out on the machine.")
        .def_readonly("chains", &Plan::chains)
        .def_property_readonly("sharing", [](const Plan& plan) { return flash_kda::name_of(plan.sharing); })
        .def_property_readonly("segments", &Plan::segments)
        .def_readonly("tasks", &Plan::tasks)
        .def_readonly("least_chunks", &Plan::least_chunks)
        .def_readonly("spare_pairs", &Plan::spare_pairs)
        .def_readonly("spare_chunks", &Plan::spare_chunks)
        .def_readonly("grid", &Plan::grid)
        .def_property_readonly("workspace_bytes", &Plan::workspace_bytes)
        .def_readonly("work", &Plan::work);
    m.def("plan", &flash_kda::make_plan, py::arg("num_sequences"), py::arg("tokens"), py::arg("heads"), py::arg("packed"),
          py::arg("num_segments"), py::arg("sms"), "Raises ValueError for sizes that cannot be launched.");
}
