// The warpgroup products of the recurrence, A in registers and B in shared memory, through CuTe's atoms.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "ptx.h"
#include "smem.h"

namespace flash_kda::sm90 {

using cute::SM90::GMMA::LayoutType;
using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

using MatrixDescriptor = uint64_t;

// Offsets in bytes. K-major: `leading` from one 16-byte column of 8x8 matrices to the next (unused when swizzled), `stride` from
// 8 rows to the next. N-major, swizzled: `leading` from 64 columns to the next, `stride` from 8 rows to the next.
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(const void* smem, LayoutType layout, int leading, int stride) {
    cute::GmmaDescriptor d;
    d.bitfield.start_address_ = static_cast<uint16_t>(smem_address(smem) >> 4);
    d.bitfield.leading_byte_offset_ = static_cast<uint16_t>(leading >> 4);
    d.bitfield.stride_byte_offset_ = static_cast<uint16_t>(stride >> 4);
    d.bitfield.base_offset_ = 0;
    d.bitfield.layout_type_ = static_cast<uint8_t>(layout);
    return d;
}

// d [64, N] (+)= a [64, 16] b [16, N]
template <class Atom, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], const uint32_t* a, MatrixDescriptor b, ScaleOut accumulate = ScaleOut::One) {
    cute::detail::explode(Atom::fma, a, cute::make_int_sequence<4>{}, &b, cute::make_int_sequence<1>{}, d,
                          cute::make_int_sequence<kRegisters>{}, &accumulate, cute::make_int_sequence<1>{});
}

using StepAtom = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, Major::K>;
using OutputAtom = cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_RS<Major::K, Major::K>;
using UpdateAtom = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;

template <int kRegisters>
__device__ __forceinline__ void fence_operands(float (&d)[kRegisters]) {
    for (float& x : d)
        cute::warpgroup_fence_operand(x);
}

}  // namespace flash_kda::sm90
