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
constexpr int kPrepareRegisters = 104;
constexpr int kRecurrenceRegisters = 152;
static_assert(kPrepareGroups * kPrepareRegisters + kRecurrenceGroups * kRecurrenceRegisters <=
              (kPrepareGroups + kRecurrenceGroups) * kLaunchRegisters);

// Chunks in shared memory: those being loaded or prepared, one a warp, and a few ready for the recurrence.
constexpr int kStages = kPrepareWarps + 3;

// Powers of two that keep products as small as e^-80 and as large as e^80 inside bf16 and fp32, whatever sensible length keys, values
// and states have. They are exact, and meet only in [16]-vectors: kd and qd are held 2^kShift too large and ki as much too small, the
// residual R 2^kShift too small and the state 4^kShift too small.
constexpr int kShift = 16;
constexpr float kShiftUp = 1 << kShift;
constexpr float kStateUp = kShiftUp * kShiftUp;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNormEpsilon = 1e-6f;

}  // namespace flash_kda::sm90
