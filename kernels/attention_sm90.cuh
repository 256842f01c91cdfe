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

// s[64, 64] = own[64, D] other[64, D]^T, both tiles in shared memory. Issues only: fence before, commit and wait after.
DEVICE void tile_scores(float (&s)[8][4], u32 own, u32 other) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    const u32 step = k / 4 * BOX + k % 4 * STEP_ALONG;
    wgmma<ALONG, ALONG>(s, describe(own + step), describe(other + step), k > 0);
  }
}
// acc[64, D] += p[64, 64] other[64, D]: p in registers, rounded to T (`held` of k-step i: columns 16 i to 16 i + 15).
DEVICE void tile_mix(float (&acc)[D / 8][4], const u32 (&p)[4][4], u32 other) {
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma_held<ACROSS>(acc, p[k], describe(other + k * STEP_ACROSS), 1);
}
// The A operand of tile_mix out of a 64 x 64 piece of sums.
DEVICE void hold(u32 (&p)[4][4], const float (&s)[8][4]) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    p[k][0] = pack2<T>(s[2 * k][0], s[2 * k][1]);
    p[k][1] = pack2<T>(s[2 * k][2], s[2 * k][3]);
    p[k][2] = pack2<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
    p[k][3] = pack2<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
  }
}
#endif
