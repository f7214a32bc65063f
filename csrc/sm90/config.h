// Sizes of the forward kernel, and who does what in it.
#pragma once

#include <cstdint>

namespace flash_kda::sm90 {

constexpr int kDim = 128;     // K and V: channels of keys and of values
constexpr int kChunk = 16;    // tokens a chunk: a span over which exp(5 * tokens) stays inside bf16 and fp32
constexpr int kHalf = 64;     // channels in a 128-byte swizzled row
constexpr int kHalves = kDim / kHalf;
constexpr int kBlocks = kDim / 16;   // of 16 channels, the K of an mma

// Roles. Prepare is one warp a chunk: nothing is exchanged between warps and no barrier met, and eight of them hide each other's
// latencies. The recurrence splits V: rows of the state never mix, so its two warpgroups need no word with each other either.
constexpr int kWarpgroup = 128;
constexpr int kPrepareGroups = 2;
constexpr int kPrepareWarps = kPrepareGroups * 4;   // take chunks in turn
constexpr int kRecurrenceGroups = kHalves;          // kHalf value channels each
constexpr int kRecurrenceWarps = kRecurrenceGroups * 4;
constexpr int kThreads = (kPrepareWarps + kRecurrenceWarps) * 32;

// Registers a thread. A launch gives every thread the same; then prepare hands some to the recurrence, which holds a [64, 128]
// fp32 state and its bf16 copy.
constexpr int kLaunchRegisters = 65536 / kThreads;
constexpr int kPrepareRegisters = 96;
constexpr int kRecurrenceRegisters = 160;
static_assert(kPrepareGroups * kPrepareRegisters + kRecurrenceGroups * kRecurrenceRegisters <=
              (kPrepareGroups + kRecurrenceGroups) * kLaunchRegisters);

// Chunks in shared memory: those being loaded or prepared, one a warp, and a few ready for the recurrence.
constexpr int kStages = kPrepareWarps + 3;

// The cumulated gates carry this many powers of two more than they have, so that kd and qd, as small as e^-80, and ki, as large
// as e^80, stay inside bf16 and fp32 for keys and queries of any sensible length. It is taken back where it would show.
constexpr int kShift = 16;
constexpr float kUnshift = 1.0f / (1 << kShift);

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNormEpsilon = 1e-6f;

}  // namespace flash_kda::sm90
