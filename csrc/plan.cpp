#include "plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "sm90/config.h"

namespace flash_kda {

using sm90::Sharing;

namespace {

// Numbers of chains are counted in 32 bits, coordinates of a tensor map in 31.
constexpr int64_t kMax31 = std::numeric_limits<int32_t>::max();

constexpr int kSecondTaskChunks = 3;   // another task in the first phase takes so many chunks more than its own
constexpr double kComposedChunks = 2;   // in the time of so many steps a state is composed with a summary
constexpr double kLeastUnit = 4.5;   // chunks, where units are not even: shorter ones would save less than one composition more costs
constexpr double kWorthIt = 0.98;   // of the serial order's time: for less, segments are not worth their memory
constexpr int kFewChains = 16;   // an SM: with more, even a long one is no hurry

[[noreturn]] void too_many(const char* what, int64_t a, int64_t b) {
    throw std::invalid_argument(std::string(what) + " must be at most 2^31 - 1, got " + std::to_string(a) + " x " +
                                std::to_string(b));
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sequences in chunks, as the host sees them: one of `longest`, the others of `rest` each.
struct Lengths {
    int64_t sequences;
    int longest, rest;

    int64_t line() const { return longest + (sequences - 1) * rest + sequences * sm90::kStateChunks; }   // of one head: see schedule.cuh
};

Work serial_work(const Lengths& lengths, int64_t heads, int64_t pairs) {
    Work work{};
    work.steps = static_cast<double>(std::max<int64_t>(lengths.longest + sm90::kStateChunks, divide_up(lengths.line() * heads, pairs)));
    return work;
}

Work segmented_work(const Lengths& lengths, int64_t heads, int64_t all_pairs, const Plan& plan) {
    const auto tasks = [&](int chunks) { return sm90::tasks_of(chunks, plan.least_chunks, plan.tasks); };
    struct Units {
        int chunks, count;

        int border(int unit) const { return sm90::border_of(chunks, unit, count, 1.0f / count); }
    };
    const auto regular = [&](int chunks) -> Units {
        const int spare_units = tasks(chunks) == plan.tasks && plan.spare_chunks > 0 ? sm90::kSegmentUnits : 0;
        return {chunks - spare_units * plan.spare_chunks, sm90::units_of(tasks(chunks)) - spare_units};
    };
    const auto first_segment = [&](int chunks) -> int { return regular(chunks).border(sm90::kSegmentUnits); };   // in chunks
    const auto segment = [&](int chunks) -> int {   // the last one: none is longer
        const Units units = regular(chunks);
        return units.chunks - units.border(units.count - sm90::kSegmentUnits);
    };
    struct Tasks {
        int64_t count;   // of a chain
        double length;   // of one of them
    };
    const int64_t others = lengths.sequences - 1;
    // By all pairs in turn, one after the other of tasks as long as the mean, and nobody sooner than his longest.
    const auto busiest = [&](auto of) -> double {
        const Tasks longest = of(lengths.longest), rest = of(lengths.rest);
        if (plan.spare_pairs > 0)   // all are alike, and no regular pair has two
            return longest.count > 0 ? longest.length : 0;
        const int64_t all = heads * (longest.count + others * rest.count);
        if (all == 0)
            return 0;
        const double total = heads * (longest.count * longest.length + others * rest.count * rest.length);
        return std::max({longest.count > 0 ? longest.length : 0, rest.count > 0 && others > 0 ? rest.length : 0, divide_up(all, plan.pairs()) * (total / all)});
    };
    const auto summaries = [&](int chunks) -> Tasks {
        const int n = tasks(chunks);
        // Who has both parts of the last one begins twice. So does, in the second phase, who corrects a spare one and finds the final state, but
        // has less to do than the others.
        const int states = sm90::kStateChunks + kSecondTaskChunks * (n % 2 == 0);
        return {n > 1 ? n : 0, static_cast<double>(segment(chunks) + states)};
    };
    const auto whole = [&](int chunks) -> Tasks { return {tasks(chunks) == 1, static_cast<double>(chunks) + sm90::kStateChunks}; };
    const auto corrected = [&](int chunks) -> double {   // chunks; of a long segment those before it forgets, as if all took a slow head's time
        const int n = tasks(chunks), left = n == 1 ? 0 : chunks - first_segment(chunks);
        return segment(chunks) < sm90::kLongSegment ? left : std::min(left, (sm90::segments_of(n) - 1) * sm90::kLongSegment);
    };
    Work work{};
    work.steps = busiest(summaries) + busiest(whole);
    if (const int n = tasks(lengths.longest); n > 1) {
        work.summaries = 1;
        const double meanwhile = (segment(lengths.longest) - first_segment(lengths.longest)) / kComposedChunks;   // while others are still being found
        work.compositions = std::max(sm90::segments_of(n) - 1 - meanwhile, 1.0) * (1 + static_cast<double>(plan.pairs()) / all_pairs) / 2;
        work.corrections = heads * (corrected(lengths.longest) + others * corrected(lengths.rest)) * sm90::kChunk / sm90::kCorrected / all_pairs;
    }
    return work;
}

}  // namespace

double Work::microseconds() const {
    return 4.4 + 0.46 * steps + 2.77 * summaries + 0.85 * compositions + 0.405 * corrections;
}

Plan make_plan(int64_t num_sequences, int64_t tokens, int64_t heads, bool packed, int num_segments, int sms) {
    if (num_sequences < 0 || tokens < 0 || heads < 0)
        throw std::invalid_argument("num_sequences, tokens and heads must not be negative");
    if (num_segments < 0 || num_segments > kMostSegments)
        throw std::invalid_argument("num_segments must be at most " + std::to_string(kMostSegments));
    if (heads > 0 && num_sequences > kMax31 / heads)
        too_many("sequences x heads", num_sequences, heads);
    const int64_t repeats = packed ? 1 : num_sequences;
    if (repeats > 0 && tokens > kMax31 / repeats)
        too_many("sequences x tokens", repeats, tokens);
    const int64_t chains = num_sequences * heads;
    if (chains == 0)
        return {0, Sharing::kSpans, 1, 1, 0, 0, 0, 0, 0, {}};

    // What is not known of a pack without a sync is how long its sequences are. They are taken once to be all equal, and once for a pack
    // whose longest is three times as long as their mean.
    const bool lengths_known = !packed || num_sequences == 1;
    const int chunks = static_cast<int>(divide_up(tokens, sm90::kChunk));
    const int mean = packed ? static_cast<int>(divide_up(chunks, num_sequences)) : chunks;
    const int long_one = packed ? static_cast<int>(std::min<int64_t>(chunks, 3 * int64_t{mean})) : chunks;
    const Lengths even = {num_sequences, mean, mean};
    const Lengths uneven = {num_sequences, long_one, num_sequences > 1 ? static_cast<int>(packed ? (chunks - long_one) / (num_sequences - 1) : chunks) : 0};
    const int64_t all_pairs = std::max(sms / sm90::kPair, 1);
    const auto cost = [&](const Plan& plan) {
        const auto work = [&](const Lengths& lengths) {
            return plan.sharing == Sharing::kSegments ? segmented_work(lengths, heads, all_pairs, plan) : serial_work(lengths, heads, plan.pairs());
        };
        return work(even).microseconds() + work(uneven).microseconds();
    };

    const int64_t pairs = std::min(chains, all_pairs);
    const Plan serial = {chains, Sharing::kSpans, 1, 1, 0, 0, static_cast<uint32_t>(sm90::kPair * pairs), 0, pairs < chains ? pairs : 0, serial_work(even, heads, pairs)};
    const auto segmented = [&](int tasks, int least_chunks, int64_t spare_pairs = 0, int spare_chunks = 0) -> Plan {
        // No more than all sequences have room for together; and however wrong cu_seqlens is, a count of tasks or handovers fits in 32 bits.
        const int64_t room = (chunks + (packed ? num_sequences : 0)) * (packed ? 1 : num_sequences) / least_chunks;
        const int most = sm90::tasks_of(chunks, least_chunks, tasks);
        if (chains > kMax31 / (most + 1))
            too_many("sequences x heads x 2 num_segments", chains, most + 1);
        const int64_t pairs = std::min(chains * most, all_pairs);
        const int64_t handovers = heads * std::min<int64_t>(num_sequences * sm90::handovers_of(most), room);
        Plan plan{chains, Sharing::kSegments, most, least_chunks, spare_pairs, spare_chunks, static_cast<uint32_t>(sm90::kPair * pairs), repeats * tokens * heads, handovers, {}};
        plan.work = segmented_work(even, heads, all_pairs, plan);
        return plan;
    };
    if (num_segments > 1 && chunks > 2)
        return segmented(sm90::tasks_for(num_segments), 1);
    Plan best = serial;
    double least_cost = kWorthIt * cost(best);
    const auto consider = [&](const Plan& plan) {
        const double plan_cost = cost(plan);
        if (plan_cost < least_cost) {
            best = plan;
            least_cost = plan_cost;
        }
    };
    if (num_segments > 0 || chains > kFewChains * sms)
        return best;
    const int most_units = std::min(long_one, std::max(static_cast<int>(long_one / kLeastUnit), sm90::kEvenUnits));
    for (int tasks = 2; tasks <= all_pairs && sm90::units_of(tasks) <= most_units; ++tasks)
        consider(segmented(lengths_known ? tasks : all_pairs, long_one / sm90::units_of(tasks)));
    // A pair for every task, and the pairs left over for one segment more of each chain, so long that they are done when the others are: with `each`
    // tasks one after the other, each (2 spare_chunks + kStateChunks) = 2 regular_chunks + kStateChunks.
    const int tasks = static_cast<int>(all_pairs / chains);
    const int64_t spare_pairs = all_pairs - chains * tasks;
    if (lengths_known && tasks > 0 && spare_pairs > 0) {
        const int64_t each = divide_up(chains * sm90::kSegmentUnits, spare_pairs);
        const double regular = static_cast<double>(sm90::kSegmentUnits) / sm90::units_of(tasks);   // a segment, of all chunks but the spare ones
        const double fit = (regular * chunks - (each - 1) * sm90::kStateChunks) / (sm90::kSegmentUnits * (each + regular));
        const int spare_chunks = std::min(static_cast<int>(fit), chunks / (sm90::units_of(tasks) + sm90::kSegmentUnits));
        if (spare_chunks > 0)
            consider(segmented(tasks + sm90::kSegmentUnits, spare_chunks, spare_pairs, spare_chunks));
    }
    return best;
}

}  // namespace flash_kda
