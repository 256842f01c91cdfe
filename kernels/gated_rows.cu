// The gated product of hundreds of rows on Hopper's tensor cores, as a step of decoding has it:
//
//   y[r, c] = silu(sum_k x[r, k] w[c, k]) sum_k x[r, k] up[c, k],  silu as in swiglu.cu
//
// x [rows, k], w and up [columns, k]: by tensor maps. y [rows, columns], contiguous, overwritten. Sums are in f32 and round once.
//
// So few rows are an odd number of a library's tiles. Here weights are the side of 64 lines of wgmma and rows of x the other:
// a block has 96 columns, 192 lines of weights, and 160 rows, and keeps all sums in registers, a warpgroup 64 lines. One warp
// copies 64 of k at a time to a ring of STAGES places in shared memory; those of weights are on their way before x is there,
// where the launch allows that. 24 lines of w and 24 of up lie in turn, and a warpgroup takes 8 of each: so a thread has the sums
// of a column's gate in elements 0 and 1, and those of what is gated in 2 and 3. The bound are the tensor cores, 16 us of its 30
// for 320 rows of 2,048 and 5,632 columns by count; its worth ends where blocks are more, or far fewer, than multiprocessors
// (ops/cuda/gated_rows.rs).
//
// Launch: ceil(rows / 160) ceil(columns / 96) blocks of 416 threads, those of the same weights neighbours; dynamic shared memory
// 225,536 bytes. Tensor maps of rank 3 (along a line, lines, 1), 128-byte swizzle, zeros outside: boxes of 24 lines of w and up,
// of 80 of x. k and columns are multiples of 8 and 4.
#include "rows.cuh"
#include "sm90.cuh"

// 64-bit fields only (`product` in ops/cuda/gated_rows.rs).
struct Gated {
  i64 rows, k, columns, early;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int BK = 64, LINE = BK * 2;                          // of k, and its bytes in a line
constexpr int COLUMNS = 96, LINES = 2 * COLUMNS, ROWS = 160;   // of a block
constexpr int TURN = 24;                                       // lines of w, then of up
constexpr int WEIGHTS = LINES * LINE, STAGE = (LINES + ROWS) * LINE, STAGES = 5, THREADS = 2 * LINES;
constexpr int PITCH = COLUMNS + 4;                             // floats from a row of sums to the next: 2 rows on are 8 banks on
static_assert(ROWS * PITCH * 4 <= STAGES * STAGE);

DEVICE void gated(const TensorMap &map_w, const TensorMap &map_up, const TensorMap &map_x, T *y, const Gated &p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 stages = shared_address(shared), full = stages + STAGES * STAGE, empty = full + STAGES * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const u32 row_tiles = ((u32)p.rows + ROWS - 1) / ROWS;
  const int row = (int)(blockIdx.x % row_tiles) * ROWS, column = (int)(blockIdx.x / row_tiles) * COLUMNS;
  const int rounds = ((int)p.k + BK - 1) / BK;
  launch_dependents();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, THREADS / 32);   // the multiplying warps
    }
    barrier_init_done();
  }
  __syncthreads();

  if (warp == THREADS / 32) {
    if (lane > 0) return;
    const auto weights = [&](int i, u32 slot) {
      const u32 to = stages + slot * STAGE, here = full + slot * 8;
      barrier_expect(here, STAGE);
#pragma unroll
      for (int b = 0; b < LINES / TURN; b++) copy_box(to + b * TURN * LINE, b % 2 ? &map_up : &map_w, here, i * BK, column + b / 2 * TURN, 0);
    };
    const auto inputs = [&](int i, u32 slot) {
#pragma unroll
      for (int h = 0; h < 2; h++)
        copy_box(stages + slot * STAGE + WEIGHTS + h * (ROWS / 2 * LINE), &map_x, full + slot * 8, i * BK, row + h * (ROWS / 2), 0);
    };
    const int head = min(rounds, STAGES);
    if (p.early)   // nobody writes weights now
      for (int i = 0; i < head; i++) weights(i, i);
    await_kernel_before();
    for (int i = 0; i < head; i++) {
      if (!p.early) weights(i, i);
      inputs(i, i);
    }
    u32 slot = 0, parity = 0;
    for (int i = head; i < rounds; i++) {
      barrier_wait(empty + slot * 8, parity);
      weights(i, slot), inputs(i, slot);
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    return;
  }

  await_kernel_before();
  float acc[ROWS / 8][4] = {};
  u32 slot = 0, before = 0, parity = 0;
  for (int i = 0; i < rounds; i++) {
    barrier_wait(full + slot * 8, parity);
    const u32 a = stages + slot * STAGE + group * (8 * LINE), b = stages + slot * STAGE + WEIGHTS;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < BK / 16; s++)
      wgmma<ALONG, ALONG>(acc, describe(a + s * STEP_ALONG, TURN * LINE), describe(b + s * STEP_ALONG), 1);
    wgmma_commit();
    if (i > 0) {   // the round before is done: its place is free
      wgmma_wait<1>();
      if (lane == 0) barrier_arrive(empty + before * 8);
    }
    before = slot;
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  meet(1, THREADS);   // all copies have come and been read: the ring is free

  float *const results = reinterpret_cast<float *>(shared);
  const int feature = warp % 4 * TURN + group * 8 + lane / 4, from = 2 * (lane % 4);
#pragma unroll
  for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) results[(from + j * 8 + e) * PITCH + feature] = acc[j][e] * sigmoid(acc[j][e]) * acc[j][e + 2];
  meet(1, THREADS);
  const int rows = min(ROWS, (int)p.rows - row), chunks = min(COLUMNS, (int)p.columns - column) / 4;
#pragma unroll 2
  for (int i = threadIdx.x; i < rows * (COLUMNS / 4); i += THREADS) {
    const int r = i / (COLUMNS / 4), chunk = i % (COLUMNS / 4);
    if (chunk >= chunks) continue;
    const float4 v = *reinterpret_cast<const float4 *>(results + r * PITCH + chunk * 4);
    *reinterpret_cast<uint2 *>(y + (i64)(row + r) * p.columns + column + chunk * 4) = make_uint2(pack2<T>(v.x, v.y), pack2<T>(v.z, v.w));
  }
}

#define ENTER gated(map_w, map_up, map_x, y, p)
#else   // no Hopper: an entry point that does nothing, so that a module is a module everywhere
#define ENTER
#endif

KERNEL __launch_bounds__(416, 1) gated_rows(const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_up,
                                            const __grid_constant__ TensorMap map_x, T *y, const __grid_constant__ Gated p) { ENTER; }
