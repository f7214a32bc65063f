#pragma once

#include "params.h"
#include "plan.h"

namespace flash_kda {

// Enqueues the forward pass on params.stream; never synchronises. Throws std::runtime_error with the CUDA error's name.
void launch(const Params& params, const Plan& plan);

}  // namespace flash_kda
