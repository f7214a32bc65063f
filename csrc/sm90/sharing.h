// How the CTAs share the chains out, a (sequence, head) each: the words of the host's plan and of the kernel. Plain C++.
#pragma once

namespace flash_kda::sm90 {

// CTAs work in pairs, clusters of two, on a chain each.
enum class Sharing {
    kSpans,      // as much work to each pair, one chain after the other: schedule.cuh
    kSegments,   // long chains are cut in time, and done in several places at once: segments.cuh
};

constexpr int kPair = 2;

constexpr int kStateChunks = 9;   // a chain's states take as long to come and go as so many chunks do

// Into how many segments a sequence of so many chunks is cut, each of at least `least_chunks`.
constexpr int segments_of(int chunks, int least_chunks, int most) {
    const int fit = chunks / least_chunks - 1, n = fit < 1 ? 1 : fit < most ? fit : most;
    return n == 2 && most > 2 ? 1 : n;   // two segments, one after the other, are done no sooner than the whole
}

// A chain's segments are equally long but the first, whose task makes outputs and takes as long as that of two others, which makes none.
// In units of which a chain of n segments has so many:
constexpr int kFirstUnits = 7, kOtherUnits = 4;
constexpr int units_of(int segments) { return kFirstUnits + kOtherUnits * (segments - 1); }

// The first chunk of a segment.
constexpr int border_of(int chunks, int segment, int segments) {
    return segment == 0 ? 0 : static_cast<int>(static_cast<long long>(chunks) * units_of(segment) / units_of(segments));
}

// A chain's tasks, each a pair's: summaries, of the first segment or of two; then, of all segments but the first, a replay. A chain that is
// not cut is replayed from its initial state.
constexpr int summaries_of(int segments) { return segments - 1; }
constexpr int replays_of(int segments) { return segments > 1 ? segments - 1 : 1; }

// What the summaries leave: the state behind the first segment; B and M behind each of the others but the last.
constexpr int handovers_of(int segments) { return summaries_of(segments) + replays_of(segments) - 1; }

}  // namespace flash_kda::sm90
