// Stands for csrc/sm90/ptx.h: the same functions.
#pragma once

#include "emulator.h"

namespace flash_kda::sm90 {

inline uint32_t smem_address(const void* p) {
    const emulator::Cta& cta = *emulator::current->cta;
    return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - cta.shared) + emulator::window(cta) + emulator::kDriversBytes;
}

// ---- mbarriers

struct Barrier {
    static constexpr uint8_t kMark = 0xba;
    int32_t bytes;   // still to come in this phase
    uint32_t arrivals : 11, missing : 11, phase : 1, mark : 9;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline Barrier& barrier(uint8_t* at) {
    Barrier& b = *reinterpret_cast<Barrier*>(at);
    if (b.mark != Barrier::kMark)
        emulator::fail("no barrier there");
    return b;
}
inline Barrier& barrier(uint64_t& bar) { return barrier(emulator::shared(smem_address(&bar), 8)); }

inline void settle(Barrier& b) {
    if (b.missing == 0 && b.bytes == 0) {
        b.phase ^= 1;
        b.missing = b.arrivals;
        emulator::races::complete(&b);
        ++emulator::progress;
    }
}

inline void mbarrier_init(uint64_t& bar, int arrivals) {
    const uint32_t n = arrivals;
    emulator::races::not_data(&bar, sizeof(bar));
    *reinterpret_cast<Barrier*>(&bar) = {0, n, n, 0, Barrier::kMark};
}

inline void fence_mbarrier_init() {}

inline void arrive(Barrier& b, int bytes, uint32_t arrivals = 1) {
    if (b.missing < arrivals)
        emulator::fail("one arrival too many at a barrier");
    emulator::warp().asked = 0;
    emulator::races::arrive(&b);
    b.missing -= arrivals;
    b.bytes += bytes;
    settle(b);
}

inline void mbarrier_arrive_expect_bytes(uint64_t& bar, int bytes) { arrive(barrier(bar), bytes); }
inline void mbarrier_arrive(uint32_t bar, uint32_t arrivals = 1) { arrive(barrier(emulator::shared(bar, 8)), 0, arrivals); }

inline void mbarrier_wait(uint32_t bar, uint32_t parity) {
    Barrier& b = barrier(emulator::shared(bar, 8));
    emulator::wait_until("a barrier", [&] { return b.phase != (parity & 1); });
    emulator::races::pass(&b);
    emulator::warp().asked = 0;
}

inline bool mbarrier_test(uint32_t bar, uint32_t parity) {
    Barrier& b = barrier(emulator::shared(bar, 8));
    if (b.phase == (parity & 1))
        return false;
    emulator::races::pass(&b);
    return true;
}

// ---- the launch's shared memory, registers, election, fences

inline void* dynamic_shared_memory() { return emulator::current->cta->shared; }

template <int kRegisters>
void give_back_registers() {}

template <int kRegisters>
void take_registers() {}

inline bool elect_one() {
    emulator::together("elect", nullptr, [](void**) {});
    return emulator::lane() == 0;
}

inline void fence_async_proxy() { emulator::races::fence(); }
inline void fence_async_proxy_global() { emulator::races::fence(); }

template <class T>
T resident(T x) {
    return x;
}

inline int thread_index() { return threadIdx.x; }

inline void barrier(int id, int threads) { emulator::meet(emulator::current->cta->named[id], threads); }

inline void bulk_copy(void* to, const void* from, int bytes, Barrier& landed) {
    emulator::races::copied(to, from, bytes, &landed);
    emulator::races::Quiet quiet;
    memcpy(to, from, bytes);
    landed.bytes -= bytes;
    settle(landed);
}

inline void bulk_prefetch(const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
        emulator::fail("bad bytes to prefetch");
}

inline void bulk_load(void* to, const void* from, int bytes, uint64_t& loaded) { bulk_copy(to, from, bytes, barrier(loaded)); }

// ---- the CTAs of a cluster

inline uint32_t address_in_cta(uint32_t address, int rank) { return address % emulator::kWindow + rank * emulator::kWindow; }

inline void meet_cluster() { emulator::meet_cluster(); }

inline Barrier& barrier_in_cluster(uint32_t bar) { return barrier(emulator::shared_in_cluster(bar, 8, 8)); }

inline void mbarrier_arrive_in_cluster(uint32_t bar, bool arrives) {
    if (arrives)
        arrive(barrier_in_cluster(bar), 0);
}

inline void mbarrier_arrive_expect_bytes_in_cluster(uint32_t bar, int bytes) { arrive(barrier_in_cluster(bar), bytes); }

inline void bulk_push(uint32_t to, const void* from, int bytes, uint32_t landed) {
    bulk_copy(emulator::shared_in_cluster(to, bytes, 16), from, bytes, barrier_in_cluster(landed));
}

// ---- global memory between CTAs

inline uint64_t load_acquire(const uint64_t* p) {
    emulator::races::not_data(p, sizeof(*p));
    emulator::races::pass(p);
    const uint64_t seen = *p;
    emulator::Thread& thread = *emulator::current;
    emulator::warp().asked = thread.word == p && thread.answer == seen ? emulator::warp().asked + 1 : 0;
    thread.word = p;
    thread.answer = seen;
    emulator::wait_until("another CTA", [turns = 0]() mutable { return turns++ > 0; });
    return seen;
}

inline void store_release(uint64_t* p, uint64_t x) {
    emulator::races::not_data(p, sizeof(*p));
    emulator::races::arrive(p);
    emulator::races::complete(p);
    *p = x;
    ++emulator::progress;
}

inline void atomic_count(uint32_t* p, uint32_t last) {
    ++emulator::progress;
    *p = *p >= last ? 0 : *p + 1;
}

// ---- single loads and stores

inline uint32_t load_global_bf16(const __nv_bfloat16* p) { return p->bits; }

inline float2 load_shared_float2(uint32_t address) { return *reinterpret_cast<float2*>(emulator::shared(address, 8)); }
inline float4 load_shared_float4(uint32_t address) { return *reinterpret_cast<float4*>(emulator::shared(address, 16)); }

inline void store_shared_4_bytes(uint32_t address, uint32_t x) { memcpy(emulator::shared(address, 4), &x, 4); }

inline void store_shared_16_bytes(uint32_t address, float x, float y, float z, float w) {
    *reinterpret_cast<float4*>(emulator::shared(address, 16)) = {x, y, z, w};
}

inline uint4 load_shared_16_bytes(uint32_t address) { return *reinterpret_cast<uint4*>(emulator::shared(address, 16)); }

inline void store_shared_16_bytes(uint32_t address, const uint32_t (&x)[4]) { memcpy(emulator::shared(address, 16), x, 16); }

// ---- 8x8 matrices: lane l has elements 2 (l % 4) and the next of row l / 4, transposed of column l / 4; lane 8 q + r names row r of matrix q

template <class Registers>
void move_matrices(const char* what, Registers* registers, uint32_t address, bool store, bool transposed, int count = 4) {
    struct Argument {
        uint32_t* registers;
        uint32_t address;
    } mine{const_cast<uint32_t*>(registers), address};
    emulator::together(what, &mine, [=](void** all) {
        for (int q = 0; q < count; ++q)
            for (int l = 0; l < emulator::kWarp; ++l)
                for (int i = 0; i < 2; ++i) {
                    const int row = transposed ? l % 4 * 2 + i : l / 4, column = transposed ? l / 4 : l % 4 * 2 + i;
                    emulator::races::Acting acting(8 * q + row);
                    uint8_t* memory = emulator::shared(static_cast<Argument*>(all[8 * q + row])->address, 16) + 2 * column;
                    uint8_t* mine = reinterpret_cast<uint8_t*>(&static_cast<Argument*>(all[l])->registers[q]) + 2 * i;
                    memcpy(store ? memory : mine, store ? mine : memory, 2);
                }
    });
}

inline void ldmatrix_x4(uint32_t* d, uint32_t address) { move_matrices("ldmatrix", d, address, false, false); }
inline void ldmatrix_x4_trans(uint32_t* d, uint32_t address) { move_matrices("ldmatrix.trans", d, address, false, true); }
inline void stmatrix_x4(uint32_t address, const uint32_t (&x)[4]) { move_matrices("stmatrix", x, address, true, false); }
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&x)[4]) { move_matrices("stmatrix.trans", x, address, true, true); }

