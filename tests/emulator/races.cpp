// See races.h. Compiled without -fsanitize=thread itself.
#include "emulator.h"

#include <unordered_map>

namespace emulator::races {
namespace {

constexpr int kUnit = 2;   // bytes

// What is known of everybody: threads of all CTAs, and an agent of the copy engine's for each barrier that it reports to.
using Clock = std::vector<uint32_t>;

void join(Clock& to, const Clock& other) {
    if (to.size() < other.size())
        to.resize(other.size());
    for (size_t i = 0; i < other.size(); ++i)
        to[i] = std::max(to[i], other[i]);
}

uint32_t known(const Clock& clock, uint32_t who) { return who < clock.size() ? clock[who] : 0; }

struct Access {
    uint32_t who, when;   // by its own clock; 0: never
};

struct Unit {
    Access write{};
    std::vector<Access> reads;   // since then
    bool data = true;
};

// A barrier, or a ticket.
struct Meeting {
    Clock pending, completed;
    uint32_t agent = 0;
};

struct Memory {
    const uint8_t *begin, *end;
    const char* name;
    std::vector<Unit> units;

    Memory(const void* at, size_t bytes, const char* name)
        : begin(static_cast<const uint8_t*>(at)), end(begin + bytes), name(name), units(bytes / kUnit) {}
};

uint32_t threads_a_cta, threads, agents;
std::vector<Clock> clocks, fenced;                // of threads: what they know, and what they knew at their last fence
std::vector<std::vector<uint32_t>> fences;        // of threads: when
std::vector<uint32_t> agent_clocks;
std::vector<Memory> memories;                     // the workspace, then the CTAs' shared memories
std::unordered_map<const void*, Meeting> meetings;
std::string first;
int quiet = 0, undisturbed = 0, acting = -1;
uint64_t random_state;

uint32_t first_of_warp() { return current->cta->index.x * threads_a_cta + current->index.x / kWarp * kWarp; }
uint32_t self() { return first_of_warp() + (acting < 0 ? lane() : acting); }

std::string name(uint32_t who) {
    return who >= threads ? "the copy engine for barrier " + std::to_string(who - threads)
                          : "thread " + std::to_string(who % threads_a_cta) + " of CTA " + std::to_string(who / threads_a_cta);
}

// The compiler does not expect its calls to throw.
void report(const std::string& what, const Memory& memory, size_t unit) {
    if (first.empty())
        first = "race: " + what + " at " + std::to_string(unit * kUnit) + " of " + memory.name;
}

// Lets the others run first, once in a while.
void disturb() {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    if (undisturbed == 0 && random_state >> 33 < (1u << 31) / 500) {
        ++progress;   // it will go on
        swapcontext(&current->context, &scheduler);
    }
}

// Calls back for each unit of an access to the workspace or to shared memory of the current cluster.
template <class Visit>
void visit(const void* p, size_t bytes, Visit visit_unit) {
    if (quiet > 0 || current == nullptr)
        return;
    const auto* at = static_cast<const uint8_t*>(p);
    const auto visit_memory = [&](Memory& memory) {
        if (at < memory.begin || at >= memory.end)
            return;
        const size_t from = at - memory.begin;
        if (memory.units[from / kUnit].data)
            disturb();
        for (size_t unit = from / kUnit; unit < (from + bytes + kUnit - 1) / kUnit; ++unit)
            if (memory.units[unit].data)
                visit_unit(memory, memory.units[unit], unit);
    };
    visit_memory(memories[0]);
    for (const Cta* cta : current->cta->cluster)
        visit_memory(memories[1 + cta->index.x]);
}

void check(const Access& before, const char* what, uint32_t who, const Clock& clock, const Memory& memory, size_t unit) {
    if (before.when > known(clock, before.who))
        report(std::string(what) + ", by " + name(before.who) + " and " + name(who) + ",", memory, unit);
}

// By whom the access is to be known: the current thread itself, or what it has asked to read.
void read(Memory& memory, Unit& x, size_t unit, const Access& access) {
    check(x.write, "a read after a write", access.who, clocks[self()], memory, unit);
    for (Access& r : x.reads)
        if (r.who == access.who) {
            r.when = access.when;
            return;
        }
    x.reads.push_back(access);
}

Access own() { return {self(), clocks[self()][self()]}; }

void read(const void* p, size_t bytes) {
    visit(p, bytes, [](Memory& memory, Unit& x, size_t unit) { read(memory, x, unit, own()); });
}

void overwrite(Memory& memory, Unit& x, size_t unit, const Clock& clock, uint32_t who, uint32_t when) {
    check(x.write, "a write after a write", who, clock, memory, unit);
    for (const Access& r : x.reads)
        check(r, "a write after a read", who, clock, memory, unit);
    x.write = {who, when};
    x.reads.clear();
}

void write(const void* p, size_t bytes) {
    visit(p, bytes, [](Memory& memory, Unit& x, size_t unit) {
        const uint32_t me = self();
        overwrite(memory, x, unit, clocks[me], me, clocks[me][me]);
    });
}

// Nobody but the copy engine wrote it; or a fence behind the write came before what made it known, or came since.
void check_fenced(const Unit& x, const Memory& memory, size_t unit) {
    const uint32_t writer = x.write.who, me = self();
    if (x.write.when == 0 || writer >= threads || x.write.when <= known(fenced[me], writer))
        return;
    const auto fence = std::lower_bound(fences[writer].begin(), fences[writer].end(), x.write.when);
    if (fence == fences[writer].end() || *fence > known(clocks[me], writer))
        report("no proxy fence after the write by " + name(writer), memory, unit);
}


}  // namespace

void begin(uint64_t seed, const void* workspace, size_t bytes) {
    memories.clear();
    memories.emplace_back(workspace, bytes, "the workspace");
    meetings.clear();
    agent_clocks.clear();
    first.clear();
    random_state = seed;
    threads = 0;
}

void begin_cta(const void* shared, int threads_of_cta) {
    memories.emplace_back(shared, kSharedBytes, "shared memory");
    threads_a_cta = threads_of_cta;
    threads += threads_of_cta;
    clocks.assign(threads, Clock(threads));
    fenced.assign(threads, {});
    fences.assign(threads, {});
    for (uint32_t t = 0; t < threads; ++t)
        clocks[t][t] = 1;
}

std::string found() { return first; }

void meet_warp() {
    Clock* lanes = &clocks[first_of_warp()];
    Clock all = lanes[0];
    for (int l = 1; l < kWarp; ++l)
        join(all, lanes[l]);
    for (int l = 0; l < kWarp; ++l) {
        lanes[l] = all;
        ++lanes[l][first_of_warp() + l];
    }
}

void arrive(const void* at) {
    join(meetings[at].pending, clocks[self()]);
    ++clocks[self()][self()];
}

void complete(const void* at) {
    Meeting& m = meetings[at];
    join(m.completed, m.pending);
    m.pending.clear();
}

void pass(const void* at) { join(clocks[self()], meetings[at].completed); }

void fence() {
    const uint32_t me = self();
    fenced[me] = clocks[me];
    fences[me].push_back(clocks[me][me]++);
}

void copied(const void* to, const void* from, int bytes, const void* at) {
    Meeting& m = meetings[at];
    if (m.agent == 0) {
        m.agent = threads + agent_clocks.size();
        agent_clocks.push_back(0);
    }
    const uint32_t when = ++agent_clocks[m.agent - threads];
    if (from)
        visit(from, bytes, [&](Memory& memory, Unit& x, size_t unit) {
            check_fenced(x, memory, unit);
            read(memory, x, unit, {m.agent, when});
        });
    visit(to, bytes, [&](Memory& memory, Unit& x, size_t unit) {
        check_fenced(x, memory, unit);
        overwrite(memory, x, unit, clocks[self()], m.agent, when);
    });
    if (m.pending.size() <= m.agent)
        m.pending.resize(m.agent + 1);
    m.pending[m.agent] = std::max(m.pending[m.agent], when);   // others may have copied for it since
}

void read_by_wgmma(const void* from, int bytes) {
    visit(from, bytes, [](Memory& memory, Unit& x, size_t unit) {
        check_fenced(x, memory, unit);
        read(memory, x, unit, own());
    });
}

void not_data(const void* at, int bytes) {
    visit(at, bytes, [](Memory&, Unit& x, size_t) { x.data = false; });
}

Undisturbed::Undisturbed() { ++undisturbed; }
Undisturbed::~Undisturbed() { --undisturbed; }
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
