// See races.h. Compiled without -fsanitize=thread itself.
#include "emulator.h"

#include <unordered_map>

namespace emulator::races {
namespace {

constexpr int kMostThreads = 512, kMostAgents = 64;   // an agent for each barrier that the copy engine reports to
constexpr int kUnit = 2;                              // bytes

struct Clock {
    uint32_t of[kMostThreads + kMostAgents] = {};

    void join(const Clock& other) {
        for (int i = 0; i < kMostThreads + kMostAgents; ++i)
            of[i] = std::max(of[i], other.of[i]);
    }
};

struct Access {
    uint16_t who;
    uint32_t when;   // by its own clock; 0: never
};

struct Unit {
    Access write{};
    std::vector<Access> reads;   // since then
    bool data = true;
};

struct Meeting {
    Clock pending, completed;
    int agent = -1;
};

// Of the CTA that runs.
struct History {
    std::vector<Clock> clocks = std::vector<Clock>(kMostThreads);
    std::vector<std::vector<uint32_t>> fences = std::vector<std::vector<uint32_t>>(kMostThreads);
    std::vector<Unit> units = std::vector<Unit>(kSharedBytes / kUnit);
    std::unordered_map<const void*, Meeting> meetings;
    std::vector<uint32_t> agent_clocks;

    History() {
        for (int t = 0; t < kMostThreads; ++t)
            clocks[t].of[t] = 1;
    }
};

History history;
std::string first;
int quiet = 0, acting = -1;

// The compiler does not expect its calls to throw.
void report(const std::string& what) {
    if (first.empty())
        first = "race: " + what;
}

int self() { return acting < 0 ? current->index.x : current->index.x / kWarp * kWarp + acting; }

std::string name(int who) {
    return who < kMostThreads ? "thread " + std::to_string(who) : "the copy engine for barrier " + std::to_string(who - kMostThreads);
}

void check(const Clock& known, const Access& before, const char* what, int who, size_t unit) {
    if (before.when > known.of[before.who])
        report(std::string(what) + " at shared-memory address " + std::to_string(unit * kUnit) + ", by " + name(before.who) + " and " + name(who));
}

// Calls back for each unit of an access to the current CTA's shared memory.
template <class Visit>
void visit(const void* p, int bytes, Visit visit_unit) {
    if (quiet > 0 || current == nullptr)
        return;
    const uintptr_t at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(current->cta->shared);
    if (at >= kSharedBytes)
        return;
    for (size_t unit = at / kUnit; unit < (at + bytes + kUnit - 1) / kUnit; ++unit)
        if (history.units[unit].data)
            visit_unit(history.units[unit], unit);
}

void read(const void* p, int bytes) {
    visit(p, bytes, [](Unit& x, size_t unit) {
        const int me = self();
        const Clock& known = history.clocks[me];
        check(known, x.write, "a read after a write", me, unit);
        for (Access& r : x.reads)
            if (r.who == me) {
                r.when = known.of[me];
                return;
            }
        x.reads.push_back({static_cast<uint16_t>(me), known.of[me]});
    });
}

void overwrite(Unit& x, size_t unit, const Clock& known, int who, uint32_t when) {
    check(known, x.write, "a write after a write", who, unit);
    for (const Access& r : x.reads)
        check(known, r, "a write after a read", who, unit);
    x.write = {static_cast<uint16_t>(who), when};
    x.reads.clear();
}

void write(const void* p, int bytes) {
    visit(p, bytes, [](Unit& x, size_t unit) {
        const int me = self();
        overwrite(x, unit, history.clocks[me], me, history.clocks[me].of[me]);
    });
}

// Nobody but the copy engine wrote it, or a fence behind the write came before what made it known.
void check_fenced(const Unit& x, const Clock& known, size_t unit) {
    if (x.write.who >= kMostThreads || x.write.when == 0)
        return;
    const auto& fences = history.fences[x.write.who];
    const auto fence = std::lower_bound(fences.begin(), fences.end(), x.write.when);
    if (fence == fences.end() || *fence > known.of[x.write.who])
        report("no proxy fence after the write to shared-memory address " + std::to_string(unit * kUnit) + " by " + name(x.write.who));
}

}  // namespace

void begin() {
    history = History();
    first.clear();
}

std::string found() { return first; }

void meet_warp() {
    Clock* lanes = &history.clocks[current->index.x / kWarp * kWarp];
    Clock all = lanes[0];
    for (int l = 1; l < kWarp; ++l)
        all.join(lanes[l]);
    for (int l = 0; l < kWarp; ++l) {
        lanes[l] = all;
        ++lanes[l].of[current->index.x / kWarp * kWarp + l];
    }
}

void arrive(const void* at) {
    history.meetings[at].pending.join(history.clocks[self()]);
    ++history.clocks[self()].of[self()];
}

void complete(const void* at) {
    Meeting& m = history.meetings[at];
    m.completed.join(m.pending);
    m.pending = Clock();
}

void pass(const void* at) { history.clocks[self()].join(history.meetings[at].completed); }

void fence() { history.fences[self()].push_back(history.clocks[self()].of[self()]++); }

void copied(const void* to, int bytes, const void* at) {
    Meeting& m = history.meetings[at];
    if (m.agent < 0) {
        m.agent = static_cast<int>(history.agent_clocks.size());
        history.agent_clocks.push_back(0);
    }
    if (m.agent >= kMostAgents)
        fail("too many barriers");
    const int who = kMostThreads + m.agent;
    const uint32_t when = ++history.agent_clocks[m.agent];
    visit(to, bytes, [&](Unit& x, size_t unit) {
        const Clock& known = history.clocks[self()];
        check_fenced(x, known, unit);
        overwrite(x, unit, known, who, when);
    });
    m.pending.of[who] = when;
}

void read_by_wgmma(const void* from, int bytes) {
    visit(from, bytes, [](Unit& x, size_t unit) { check_fenced(x, history.clocks[self()], unit); });
    read(from, bytes);
}

void not_data(const void* at, int bytes) {
    visit(at, bytes, [](Unit& x, size_t) { x.data = false; });
}

Acting::Acting(int lane) { acting = lane; }
Acting::~Acting() { acting = -1; }
Quiet::Quiet() { ++quiet; }
Quiet::~Quiet() { --quiet; }

}  // namespace emulator::races

// ---- what the compiler calls

#define ACCESS(bytes)                                                                                 \
    void __tsan_read##bytes(void* p) { emulator::races::read(p, bytes); }                             \
    void __tsan_write##bytes(void* p) { emulator::races::write(p, bytes); }                           \
    void __tsan_unaligned_read##bytes(void* p) { emulator::races::read(p, bytes); }                   \
    void __tsan_unaligned_write##bytes(void* p) { emulator::races::write(p, bytes); }                 \
    void __tsan_volatile_read##bytes(void* p) { emulator::races::read(p, bytes); }                    \
    void __tsan_volatile_write##bytes(void* p) { emulator::races::write(p, bytes); }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { emulator::races::read(p, bytes); }
void __tsan_write_range(void* p, size_t bytes) { emulator::races::write(p, bytes); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
