// How a call is laid out on the machine. Host C++ without CUDA, so that it is read and tested without a GPU.
#pragma once

#include <cstdint>

#include "sm90/sharing.h"

namespace flash_kda {

// What a pair leaves for others where a chain is cut: an fp32 state, and a ticket a half, in 64 bytes.
constexpr int64_t kHandoverBytes = 128 * 128 * 4 + 64;
constexpr int64_t kYRowBytes = 128 * 2;

constexpr int kMostSegments = 1024;   // fetches of a summary are counted in 16 bits

// What the busiest CTA does, one after the other, by which the plan chooses. See docs/performance.md.
struct Work {
    double steps;           // chunks
    double summaries;       // 1 where there are any: leaving one, and waiting for others
    double compositions;    // of a state with a segment's summary, that no step hides, if all pairs compose at once; down to a half where few do: they share the way to L2
    double corrections;     // pieces of outputs, of kCorrected tokens; of the whole call, shared out evenly: the way to memory binds

    double microseconds() const;
};

struct Plan {
    int64_t chains;             // (sequence, head) pairs: independent, each one serial in time
    sm90::Sharing sharing;      // of the chains among the CTAs
    int tasks;                  // of a chain in each phase, at most: see sharing.h
    int least_chunks;           // of a unit, on average
    int64_t spare_pairs;        // of CTAs, which have a segment of each chain among them,
    int spare_chunks;           // and so long are its two units
    uint32_t grid;              // CTAs, two a pair, no more than SMs: each fills one
    int64_t Y_rows;             // in a workspace of device memory that the launch needs: tokens and heads,
    int64_t handovers;          // and behind them
    Work work;

    int64_t pairs() const { return grid / sm90::kPair; }
    int segments() const { return sm90::segments_of(tasks); }
    int64_t Y_bytes() const { return Y_rows * kYRowBytes; }
    int64_t workspace_bytes() const { return Y_bytes() + handovers * kHandoverBytes; }
};

// `num_segments`: 1, the serial order; n, so many of every chain of more than 2 (n - 1) chunks; 0, whatever is quickest.
// Throws std::invalid_argument where the sizes cannot be launched or addressed.
Plan make_plan(int64_t num_sequences, int64_t tokens, int64_t heads, bool packed, int num_segments, int sms);

}  // namespace flash_kda
