// What the memory model forbids, in shared memory and in the workspace: two accesses, one of them a write, that nothing orders; and data that wgmma or the
// copy engine gets to without a proxy fence behind the write.
//
// Happens-before by vector clocks: a thread's clock counts its releases, and holds what it knows of the others'. See C. Flanagan and
// S. Freund, FastTrack: efficient and precise dynamic race detection (2009). The compiler reports the accesses: -fsanitize=thread, with
// functions of our own in place of its library's. Every so often an access lets other threads run first, so that these meet in other
// orders than the barriers alone would give. Without EMULATOR_RACES all of this is nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator::races {

#ifdef EMULATOR_RACES
void begin(uint64_t seed, const void* workspace, size_t bytes);   // a grid
void begin_cta(const void* shared, int threads);
std::string found();                                       // the first of them, or nothing
void meet_warp();                                          // all lanes, of the current thread's warp
void arrive(const void* at);                               // at a barrier: what this thread has done so far is for those who pass it
void complete(const void* at);                             // the barrier's phase is over
void pass(const void* at);
void fence();                                              // of proxies
// By the copy engine, for those who pass the barrier; from the workspace, another CTA, or nowhere of interest.
void copied(const void* to, const void* from, int bytes, const void* at);
void read_by_wgmma(const void* from, int bytes);
void not_data(const void* at, int bytes);                  // a barrier or counter

// Nobody else runs while it lives.
class Undisturbed {
public:
    Undisturbed();
    ~Undisturbed();
};

// The lane on whose behalf the running one acts, while it lives.
class Acting {
public:
    explicit Acting(int lane);
    ~Acting();
};

// No accesses are reported while it lives, and nobody else runs.
class Quiet {
public:
    Quiet();
    ~Quiet();
};
#else
inline void begin(uint64_t, const void*, size_t) {}
inline void begin_cta(const void*, int) {}
inline std::string found() { return {}; }
inline void meet_warp() {}
inline void arrive(const void*) {}
inline void complete(const void*) {}
inline void pass(const void*) {}
inline void fence() {}
inline void copied(const void*, const void*, int, const void*) {}
inline void read_by_wgmma(const void*, int) {}
inline void not_data(const void*, int) {}
struct Undisturbed {
    Undisturbed() {}
};
struct Acting {
    explicit Acting(int) {}
};
struct Quiet {
    Quiet() {}
};
#endif

}  // namespace emulator::races
