// Matrix product of 16-bit elements on Hopper's tensor cores: warpgroup products (wgmma) fed by bulk tensor copies.
//
//   D = A B (+ C) (+ bias): A [m, k], B [k, n], C and D [m, n], bias [n]; gemm.cuh holds arguments and order.
//   As a linear layer: y = x W^T; backward dx = dy W, dW += dy^T x. Nothing is saved.
//
// Blocks stay on their multiprocessor and walk the tiles of D, 128 x BN each. One thread of the first warpgroup copies the
// operands' tiles, 64 of k at a time, to a ring of STAGES places in shared memory; two warpgroups multiply, 64 rows each,
// f32 sums in registers. Per place one barrier says that the copies have landed and one that all are done with them.
//
// Launch: grid min(tiles * splits * batches, multiprocessors), block 384, dynamic shared memory 229,632. A and B come as
// tensor maps of rank 3, (along memory, lines, batch), boxes of 64 x 64 x 1, 128-byte swizzle, zeros outside; a batch stride
// of 0 in Product means that the map has one matrix.
//   gemm_tma_256   tile 128 x 256
//   gemm_tma_128   tile 128 x 128: products that leave fewer tiles
#include "gemm.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int BM = 128, BK = 64;
constexpr int BOX = 64 * 64 * 2;   // bytes of what one copy brings: 64 lines of 64 elements

struct alignas(64) TensorMap { u64 opaque[16]; };

// ---- instructions ----

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
// Until the phase of that parity is over.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile("{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
               "@over bra done;\nbra again;\ndone:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
DEVICE void copy_box(u32 to, const TensorMap *map, u32 barrier, int x, int line, int batch) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(line), "r"(batch) : "memory");
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// acc[64, N] += a[64, 16] b[16, N]; registers as mma's: acc[j] holds columns 8 j + 2 (lane % 4) + {0, 1} of rows lane / 4 and 8 below.
template <typename E> DEVICE void wgmma(float (&acc)[16][4], u64 a, u64 b);
template <typename E> DEVICE void wgmma(float (&acc)[32][4], u64 a, u64 b);
#define ACC(j) "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define ACC4(j) ACC(j), ACC(j + 1), ACC(j + 2), ACC(j + 3)
#define ACC16(j) ACC4(j), ACC4(j + 4), ACC4(j + 8), ACC4(j + 12)
#define WGMMA_128(E, NAME)                                                                                     \
  template <> DEVICE void wgmma<E>(float (&acc)[16][4], u64 a, u64 b) {                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                                                     \
  "}, %64, %65, 1, 1, 1, %66, %67;" : ACC16(0) : "l"(a), "l"(b), "n"(!A_K), "n"(!B_K));               \
  }
