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

// A chain that is cut has so many tasks, each a pair's, in each of two phases: see segments.cuh. 1: it is not cut. Its tokens are one unit
// more, of at least `least_chunks` on average.
constexpr int tasks_of(int chunks, int least_chunks, int most) {
    const int fit = chunks / least_chunks - 1;
    return fit < 1 ? 1 : fit < most ? fit : most;
}
constexpr int units_of(int tasks) { return tasks + 1; }

// A segment has two units, so that its summary takes as long as any other; the last may have one, and one task for both parts of its summary.
constexpr int kSegmentUnits = 2;
constexpr int segments_of(int tasks) { return tasks / 2 + 1; }
constexpr int tasks_for(int segments) { return 2 * segments - 1; }

// The first chunk of a unit. Each unit is a little longer than the one before it, for the later a segment, the later its summary is wanted: states
// are composed with one after the other. By seven sixteenths of a chunk, or as much less as leaves the first one a quarter of the mean; where
// units are few, or very many, all are even.
constexpr int kEvenUnits = 10;   // so few are
constexpr int border_of(int chunks, int unit, int units, float inverse) {
    constexpr int kMost = 128, kParts = 64, kLonger = 7 * kParts / 16;   // of a chunk
    constexpr int kHalfPartBits = 7;
    static_assert(1 << kHalfPartBits == 2 * kParts);
    // unit chunks / units - longer unit (units - unit) / 2, rounded down. Every launch begins with this, and integer divisions take long.
    // `inverse` is that of `units`, or nearly; of two bounds that enclose it one gives all chunks to the last unit exactly. Products of floats
    // alone, without sums, round in the same way wherever they are compiled.
    const float low = inverse * (1 - 0x1p-21f), high = inverse * (1 + 0x1p-21f);
    const int mean = static_cast<int>(chunks * low), rest = chunks - mean * units;
    int longer = 0;
    if (units > kEvenUnits && units <= kMost) {
        const float fits = 3 * kParts / 2 * high * high * (chunks - units);
        longer = fits < kLonger ? static_cast<int>(fits) : kLonger;
    }
    const int half_parts = static_cast<int>(unit * rest * (2 * kParts) * high) - longer * unit * (units - unit);
    return unit * mean + (half_parts >> kHalfPartBits);
}

// Where some pairs are left over when every other one has a task in either phase, these spare ones find the summaries of a shorter segment of each
// chain, the last one that has two units. The pair that finds the final state corrects it, all at once.
constexpr int spare_segment_of(int tasks) { return (tasks - 1) / 2; }

// Of two segments, the last one's outputs are corrected by its own tasks, one a unit, and by the pair that finds the final state. That one has
// so many chunks less to do: what it takes to fetch, to compose, and to store.
constexpr int kFinalChunks = 21;
constexpr int final_share(int chunks, int own_tasks, int segments) {
    const int left = chunks - own_tasks * kFinalChunks;
    return segments == 2 && left > 0 ? left / (own_tasks + 1) : 0;
}

// What is left behind: the state behind the first segment, B and M of each of the others.
constexpr int handovers_of(int tasks) { return tasks > 1 ? 2 * segments_of(tasks) - 1 : 0; }

}  // namespace flash_kda::sm90
