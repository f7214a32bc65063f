// Stands for csrc/sm90/wgmma.h: products are done at once, by each warp for its 16 rows.
#pragma once

#include "ptx.h"
#include "smem.h"

namespace cute {

inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() {}
template <int kGroups>
void warpgroup_wait() {}

}  // namespace cute

namespace flash_kda::sm90 {

enum class LayoutType { INTERLEAVE, B128 };
enum class ScaleOut { Zero, One };

struct MatrixDescriptor {
    uint32_t address;
    LayoutType layout;
    int leading, stride;

    MatrixDescriptor operator+(uint32_t sixteenths) const { return {address + sixteenths * 16, layout, leading, stride}; }
};

inline MatrixDescriptor matrix_descriptor(const void* smem, LayoutType layout, int leading, int stride) {
    if (smem_address(smem) % (layout == LayoutType::B128 ? 1024 : 16) != 0)
        emulator::fail("an operand that is not aligned");
    return {smem_address(smem), layout, leading, stride};
}

template <int kColumns, bool kColumnMajor>
struct Atom {
    static constexpr int columns = kColumns;
    static constexpr bool column_major = kColumnMajor;   // neighbouring columns lie side by side
};
using StepAtom = Atom<32, false>;
using OutputAtom = Atom<16, false>;
using UpdateAtom = Atom<128, true>;

template <int kRegisters>
void fence_operands(float (&)[kRegisters]) {}

// Element (k, n) of b.
template <class Atom>
float operand(const MatrixDescriptor& b, int k, int n) {
    uint32_t at = b.address;
    if (b.layout == LayoutType::INTERLEAVE)
        at += k / 8 * b.leading + n / 8 * b.stride + n % 8 * 16 + k % 8 * 2;
    else if (Atom::column_major)
        at += n / 64 * b.leading + k / 8 * b.stride + k % 8 * 128 + n % 64 * 2;
    else
        at += n / 8 * b.stride + n % 8 * 128 + k * 2;
    if (b.layout == LayoutType::B128)
        at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    emulator::races::read_by_wgmma(emulator::shared(at, 2), 2);
    emulator::races::Quiet quiet;
    memcpy(&bits, emulator::shared(at, 2), 2);
    return emulator::from_bf16(bits);
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
                    sum += bf16_of(of(row % 8 * 4 + k % 8 / 2).a, k / 8 * 2 + row / 8, k % 2) * column[k];
                x = sum;
            }
        }
    });
}

}  // namespace flash_kda::sm90