inline uint32_t transposed(uint32_t x) {
    struct Argument {
        uint32_t from, to;
    } mine{x, 0};
    emulator::together("movmatrix", &mine, [](void** all) {
        const auto of = [&](int lane) -> Argument& { return *static_cast<Argument*>(all[lane]); };
        for (int l = 0; l < emulator::kWarp; ++l)
            for (int i = 0; i < 2; ++i) {
                const int row = l % 4 * 2 + i, column = l / 4;
                of(l).to |= (of(row * 4 + column / 2).from >> column % 2 * 16 & 0xffff) << 16 * i;
            }
    });
    return mine.to;
}

// ---- products of a warp: d [16, 8] = a [16, K] b [K, 8] + c, by the lanes that hold an element

struct Operands {
    float* d;
    const float* c;
    const void* a;
    const void* b;
};

// `a_of(lane's a, row, k)` reads from the lane that has the element; likewise `b_of`.
template <int K, class A, class B>
void multiply(const char* what, Operands mine, A a_of, B b_of, int lanes_k) {
    emulator::together(what, &mine, [=](void** all) {
        const auto of = [&](int lane) -> Operands& { return *static_cast<Operands*>(all[lane]); };
        float sums[emulator::kWarp][4];
        for (int l = 0; l < emulator::kWarp; ++l)
            for (int i = 0; i < 4; ++i) {
                const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
                double sum = of(l).c[i];
                for (int k = 0; k < K; ++k) {
                    const int holder = k / lanes_k % 4;
                    sum += static_cast<double>(a_of(of(row % 8 * 4 + holder).a, row, k)) * b_of(of(column * 4 + holder).b, k);
                }
                sums[l][i] = static_cast<float>(sum);
            }
        for (int l = 0; l < emulator::kWarp; ++l)
            memcpy(of(l).d, sums[l], sizeof(sums[l]));
    });
}

