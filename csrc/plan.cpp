#include "plan.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace flash_kda {

namespace {

// CTAs of a one-dimensional grid, and coordinates of a tensor map, are 31-bit.
constexpr int64_t kMax31 = std::numeric_limits<int32_t>::max();

[[noreturn]] void too_many(const char* what, int64_t a, int64_t b) {
    throw std::invalid_argument(std::string(what) + " must be at most 2^31 - 1, got " + std::to_string(a) + " x " +
                                std::to_string(b));
}

}  // namespace

Plan make_plan(int64_t num_sequences, int64_t tokens, int64_t heads, bool packed) {
    if (num_sequences < 0 || tokens < 0 || heads < 0)
        throw std::invalid_argument("num_sequences, tokens and heads must not be negative");
    if (heads > 0 && num_sequences > kMax31 / heads)
        too_many("sequences x heads", num_sequences, heads);
    const int64_t repeats = packed ? 1 : num_sequences;
    if (repeats > 0 && tokens > kMax31 / repeats)
        too_many("sequences x tokens", repeats, tokens);
    const int64_t chains = num_sequences * heads;
    return {chains, static_cast<uint32_t>(chains)};
}

}  // namespace flash_kda
