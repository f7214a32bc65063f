// Stands for csrc/sm90/wgmma.h: products are done at once, by each warp for its 16 rows.
#pragma once

#include "matrix_descriptor.h"
#include "ptx.h"
#include "smem.h"

namespace cute {

inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() {}
template <int kGroups>
void warpgroup_wait() {}

}  // namespace cute

namespace flash_kda::sm90 {

enum class ScaleOut { Zero, One };

template <int kColumns, bool kColumnMajor, float kFrom(uint16_t) = emulator::from_bf16>
struct Atom {
    static constexpr int columns = kColumns;
    static constexpr bool column_major = kColumnMajor;   // neighbouring columns lie side by side
    static float from(uint16_t bits) { return kFrom(bits); }
};
using StepAtom = Atom<32, false>;
using OutputAtom = Atom<16, false>;
using ComposeAtom = Atom<128, true, emulator::from_fp16>;
using UpdateAtom = Atom<128, true>;

template <int kRegisters>
void fence_operands(float (&)[kRegisters]) {}

// Element (k, n) of b.
template <class Atom>
float operand(MatrixDescriptor b, int k, int n) {
    const auto field = [=](int bit) { return static_cast<uint32_t>(b >> bit & 0x3fff) * 16; };
    const uint32_t leading = field(16), stride = field(32);
    const auto swizzle = static_cast<Swizzle>(b >> 62);
    uint32_t at = emulator::window(*emulator::current->cta) + field(0);
    if (swizzle == Swizzle::kNone)
        at += k / 8 * leading + n / 8 * stride + n % 8 * 16 + k % 8 * 2;
    else if (Atom::column_major)
        at += n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
    else
        at += n / 8 * stride + n % 8 * 128 + k * 2;
    if (swizzle == Swizzle::k128Bytes)
        at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    emulator::races::read_by_wgmma(emulator::shared(at, 2), 2);
    emulator::races::Quiet quiet;
    memcpy(&bits, emulator::shared(at, 2), 2);
    return Atom::from(bits);
}

template <class Atom, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t* a, MatrixDescriptor b, ScaleOut accumulate = ScaleOut::One) {
    static_assert(kRegisters == Atom::columns / 2);
    Operands mine{d, d, a, nullptr};
    emulator::together("wgmma", &mine, [=](void** all) {
        const auto of = [&](int lane) -> Operands& { return *static_cast<Operands*>(all[lane]); };
        for (int n = 0; n < Atom::columns; ++n) {
            float column[16];
            for (int k = 0; k < 16; ++k)
                column[k] = operand<Atom>(b, k, n);
            for (int row = 0; row < 16; ++row) {
                float& x = of(row % 8 * 4 + n % 8 / 2).d[n / 8 * 4 + row / 8 * 2 + n % 2];
                float sum = accumulate == ScaleOut::Zero ? 0.0f : x;
                for (int k = 0; k < 16; ++k)
                    sum += Atom::from(static_cast<const uint32_t*>(of(row % 8 * 4 + k % 8 / 2).a)[k / 8 * 2 + row / 8] >> k % 2 * 16) * column[k];
                x = sum;
            }
        }
    });
}

}  // namespace flash_kda::sm90
