// Runs a CUDA kernel's own source on the CPU, every thread a fiber: what CUDA C++ adds to C++, as far as csrc/sm90 uses it.
//
// Threads take turns in an order drawn from a seed, and change only where they wait. What the lanes of a warp do together is done once the
// last of them has come. So the kernel's logic is tested: indices, arithmetic, hand-overs, locking up; and, with races.h, the order of
// accesses to memory. Its speed is not.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "races.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __syncwarp emulator::sync_warp
#define __syncthreads emulator::sync_cta
#define __shfl_sync(mask, x, lane) emulator::shuffle(x, lane)
#define __shfl_up_sync(mask, x, lanes) emulator::shuffle(x, std::max(emulator::lane() - (lanes), 0))
#define __reduce_max_sync(mask, x) emulator::most(x)
#define __ballot_sync(mask, x) emulator::ballot(x)
#define __any_sync(mask, x) (emulator::ballot(x) != 0)
#define __ffs(x) __builtin_ffs(x)
#define __threadfence()
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->cta->index)
#define gridDim (emulator::grid)

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

// CUDA's take operands of two types.
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

namespace emulator {

constexpr int kSharedBytes = 227 * 1024, kWarp = 32;
constexpr int kMuchAsked = 2000;   // to come together only to ask once more is no progress

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

struct Index {
    uint32_t x, y = 1;
};

struct Warp {
    const char* doing = nullptr;   // what its lanes have come together for
    void* arguments[kWarp];
    int arrived = 0;
    uint64_t done = 0;
    int asked = 0;   // how often its lanes have asked for other CTAs' words in vain since it was last at a barrier
};

struct Cta {
    Index index;
    int threads, arrived = 0;
    int left = 0;   // threads that have ended
    uint64_t done = 0;
    std::vector<Warp> warps;
    uint8_t* shared;
    std::vector<Cta*> cluster;
    struct Meeting {
        int arrived = 0;
        uint64_t done = 0;
    } meeting, named[16];   // the cluster's, in its first CTA
};

struct Thread {
    Cta* cta;
    Index index;
    bool finished = false;
    const char* waits_for = nullptr;
    const uint64_t* word = nullptr;   // of another CTA, that was asked for last,
    uint64_t answer;                  // and what it was
    ucontext_t context;
    std::vector<char> stack;
};

extern Thread* current;
extern Index grid;
extern ucontext_t scheduler;
extern uint64_t progress;   // counts whatever may let somebody go on

inline int lane() { return current->index.x % kWarp; }
inline Warp& warp() { return current->cta->warps[current->index.x / kWarp]; }

template <class Condition>
void wait_until(const char* what, Condition condition) {
    current->waits_for = what;
    while (!condition())
        swapcontext(&current->context, &scheduler);
    current->waits_for = nullptr;
}

// `act` gets the arguments of all lanes, which must have come for the same.
template <class Act>
void together(const char* what, void* argument, Act act) {
    Warp& warp = emulator::warp();
    if (warp.arrived > 0 && strcmp(warp.doing, what) != 0)
        fail(std::string("lanes diverge: some are at ") + warp.doing + ", some at " + what);
    warp.doing = what;
    warp.arguments[lane()] = argument;
    if (++warp.arrived < kWarp) {
        const uint64_t before = warp.done;
        wait_until(what, [&] { return warp.done != before; });
        return;
    }
    {
        races::Undisturbed undisturbed;
        act(warp.arguments);
    }
    warp.arrived = 0;
    ++warp.done;
    progress += warp.asked < kMuchAsked;
}

inline void sync_warp() {
    together("syncwarp", nullptr, [](void**) { races::meet_warp(); });
}

template <class Meeting>
void meet(Meeting& at, int threads) {
    races::arrive(&at);
    if (++at.arrived < threads) {
        const uint64_t before = at.done;
        wait_until("syncthreads", [&] { return at.done != before; });
    } else {
        races::complete(&at);
        at.arrived = 0;
        ++at.done;
        ++progress;
    }
    races::pass(&at);
}

inline void sync_cta() { meet(*current->cta, current->cta->threads); }

inline void meet_cluster() { meet(current->cta->cluster[0]->meeting, current->cta->threads * current->cta->cluster.size()); }

template <class T>
T shuffle(T x, int from) {
    struct Argument {
        T x, result;
        int from;
    } mine{x, x, from};
    together("shuffle", &mine, [](void** all) {
        for (int l = 0; l < kWarp; ++l) {
            Argument& to = *static_cast<Argument*>(all[l]);
            to.result = static_cast<Argument*>(all[to.from % kWarp])->x;
        }
    });
    return mine.result;
}

inline int most(int x) {
    for (int lanes = 1; lanes < kWarp; lanes *= 2)
        x = std::max(x, shuffle(x, lane() ^ lanes));
    return x;
}

inline uint32_t ballot(bool x) {
    uint32_t bits = x ? 1u << lane() : 0;
    for (int lanes = 1; lanes < kWarp; lanes *= 2)
        bits |= shuffle(bits, lane() ^ lanes);
    return bits;
}

// Addresses of shared memory are as on the machine: a CTA's window begins with what is the driver's, and is the rank's in the cluster.
constexpr uint32_t kWindow = 1 << 24, kDriversBytes = 1 << 10;

inline uint32_t window(const Cta& cta) { return cta.index.x % cta.cluster.size() * kWindow; }

inline uint8_t* shared(uint32_t address, int bytes, int alignment, const Cta& cta) {
    const uint32_t offset = address - window(cta) - kDriversBytes;
    if (offset > kSharedBytes - bytes || address % alignment != 0)
        fail("bad shared-memory address " + std::to_string(address) + " of " + std::to_string(bytes) + " bytes");
    return cta.shared + offset;
}
inline uint8_t* shared(uint32_t address, int bytes) { return shared(address, bytes, bytes, *current->cta); }

inline uint8_t* shared_in_cluster(uint32_t address, int bytes, int alignment) {
    const uint32_t rank = address / kWindow;
    if (rank >= current->cta->cluster.size())
        fail("bad address in the cluster");
    const Cta& cta = *current->cta->cluster[rank];
    if (cta.left == cta.threads)
        fail("the other CTA is not there any more");
    return shared(address, bytes, alignment, cta);
}

inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bf16(float x) {   // to nearest even
    const uint32_t bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Without NaN and infinity, which the kernel has none of in fp16.
inline float from_fp16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    return bits >> 15 ? -size : size;
}

inline uint16_t to_fp16(float x) {   // to nearest even
    const float size = std::fabs(x);
    const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
    const int rounded = static_cast<int>(std::nearbyint(ldexpf(size, 10 - exponent))) + (exponent + 14) * 1024;
    return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | rounded);
}

}  // namespace emulator
