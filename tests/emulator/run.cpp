// The forward kernel on emulated threads, for ctypes: see test_emulated.py.
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>

#include "emulator.h"
#include "fwd_kernel.cuh"

namespace emulator {

Thread* current;
ucontext_t scheduler;
uint64_t progress;

namespace {

std::function<void()> kernel;
std::string error;

void run_thread() {
    try {
        kernel();
    } catch (const std::exception& e) {
        error = e.what();
    }
    current->finished = true;
    ++progress;
    swapcontext(&current->context, &scheduler);
}

// How many threads wait for what.
std::string waiting(const std::vector<Thread*>& threads) {
    std::map<std::string, int> counts;
    for (const Thread* thread : threads)
        ++counts[thread->waits_for ? thread->waits_for : "nothing"];
    std::string text = "locked up:";
    for (const auto& item : counts)
        text += " " + std::to_string(item.second) + " threads wait for " + item.first + ";";
    return text;
}

void run_cta(uint32_t index, int threads, uint64_t& seed) {
    const std::unique_ptr<uint8_t, decltype(&free)> shared(static_cast<uint8_t*>(aligned_alloc(1024, kSharedBytes)), &free);
    memset(shared.get(), 0xff, kSharedBytes);   // as NaN as can be
    races::begin();
    Cta cta;
    cta.index = {index};
    cta.threads = threads;
    cta.warps.resize(threads / kWarp);
    cta.shared = shared.get();
    std::vector<Thread> all(threads);
    std::vector<Thread*> live;
    for (int t = 0; t < threads; ++t) {
        Thread& thread = all[t];
        thread.cta = &cta;
        thread.index = {static_cast<uint32_t>(t)};
        thread.stack.resize(64 << 10);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
        live.push_back(&thread);
    }
    uint64_t before = ~progress;
    while (!live.empty() && error.empty() && progress != before) {
        before = progress;
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        std::rotate(live.begin(), live.begin() + (seed >> 33) % live.size(), live.end());
        for (Thread* thread : live) {
            current = thread;
            swapcontext(&scheduler, &thread->context);
            current = nullptr;
        }
        if (error.empty())
            error = races::found();
        live.erase(std::remove_if(live.begin(), live.end(), [](Thread* thread) { return thread->finished; }), live.end());
    }
    if (error.empty() && !live.empty())
        error = waiting(live);
}

}  // namespace
}  // namespace emulator

// Returns what went wrong, or an empty string.
extern "C" const char* emulate_fwd(const void* q, const void* k, const void* v, const void* g, const void* beta, void* out, const float* A_log,
                                   const float* dt_bias, const void* initial_state, void* final_state, const int64_t* cu_seqlens,
                                   int64_t num_sequences, int64_t tokens, int64_t heads, int state_is_fp32, float scale,
                                   float lower_bound, uint64_t seed) {
    using namespace flash_kda::sm90;
    const int64_t rows = cu_seqlens ? tokens : num_sequences * tokens;
    KernelParams p{};
    p.q = {q, rows, heads, 1};
    p.k = {k, rows, heads, 1};
    p.v = {v, rows, heads, kHalves};
    p.g = {g, rows, heads, kHalves};
    p.beta = static_cast<const bf16*>(beta);
    p.out = static_cast<bf16*>(out);
    p.A_log = A_log;
    p.dt_bias = dt_bias;
    p.initial_state = initial_state;
    p.final_state = final_state;
    p.cu_seqlens = cu_seqlens;
    p.tokens = tokens;
    p.heads = static_cast<uint32_t>(heads);
    p.state_is_fp32 = state_is_fp32 != 0;
    p.scale = scale;
    p.lower_bound = lower_bound;
    emulator::error.clear();
    emulator::kernel = [&] { fwd_kernel(p); };
    for (int64_t chain = 0; chain < num_sequences * heads && emulator::error.empty(); ++chain)
        emulator::run_cta(static_cast<uint32_t>(chain), kThreads, seed);
    return emulator::error.c_str();
}
