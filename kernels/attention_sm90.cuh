// What the Hopper kernels of attention share: tiles brought by the copy engine, products of whole warpgroups. Masks and tiles
// are those of attention.cuh; what a lane holds, sees and stores is as in attention_mma.cuh, since each warp of a warpgroup
// holds 16 rows of its 64 as an mma does.
//
// A block is WARPGROUPS warpgroups that compute, 64 rows of an own tile each, and one warp after them that copies. Tensor maps
// of rank 4, (d, row, head, batch), boxes of 64 x 64 x 1 x 1, see src/ops/cuda/attention_sm90.rs:
//   q, k, v, dy    all rows; under JOINED (d, batch * L, head, 1): one long run of rows
//   k_slots, v_slots   rows 0, S, 2S, ...: line j is slot j
// Lines outside the tensor, and elements from d on, read as zeros. Lines past a tile's end but inside the tensor are other
// rows' and must be masked, not stored.
#pragma once
#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#include "attention_mma.cuh"
#include "sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
static_assert(D == 64 || D == 128, "boxes are 64 elements wide");

constexpr int GROUP = 64;                      // rows of a warpgroup
constexpr int BOXES = D / 64;                  // boxes of a tile of 64 lines
constexpr u32 TILE = BOXES * BOX;              // its bytes

// 64 lines of one head, all D elements wide, TILE bytes, from `line` on.
DEVICE void copy_tile(u32 to, const TensorMap *map, u32 barrier, int line, int head, int batch) {
#pragma unroll
  for (int x = 0; x < BOXES; x++) copy_box(to + x * BOX, map, barrier, x * 64, line, head, batch);
}

// The descriptor of what lies `bytes` further on: one addition, since shared memory ends below 2^18.
DEVICE u64 onward(u64 tile, u32 bytes) { return (tile & ~0xffffffffull) | ((u32)tile + (bytes >> 4)); }
// s[64, 8 NT] = own[64, D] other[8 NT, D]^T, both tiles in shared memory. Issues only: fence before, commit and wait after.
// 32 lines are HALF bytes, in each box of a tile.
constexpr u32 HALF = BOX / 2;
template <int NT> DEVICE void tile_scores(float (&s)[NT][4], u32 own, u32 other) {
  const u64 a = describe(own), b = describe(other);
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    const u32 step = k / 4 * BOX + k % 4 * STEP_ALONG;
    wgmma<ALONG, ALONG>(s, onward(a, step), onward(b, step), k > 0);
  }
}
// acc[64, D] += p[64, 16 K] other[16 K, D]: p in registers, rounded to T (`held` of k-step i: columns 16 i to 16 i + 15).
// With add 0 acc is overwritten.
template <int K> DEVICE void tile_mix(float (&acc)[D / 8][4], const u32 (&p)[K][4], u32 other, int add = 1) {
  const u64 b = describe(other);
#pragma unroll
  for (int k = 0; k < K; k++) wgmma_held<ACROSS>(acc, p[k], onward(b, k * STEP_ACROSS), k > 0 || add);
}
// The A operand of tile_mix out of a 64 x 16 K piece of sums.
template <int K, int NT> DEVICE void hold(u32 (&p)[K][4], const float (&s)[NT][4]) {
  static_assert(NT == 2 * K, "16 columns a step");
#pragma unroll
  for (int k = 0; k < K; k++) {
    p[k][0] = pack2<T>(s[2 * k][0], s[2 * k][1]);
    p[k][1] = pack2<T>(s[2 * k][2], s[2 * k][3]);
    p[k][2] = pack2<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
    p[k][3] = pack2<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
  }
}
#endif