inline float bf16_of(const void* registers, int index, int half) {
    return emulator::from_bf16(static_cast<const uint32_t*>(registers)[index] >> (16 * half));
}

inline void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    multiply<16>(
        "mma", {d, d, a, b}, [](const void* x, int row, int k) { return bf16_of(x, k / 8 * 2 + row / 8, k % 2); },
        [](const void* x, int k) { return bf16_of(x, k / 8, k % 2); }, 2);
}

inline void mma_m16n8k8(float* d, const uint32_t* a, uint32_t b) {
    multiply<8>(
        "mma.k8", {d, d, a, &b}, [](const void* x, int row, int k) { return bf16_of(x, row / 8, k % 2); },
        [](const void* x, int k) { return bf16_of(x, 0, k % 2); }, 2);
}

inline float fp16_of(const void* registers, int index, int half) {
    return emulator::from_fp16(static_cast<const uint32_t*>(registers)[index] >> (16 * half));
}

inline void mma_m16n8k16_fp16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const float* c) {
    const uint32_t b[2] = {b0, b1};
    multiply<16>(
        "mma.fp16", {d, c, a, b}, [](const void* x, int row, int k) { return fp16_of(x, k / 8 * 2 + row / 8, k % 2); },
        [](const void* x, int k) { return fp16_of(x, k / 8, k % 2); }, 2);
}

inline float tf32_of(const void* registers, int index) {
    return __uint_as_float(__float_as_uint(static_cast<const float*>(registers)[index]) & ~0x1fffu);
}

inline void mma_m16n8k8_tf32(float* d, const float* a, float b0, float b1, const float* c) {
    const float b[2] = {b0, b1};
    multiply<8>(
        "mma.tf32", {d, c, a, b}, [](const void* x, int row, int k) { return tf32_of(x, k / 4 * 2 + row / 8); },
        [](const void* x, int k) { return tf32_of(x, k / 4); }, 1);
}

// ---- arithmetic

inline float exp2_approx(float x) { return exp2f(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return 1.0f / sqrtf(x); }
inline uint32_t pack_bf16(float low, float high) { return emulator::to_bf16(low) | static_cast<uint32_t>(emulator::to_bf16(high)) << 16; }
inline uint32_t pack_fp16(float low, float high) { return emulator::to_fp16(low) | static_cast<uint32_t>(emulator::to_fp16(high)) << 16; }
inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    return pack_bf16(emulator::from_bf16(a) * emulator::from_bf16(b), emulator::from_bf16(a >> 16) * emulator::from_bf16(b >> 16));
}
inline float2 unpack_fp16(uint32_t pair) { return {emulator::from_fp16(pair), emulator::from_fp16(pair >> 16)}; }
inline float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace flash_kda::sm90
