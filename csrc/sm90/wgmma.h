// The warpgroup products of the recurrence, A in registers and B in shared memory, through CuTe's atoms.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "matrix_descriptor.h"
#include "ptx.h"
#include "smem.h"

namespace flash_kda::sm90 {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

// d [64, N] (+)= a [64, 16] b [16, N]
template <class Atom, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], const uint32_t* a, MatrixDescriptor b, ScaleOut accumulate = ScaleOut::One) {
    cute::detail::explode(Atom::fma, a, cute::make_int_sequence<4>{}, &b, cute::make_int_sequence<1>{}, d,
                          cute::make_int_sequence<kRegisters>{}, &accumulate, cute::make_int_sequence<1>{});
}

using StepAtom = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, Major::K>;
using OutputAtom = cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_RS<Major::K, Major::K>;
using ComposeAtom = cute::SM90::GMMA::MMA_64x128x16_F32F16F16_RS<Major::K, Major::MN>;
using UpdateAtom = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;

template <int kRegisters>
__device__ __forceinline__ void fence_operands(float (&d)[kRegisters]) {
    for (float& x : d)
        cute::warpgroup_fence_operand(x);
}

}  // namespace flash_kda::sm90