#define WGMMA_256(E, NAME)                                                                                     \
  template <> DEVICE void wgmma<E>(float (&acc)[32][4], u64 a, u64 b) {                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {"                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                                                                     \
  "}, %128, %129, 1, 1, 1, %130, %131;" : ACC16(0), ACC16(16) : "l"(a), "l"(b), "n"(!A_K), "n"(!B_K)); \
  }
WGMMA_128(bf16, "bf16")
WGMMA_128(f16, "f16")
WGMMA_256(bf16, "bf16")
WGMMA_256(f16, "f16")

// How wgmma finds a tile in shared memory that box copies made: boxes one after another along m (or n), in each 64 lines of
// 128 bytes, 16-byte chunks permuted by xor with the line modulo 8. Strides in units of 16 bytes: from one group of eight
// lines to the next, and (where k runs over lines) from one box to the next.
DEVICE u64 describe(u32 address) {
  return (u64)(address >> 4 & 0x3fff) | (u64)(BOX >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// Bytes from one 16 of k to the next: along a line, or 16 lines on.
constexpr u32 STEP_A = A_K ? 32 : 16 * 128, STEP_B = B_K ? 32 : 16 * 128;

// ---- epilogue ----

// Stores a warp's sums, rows `row` to row + 15 of D, 64 columns at a time through its own 4 KiB of shared memory, so that rows
// are read and written 16 bytes a lane. Groups of eight columns are permuted by xor with the row: no bank is met twice.
template <int BN> DEVICE void store_sums(const Product &p, const Place &tile, i64 row, float *own, const float (&acc)[BN / 8][4]) {
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
#pragma unroll
  for (int b = 0; b < BN / 64; b++) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        *reinterpret_cast<float2 *>(own + (r + h * 8) * 64 + ((j ^ (r & 7)) * 8 + q * 2)) = make_float2(acc[b * 8 + j][h * 2], acc[b * 8 + j][h * 2 + 1]);
    __syncwarp();
    float x[4][8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int from = lane / 8 + i * 4;
      load_row(x[i], own + from * 64 + ((lane ^ from) & 7) * 8, 8);
    }
    emit(p, tile, row + lane / 8, 4, tile.column + b * 64 + lane % 8 * 8, x);
    __syncwarp();
  }
}

// ---- the product ----

template <int BN, int STAGES> DEVICE void multiply(const TensorMap &map_a, const TensorMap &map_b, const Product &p) {
  constexpr int STAGE = (BM + BN) * BK * 2;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 stages = shared_address(shared), full = stages + STAGES * STAGE, empty = full + STAGES * 8;
  float *sums = reinterpret_cast<float *>(shared + STAGES * STAGE + 256);   // 4 KiB for each multiplying warp
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, 8);   // the multiplying warps
    }
    barrier_init_done();
  }
  __syncthreads();

  const u32 tiles = (u32)((p.m + BM - 1) / BM * ((p.n + BN - 1) / BN));
  const i64 total = tiles * p.splits * p.batches;
  auto locate = [&](i64 t) {
    const i64 slab = t / tiles;
    return place<BM, BN, 16>(p, (u32)(t - slab * tiles), slab % p.splits, slab / p.splits);
  };
  u32 slot = 0;
  if (threadIdx.x < 128) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      u32 parity = 1;   // a place never used counts as released
      for (i64 t = blockIdx.x; t < total; t += gridDim.x) {
        const Place at = locate(t);
        const int batch_a = p.batch_a ? (int)at.batch : 0, batch_b = p.batch_b ? (int)at.batch : 0;
        const int row = (int)at.row, column = (int)at.column, end = (int)at.k_end;
        for (int k = (int)at.k_begin; k < end; k += BK) {
          barrier_wait(empty + slot * 8, parity);
          const u32 here = full + slot * 8, a = stages + slot * STAGE, b = a + BM * BK * 2;
          barrier_expect(here, STAGE);
#pragma unroll
          for (int i = 0; i < BM / 64; i++)
            copy_box(a + i * BOX, &map_a, here, A_K ? k : row + i * 64, A_K ? row + i * 64 : k, batch_a);
#pragma unroll
          for (int i = 0; i < BN / 64; i++)
            copy_box(b + i * BOX, &map_b, here, B_K ? k : column + i * 64, B_K ? column + i * 64 : k, batch_b);
          if (++slot == STAGES) slot = 0, parity ^= 1;
        }
      }
    }
  } else {
    more_registers<232>();
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    u32 parity = 0;
    auto release = [&](u32 s) {
      if (lane == 0) barrier_arrive(empty + s * 8);
    };
    for (i64 t = blockIdx.x; t < total; t += gridDim.x) {
      const Place at = locate(t);
      const int rounds = (int)((at.k_end - at.k_begin + BK - 1) / BK);
      float acc[BN / 8][4] = {};
      u32 before = 0;
      for (int i = 0; i < rounds; i++) {
        barrier_wait(full + slot * 8, parity);
        const u32 a = stages + slot * STAGE + group * BOX, b = stages + slot * STAGE + BM * BK * 2;
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < BK / 16; s++) wgmma<T>(acc, describe(a + s * STEP_A), describe(b + s * STEP_B));
        wgmma_commit();
        if (i > 0) {   // the round before is done: its place is free
          wgmma_wait<1>();
          release(before);
        }
        before = slot;
        if (++slot == STAGES) slot = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      release(before);
      store_sums<BN>(p, at, at.row + group * 64 + warp * 16, sums + (group * 4 + warp) * 1024, acc);
    }
  }
}

#define ENTER(...) multiply<__VA_ARGS__>(map_a, map_b, p)
#else   // no Hopper: entry points that do nothing, so that a module is a module everywhere
struct TensorMap { u64 opaque[16]; };
#define ENTER(...)
#endif

KERNEL __launch_bounds__(384, 1) gemm_tma_256(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Product p) { ENTER(256, 4); }
KERNEL __launch_bounds__(384, 1) gemm_tma_128(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Product p) { ENTER(128, 6); }
