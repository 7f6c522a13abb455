// Thin wrappers of the instructions the kernels are made of: asynchronous copies, barriers, register shares, tensor cores.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include "wgmma_sizes.h"

namespace taylor {

__device__ __forceinline__ uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---------------------------------------------------------------------------------------------------- copies
// A box of a tensor to shared memory, counted at a barrier whole, also where it reaches beyond the tensor, which reads zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t bar, int a, int b, int c) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(a), "r"(b), "r"(c) : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t bar, int a, int b, int c, int d, int e) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e) : "memory");
}
// A box from shared memory to a tensor, read and written while the thread goes on; what reaches beyond the tensor is dropped.
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t from, int a, int b, int c, int d, int e) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
                 ::"l"(map), "r"(from), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e) : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
__device__ __forceinline__ void bulk_stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory may be written again; until all is written.
__device__ __forceinline__ void bulk_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// What this thread wrote to shared memory becomes visible to wgmma (before the barrier that hands it over).
__device__ __forceinline__ void fence_for_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ uint32_t load_shared(uint32_t at) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ float2 load_shared2(uint32_t at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared_vector(uint32_t at, const uint32_t (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ uint4 load_shared_vector(uint32_t at) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ float4 load_shared4(uint32_t at) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at) : "memory");
    return x;
}
// Four 8 x 8 matrices from accumulator fragments to rows of 16 bytes; each lane names the row of one matrix.
__device__ __forceinline__ void stsm4(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void stsm2(uint32_t at, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}

// ---------------------------------------------------------------------------------------------------- barriers
// One arrival a warp, after everything its lanes did. Tools that look for races do not follow __syncwarp into another
// lane's arrival: with EVERY_LANE_ARRIVES defined each lane arrives for itself.
#ifdef EVERY_LANE_ARRIVES
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void barrier_init(uint32_t bar, int warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(warps * kWarpArrivals) : "memory");
}
__device__ __forceinline__ void barriers_ready() {    // for copies, by the thread that made them
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_for_tensor_cores();
}
// The phase does not end before as many bytes of copies have come. No arrival.
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(bar) : "memory");
}
__device__ __forceinline__ bool barrier_passed(uint32_t bar, int parity) {
    uint32_t done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done;
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, int parity) {
    while (!barrier_passed(bar, parity)) {}
}
__device__ __forceinline__ void warp_arrive(uint32_t bar) {
    __syncwarp();
    if (kWarpArrivals == 32 || (threadIdx.x & 31) == 0) barrier_arrive(bar);
}

// The warpgroup's threads wait for each other, at one of the block's barriers 1 to 15.
__device__ __forceinline__ void warpgroup_sync(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

// Until the kernel before this one in the stream is done, its results visible; the next one may start its first steps now. So
// what came before the kernel before is done from the start.
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
}

// Registers of this warpgroup from here on: a multiple of 8.
template <int Count> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---------------------------------------------------------------------------------------------------- tensor cores
// Operand in shared memory made of 8 x 8 cores (8 rows of 16 bytes, 128 bytes in a row); distances in bytes between cores
// along K and along the other dimension. The 16-byte rows run along K, or along N where the product is told Trans = 1.
__device__ __forceinline__ uint64_t operand(uint32_t at, int k_distance, int other_distance) {
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(k_distance >> 4) << 16 | (uint64_t)(other_distance >> 4) << 32;
}
// Operand in shared memory made of rows of 128 bytes as a swizzled box leaves them, 8 rows in 1024 aligned bytes. The rows run
// along K, 32 bytes a product, or along N where the product is told Trans = 1: then `panel` bytes from 64 columns to the next 64.
__device__ __forceinline__ uint64_t swizzled(uint32_t at, int panel = 16) {
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
// The operand `bytes` further on: one addition, where making it anew takes four.
__device__ __forceinline__ uint64_t further(uint64_t operand, int bytes) {
    return (operand & 0xffffffff00000000ull) | ((uint32_t)operand + (uint32_t)(bytes >> 4));
}
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The small product of one warp, m16n8k16.
__device__ __forceinline__ void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------------- packed bf16
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ float low(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm volatile("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm volatile("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
// a*b - product, exactly what rounding `product` left out.
__device__ __forceinline__ uint32_t residual2(uint32_t a, uint32_t b, uint32_t product) {
    return fma2(a, b, product ^ 0x80008000u);
}

// ---------------------------------------------------------------------------------------------------- host
constexpr int kMaxShared = 232448;               // bytes of shared memory that a block may have

// The map of a bf16 tensor, its innermost dimension first, strides of the others in elements.
template <int Rank>
inline bool make_map(CUtensorMap* map, const void* tensor, const int64_t (&sizes)[Rank], const int64_t (&strides)[Rank - 1],
                     const int (&box)[Rank], CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult status;
        const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
        return code == cudaSuccess && status == cudaDriverEntryPointSuccess ? (Encode)function : nullptr;
    }();
    cuuint64_t size[Rank], pitch[Rank];
    cuuint32_t edge[Rank], ones[Rank];
    for (int i = 0; i < Rank; ++i) {
        size[i] = sizes[i];
        edge[i] = box[i];
        ones[i] = 1;
        if (i > 0) pitch[i - 1] = strides[i - 1] * sizeof(__nv_bfloat16);
    }
    return encode && encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, Rank, (void*)tensor, size, pitch, edge, ones,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace taylor

// One instantiation for every supported head_dim.
#define HEAD_DIM_DISPATCH(D, CALL)                              \
    switch (D) {                                                \
        case 64: { constexpr int kD = 64; return CALL; }        \
        case 80: { constexpr int kD = 80; return CALL; }        \
        case 96: { constexpr int kD = 96; return CALL; }        \
        case 112: { constexpr int kD = 112; return CALL; }      \
        case 128: { constexpr int kD = 128; return CALL; }      \
        default: return 1; /* cudaErrorInvalidValue */          \
    }
