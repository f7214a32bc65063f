// Sizes of the forward kernel, and who does what in it.
#pragma once

#include <cstdint>

namespace flash_kda::sm90 {

constexpr int kDim = 128;    // K and V: channels of keys and of values
constexpr int kChunk = 16;   // tokens a chunk: the longest span over which exp(5 * tokens) stays inside bf16 and fp32
constexpr int kHalf = 64;    // channels in one 128-byte swizzled row; a [kChunk, kDim] tile is two such halves

// Roles. The recurrence splits V: rows of the state never mix, so its two warpgroups need no word with each other. There is no
// loader warp: a 17th warp would cost every other one a quarter of its registers (they are dealt out by scheduler).
constexpr int kWarpgroup = 128;
constexpr int kPrepareGroups = 2;      // take chunks in turn
constexpr int kRecurrenceGroups = 2;   // kHalf value channels each
constexpr int kThreads = kWarpgroup * (kPrepareGroups + kRecurrenceGroups);

// Registers a thread. A launch gives every thread the same; then prepare hands some to the recurrence, which holds a [64, 128]
// fp32 state and its bf16 copy.
constexpr int kLaunchRegisters = 65536 / kThreads;
constexpr int kPrepareRegisters = 104;
constexpr int kRecurrenceRegisters = 152;
static_assert(kPrepareGroups * kPrepareRegisters + kRecurrenceGroups * kRecurrenceRegisters <=
              (kPrepareGroups + kRecurrenceGroups) * kLaunchRegisters);

// Ring depths. A prepare group refills the slots of the chunk that it has just taken into registers, so that the slots come
// round in its own turn. v waits longer, for the recurrence, but no longer than the factors: when prepare is at chunk i the
// recurrence has left chunk i - kFactorStages, and v of chunk i + kInputStages may take its place.
constexpr int kInputStages = 6;
constexpr int kFactorStages = 4;
constexpr int kValueStages = kInputStages + kFactorStages;
static_assert(kInputStages % kPrepareGroups == 0 && kFactorStages % kPrepareGroups == 0 && kValueStages % kPrepareGroups == 0);

// kd and qd are held multiplied by 2^kShift and ki by its inverse: the factors' range [e^-80, 1] then keeps clear of the
// subnormals, where small channels of the last tokens would lose their bits. Undone exactly where W and qd - Z W are formed.
constexpr int kShift = 16;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNormEpsilon = 1e-6f;

}  // namespace flash_kda::sm90
