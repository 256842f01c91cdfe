// Hopper's own instructions for 16-bit T: warpgroup products (wgmma), bulk tensor copies, barriers that count bytes.
//
// A tile in shared memory is a row of *boxes*, each what one copy brings: LINES lines of 64 elements (128 bytes), 16-byte
// chunks permuted by xor with the line modulo 8 (the 128-byte swizzle); every box starts at a multiple of 1,024 bytes. A tile
// wider than 64 elements is several boxes, one after another. Tensor maps come from src/cuda/tensor_map.rs.
//
// Include it inside `#ifdef __CUDA_ARCH_FEAT_SM90_ALL`, but for TensorMap.
#pragma once
#include "common.cuh"

struct alignas(64) TensorMap { u64 opaque[16]; };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int BOX = 64 * 64 * 2; // bytes of a box of 64 lines

// ---- registers, barriers, copies ----

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and makes the phase wait for that many bytes too.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// Until the phase of that parity is over; the phase before a barrier's first counts as over, with parity 1.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile("{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
               "@over bra done;\nbra again;\ndone:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// `threads` threads (whole warps) meet at barrier `name`, 1 to 15; 0 is __syncthreads.
DEVICE void meet(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// Counts at such a barrier without waiting there.
DEVICE void arrive(int name, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

// A box, its first element at those coordinates; what lies outside the tensor reads as zeros. Its bytes count in `barrier`.
DEVICE void copy_box(u32 to, const TensorMap *map, u32 barrier, int x, int line, int batch) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(line), "r"(batch) : "memory");
}
DEVICE void copy_box(u32 to, const TensorMap *map, u32 barrier, int x, int line, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(line), "r"(head), "r"(batch) : "memory");
}
DEVICE void prefetch_map(const TensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Shared memory that this thread wrote by ordinary stores may be read by wgmma and the copy engine, after a barrier.
DEVICE void stores_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroup products ----

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups are under way.
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// How wgmma finds a tile. Of an operand whose k runs along the lines (ALONG) 16 of k are 32 bytes, and k = 64 opens the next
// box; of one whose k runs over the lines (ACROSS) 16 of k are 16 lines, 2,048 bytes, and m or n = 64 opens the next box,
// BOX bytes on.
// 8 lines, or of ACROSS 8 of k, are followed by the next `apart` bytes on: 1,024 where they lie together.
DEVICE u64 describe(u32 address, int apart = 1024) {
  return (u64)(address >> 4 & 0x3fff) | (u64)(BOX >> 4) << 16 | (u64)(apart >> 4) << 32 | (u64)1 << 62;
}
enum : int { ALONG = 0, ACROSS = 1 };
constexpr u32 STEP_ALONG = 32, STEP_ACROSS = 16 * 128;

// acc[64, N] (+)= a[64, 16] b[16, N], `add` 0 or 1. Warp w of the group has rows 16 w to 16 w + 15: acc[j] holds columns
// 8 j + 2 (lane % 4) + {0, 1} of row lane / 4 and, in elements 2 and 3, of the row 8 below. a from registers lies as mma's:
// k 2 (lane % 4) + {0, 1} of row lane / 4, the row 8 below, then k + 8 of both.
template <typename E, int N, int A, int B> struct Wgmma;
#define ACC(j) "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define ACC4(j) ACC(j), ACC(j + 1), ACC(j + 2), ACC(j + 3)
#define ACC8(j) ACC4(j), ACC4(j + 4)
#define ACC16(j) ACC8(j), ACC8(j + 8)
#define ACC20(j) ACC16(j), ACC4(j + 16)
#define ACC32(j) ACC16(j), ACC16(j + 16)
#define SUMS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15 "
#define SUMS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
#define SUMS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63 "
#define SUMS_160 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79 "
#define SUMS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127 "
// The operands after the sums have the numbers A (a, or four registers of it), B, ADD, and the layouts LA, LB.
#define WGMMA(E, NAME, N, J, A, B, ADD, LA, LB, R1, R2, R3, RB, RADD, RLB)                                                     \
  template <int TA, int TB> struct Wgmma<E, N, TA, TB> {                                                                       \
    static DEVICE void shared(float (&acc)[N / 8][4], u64 a, u64 b, int add) {                                                 \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME   \
                   "." NAME " {" SUMS_##N "}, %" #A ", %" #B ", add, 1, 1, %" #LA ", %" #LB ";\n}"                              \
                   : ACC##J(0) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));                                                  \
    }                                                                                                                          \
    static DEVICE void held(float (&acc)[N / 8][4], const u32 (&a)[4], u64 b, int add) {                                       \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #RADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME  \
                   "." NAME " {" SUMS_##N "}, {%" #A ", %" #R1 ", %" #R2 ", %" #R3 "}, %" #RB ", add, 1, 1, %" #RLB ";\n}"      \
                   : ACC##J(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB));                       \
    }                                                                                                                          \
  };
WGMMA(bf16, "bf16", 32, 4, 16, 17, 18, 19, 20, 17, 18, 19, 20, 21, 22)
WGMMA(f16, "f16", 32, 4, 16, 17, 18, 19, 20, 17, 18, 19, 20, 21, 22)
WGMMA(bf16, "bf16", 64, 8, 32, 33, 34, 35, 36, 33, 34, 35, 36, 37, 38)
WGMMA(f16, "f16", 64, 8, 32, 33, 34, 35, 36, 33, 34, 35, 36, 37, 38)
WGMMA(bf16, "bf16", 128, 16, 64, 65, 66, 67, 68, 65, 66, 67, 68, 69, 70)
WGMMA(f16, "f16", 128, 16, 64, 65, 66, 67, 68, 65, 66, 67, 68, 69, 70)
WGMMA(bf16, "bf16", 160, 20, 80, 81, 82, 83, 84, 81, 82, 83, 84, 85, 86)
WGMMA(f16, "f16", 160, 20, 80, 81, 82, 83, 84, 81, 82, 83, 84, 85, 86)
WGMMA(bf16, "bf16", 256, 32, 128, 129, 130, 131, 132, 129, 130, 131, 132, 133, 134)
WGMMA(f16, "f16", 256, 32, 128, 129, 130, 131, 132, 129, 130, 131, 132, 133, 134)

template <int A, int B, int N> DEVICE void wgmma(float (&acc)[N][4], u64 a, u64 b, int add) { Wgmma<T, N * 8, A, B>::shared(acc, a, b, add); }
template <int B, int N> DEVICE void wgmma_held(float (&acc)[N][4], const u32 (&a)[4], u64 b, int add) { Wgmma<T, N * 8, ALONG, B>::held(acc, a, b, add); }
#endif
