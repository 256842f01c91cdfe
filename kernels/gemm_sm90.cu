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
#include "sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int BM = 128, BK = 64;
// Bytes from one 16 of k to the next: along a line, or 16 lines on.
constexpr u32 STEP_A = A_K ? STEP_ALONG : STEP_ACROSS, STEP_B = B_K ? STEP_ALONG : STEP_ACROSS;

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
        for (int s = 0; s < BK / 16; s++) wgmma<!A_K, !B_K>(acc, describe(a + s * STEP_A), describe(b + s * STEP_B), 1);
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
#define ENTER(...)
#endif

KERNEL __launch_bounds__(384, 1) gemm_tma_256(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Product p) { ENTER(256, 4); }
KERNEL __launch_bounds__(384, 1) gemm_tma_128(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Product p) { ENTER(128, 6); }
