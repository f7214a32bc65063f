// Sizes of the forward kernel, and who does what in it.
#pragma once

#include <cstdint>

#include "sharing.h"

namespace flash_kda::sm90 {

constexpr int kDim = 128;     // K and V: channels of keys and of values
constexpr int kChunk = 16;    // tokens a chunk: a span over which exp(5 * tokens) stays inside bf16 and fp32
constexpr int kHalf = 64;     // channels in a 128-byte swizzled row
constexpr int kHalves = kDim / kHalf;
constexpr int kBlocks = kDim / 16;   // of 16 channels, the K of an mma

// Roles of a CTA's warps, in this order. The recurrence splits V: rows of the state never mix, so each CTA of a pair has its half of a
// chain's state, in one warpgroup. Both halves want the same factors: the CTAs prepare chunks in turn, and each mails what it prepares to
// the other one. Prepare is two warps a chunk, a half of the key channels each. Loaders are single warps, and one of their warpgroup is idle.
constexpr int kWarpgroup = 128;
constexpr int kRecurrenceWarps = 4, kPrepareWarps = 8, kLoadWarps = 4;
constexpr int kCtaThreads = (kRecurrenceWarps + kPrepareWarps + kLoadWarps) * 32;
constexpr int kTeam = kHalves, kTeams = kPrepareWarps / kTeam;
constexpr int kStateRegisters = kHalf * kDim / kWarpgroup;   // of a recurrence thread

// Registers a thread. A launch gives every thread the same; then loaders hand most of theirs to the others. The recurrence holds a [64, 128]
// fp32 state and its bf16 copy.
constexpr int kLaunchRegisters = 65536 / kCtaThreads;
constexpr int kRecurrenceRegisters = 184, kPrepareRegisters = 136, kLoadRegisters = 56;
static_assert(kRecurrenceWarps * kRecurrenceRegisters + kPrepareWarps * kPrepareRegisters + kLoadWarps * kLoadRegisters <=
              kLaunchRegisters * kCtaThreads / 32);

// Chunks in shared memory. A CTA's own: being loaded, being prepared (one a team), or ready. Ready ones from the other CTA. And values of
// both. Powers of two: a chunk's places follow from its number.
constexpr int kOwnStages = 8, kMailStages = 4, kStages = kOwnStages + kMailStages, kValueStages = 8;
constexpr int kChains = 16;   // scheduled ahead
constexpr int kFirstChunks = 2;   // asked for at once when a launch begins: the others wait for the first one
constexpr int kCorrected = 2 * kChunk;   // tokens whose outputs are corrected at once: a stage takes so many

// A long segment, of so many chunks, may forget the state before it, though channels decay slowly: its M is looked at every so many chunks,
// and is as good as zero once it is so small. A composition rounds an element of M by more.
constexpr int kLongSegment = 256, kLookChunks = 32;
constexpr float kForgotten = 0x1p-32f;

// Barriers that some warps of a CTA meet at: each team's, and the recurrence's. 0 is __syncthreads.
constexpr int kTeamBarrier = 1, kRecurrenceBarrier = kTeamBarrier + kTeams;

// Powers of two that keep products as small as e^-80 and as large as e^80 inside bf16 and fp32, whatever sensible length keys, values
// and states have. They are exact, and meet only in [16]-vectors: kd and qd are held 2^kShift too large, ki and kr as much too small, the
// residual R 2^kShift too small and the state 4^kShift too small.
constexpr int kShift = 16;
constexpr float kShiftUp = 1 << kShift;
constexpr float kStateUp = kShiftUp * kShiftUp;
constexpr float kGateUp = 1 << 10;   // gates are summed in fp16, whose subnormals begin at 2^-14

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNormEpsilon = 1e-6f;

}  // namespace flash_kda::sm90
