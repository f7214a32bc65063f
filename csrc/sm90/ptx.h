// One-instruction wrappers. Each that writes memory, or reads what the kernel writes, says so to the compiler, so nothing is moved across it.
#pragma once

#include <cuda_bf16.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>

namespace flash_kda::sm90 {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers

__device__ __forceinline__ void mbarrier_init(uint64_t& bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&bar)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// In place of so many.
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar, uint32_t arrivals) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint64_t& bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&bar)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(bar),
        "r"(parity)
        : "memory");
}

// Whether that turn is over already.
__device__ __forceinline__ bool mbarrier_test(uint32_t bar, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}

// ---- the launch's shared memory, a warpgroup's share of the registers

__device__ __forceinline__ void* dynamic_shared_memory() {
    extern __shared__ __align__(1024) uint8_t memory[];
    return memory;
}

// To so many a thread.
template <int kRegisters>
__device__ __forceinline__ void give_back_registers() {
    cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

// ---- election, fences

// True in one lane of a converged warp, and the compiler knows that it is one.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred one;\n"
        "elect.sync _|one, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, one;\n"
        "}\n"
        : "=r"(elected)::"memory");
    return elected != 0;
}

// Orders this thread's shared-memory stores before later accesses by wgmma or the copy engine.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same value, from here on in a register of its own: the compiler would rather make some values anew, or copy them from a
// uniform register or from one another, before every use. Of no use for one that it knows at compile time: it sees through.
template <class T>
__device__ __forceinline__ T resident(T x) {
    static_assert(sizeof(T) == sizeof(uint32_t));
    uint32_t y;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(y) : "r"(reinterpret_cast<const uint32_t&>(x)), "r"(threadIdx.x % 32));
    return reinterpret_cast<const T&>(y);
}

// Among so many threads, by whole warps.
__device__ __forceinline__ void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- the CTAs of a cluster

// The address, as the cluster knows it, of what lies at `address` in the CTA of this rank.
__device__ __forceinline__ uint32_t address_in_cta(uint32_t address, int rank) {
    uint32_t d;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(address), "r"(rank));
    return d;
}

// __syncthreads for all threads of all its CTAs, but of what one has written the other CTAs know only of mbarriers: the barrier's own release would
// wait for all of global memory.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("fence.acq_rel.cta;\nbarrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrivals that say that this thread has read, or is about to copy: no write of its own goes with them, for which they would have to wait.
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint32_t bar, bool arrive) {
    asm volatile(
        "{\n"
        ".reg .pred arrive;\n"
        "setp.ne.u32 arrive, %1, 0;\n"
        "@arrive mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
        "}\n" ::"r"(bar),
        "r"(static_cast<uint32_t>(arrive))
        : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_bytes_in_cluster(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Contiguous bytes from this CTA to another by the copy engine, counted for `landed` there. Called by one thread.
__device__ __forceinline__ void bulk_push(uint32_t to, const void* from, int bytes, uint32_t landed) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "r"(smem_address(from)), "r"(bytes), "r"(landed)
                 : "memory");
}

// ---- global memory between CTAs

// Orders what this thread knows to have been written in global memory before later reads by the copy engine.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Contiguous bytes from global to shared memory by the copy engine, counted for `loaded`. Called by one thread.
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes, uint64_t& loaded) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_address(to)), "l"(from),
                 "r"(bytes), "r"(smem_address(&loaded))
                 : "memory");
}

// Contiguous bytes towards this SM, as far as L2, by the copy engine. Called by one thread.
__device__ __forceinline__ void bulk_prefetch(const void* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Counts up to `last`, and then from zero again. Nothing waits for it.
__device__ __forceinline__ void atomic_count(uint32_t* p, uint32_t last) {
    asm volatile("red.inc.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(last) : "memory");
}

// threadIdx.x, read anew: what is seldom made of it need not be kept in registers meanwhile.
__device__ __forceinline__ int thread_index() {
    int d;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(d));
    return d;
}

// ---- single loads and stores

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* p) {
    uint64_t d;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(d) : "l"(p) : "memory");
    return d;
}

__device__ __forceinline__ void store_release(uint64_t* p, uint64_t x) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
    float2 d;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(d.x), "=f"(d.y) : "r"(address) : "memory");
    return d;
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
    float4 d;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w) : "r"(address) : "memory");
    return d;
}

// A bf16 in the low half of a register. Unlike a load into a 16-bit variable, nothing waits for it before it is used.
__device__ __forceinline__ uint32_t load_global_bf16(const __nv_bfloat16* p) {
    uint32_t d;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(d) : "l"(p));
    return d;
}

__device__ __forceinline__ uint4 load_shared_16_bytes(uint32_t address) {
    uint4 d;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "r"(address) : "memory");
    return d;
}

__device__ __forceinline__ void store_shared_16_bytes(uint32_t address, const uint32_t (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

__device__ __forceinline__ void store_shared_16_bytes(uint32_t address, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

__device__ __forceinline__ void store_shared_4_bytes(uint32_t address, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// ---- 8x8 bf16 matrices between shared memory and registers

__device__ __forceinline__ void ldmatrix_x4(uint32_t* d, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t* d, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]),
                 "r"(x[3])
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}

// Transposes an 8x8 matrix that is spread over the warp's registers.
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}

// d[16, 8] += a[16, 16] b[16, 8]
__device__ __forceinline__ void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 8] b[8, 8]
__device__ __forceinline__ void mma_m16n8k8(float* d, const uint32_t* a, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// d[16, 8] = a[16, 16] b[16, 8] + c, a and b in fp16
__device__ __forceinline__ void mma_m16n8k16_fp16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const float* c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d[16, 8] = a[16, 8] b[8, 8] + c on fp32 registers; of a and b the tensor cores see the tf32 part: the lower 13 bits are cut off.
__device__ __forceinline__ void mma_m16n8k8_tf32(float* d, const float* a, float b0, float b1, const float* c) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---- arithmetic

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two fp32 to a bf16 pair, `low` in the low half, to nearest even.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// Two products of bf16 pairs, rounded to bf16.
__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ float2 unpack_fp16(uint32_t pair) {
    float2 d;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n" : "=f"(d.x), "=f"(d.y) : "r"(pair));
    return d;
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace flash_kda::sm90
