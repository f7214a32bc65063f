// The forward kernel on emulated threads, for ctypes: see test_emulated.py.
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>

#include "emulator.h"
#include "fwd_kernel.cuh"

namespace emulator {

Thread* current;
Index grid;
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
    ++current->cta->left;
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

void run_grid(uint32_t ctas, int ctas_a_cluster, int threads, uint64_t seed) {
    grid = {ctas};
    std::vector<Cta> all_ctas(ctas);
    std::vector<std::unique_ptr<uint8_t, decltype(&free)>> memories;
    std::vector<Thread> all(ctas * threads);
    std::vector<Thread*> live;
    for (uint32_t c = 0; c < ctas; ++c) {
        memories.emplace_back(static_cast<uint8_t*>(aligned_alloc(1024, kSharedBytes)), &free);
        memset(memories.back().get(), 0xff, kSharedBytes);   // as NaN as can be
        Cta& cta = all_ctas[c];
        cta.index = {c};
        cta.threads = threads;
        cta.warps.resize(threads / kWarp);
        cta.shared = memories.back().get();
        for (int rank = 0; rank < ctas_a_cluster; ++rank)
            cta.cluster.push_back(&all_ctas[c - c % ctas_a_cluster + rank]);
        races::begin_cta(cta.shared, threads);
        for (int t = 0; t < threads; ++t) {
            Thread& thread = all[c * threads + t];
            thread.cta = &cta;
            thread.index = {static_cast<uint32_t>(t)};
            thread.stack.resize(48 << 10);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, run_thread, 0);
            live.push_back(&thread);
        }
    }
    uint64_t before = ~progress;
    for (int idle = 0; !live.empty() && error.empty() && idle < 4; idle = progress == before ? idle + 1 : 0) {
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
                                   float lower_bound, int sharing_index, int ctas, int tasks, int least_chunks, int spare_pairs, int spare_chunks,
                                   int handovers, uint64_t seed) {
    using namespace flash_kda::sm90;
    const int64_t rows = cu_seqlens ? tokens : num_sequences * tokens;
    KernelParams p{};
    p.q = {q, rows, heads, kChunk, 1};
    p.k = {k, rows, heads, kChunk, 1};
    const auto sharing = static_cast<Sharing>(sharing_index);
    p.v_map = {v, rows, heads, kChunk, 1};
    p.v = static_cast<const bf16*>(v);
    p.g = {g, rows, heads, kChunk, kHalves};
    p.beta = static_cast<const bf16*>(beta);
    p.out = static_cast<bf16*>(out);
    std::vector<bf16> Y(sharing == Sharing::kSegments ? rows * heads * kDim : 0);
    memset(static_cast<void*>(Y.data()), 0xff, Y.size() * sizeof(bf16));
    p.Y = Y.data();
    p.out_map = {out, rows, heads, kCorrected, 1};
    p.Y_map = {p.Y, rows, heads, kCorrected, kHalves};
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
    p.num_sequences = static_cast<uint32_t>(num_sequences);
    p.tasks = tasks;
    p.least_chunks = least_chunks;
    p.regular_pairs = static_cast<uint32_t>(ctas / kPair - spare_pairs);
    p.spare_chunks = spare_chunks;
    std::vector<Handover> workspace(handovers + 1);   // one to be left alone
    memset(static_cast<void*>(workspace.data()), 0xff, workspace.size() * sizeof(Handover));
    p.workspace = {workspace.data(), static_cast<uint32_t>(handovers), 0x123456780000};
    emulator::error.clear();
    emulator::kernel = [&] {
        switch (sharing) {
            case Sharing::kSpans: return fwd_kernel<Sharing::kSpans>(p);
            case Sharing::kSegments: return fwd_kernel<Sharing::kSegments>(p);
        }
    };
    emulator::races::begin(seed, workspace.data(), handovers * sizeof(Handover));
    emulator::run_grid(ctas, kPair, kCtaThreads, seed);
    for (const Handover& handover : workspace)
        for (uint64_t left : handover.left)
            if (emulator::error.empty() && left >> 32 == p.workspace.ticket >> 32 && static_cast<uint32_t>(left) != 0)
                emulator::error = "a ticket is left in the workspace, or fetched once more after it was taken away";
    const auto* guard = reinterpret_cast<const uint8_t*>(&workspace.back());
    if (emulator::error.empty() && std::any_of(guard, guard + sizeof(Handover), [](uint8_t x) { return x != 0xff; }))
        emulator::error = "written past the workspace";
    return emulator::error.c_str();
}
