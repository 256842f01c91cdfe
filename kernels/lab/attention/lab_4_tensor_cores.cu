// Attention under the CAT mask, rung 4 of 6: tensor cores.
//
// As rung 3, with both products as mma of 16-bit elements: a warp owns 16 query rows, scores stay in registers from the first
// product through the softmax into the second. A load still stands between any two steps: nothing is fetched while the tensor
// cores work. Every step is masked, needed or not.
//
// Rung 5 is kernels/attention.cu: copies run while the step before is computed (cp.async, two stages), steps where a warp sees
// all need no mask, pieces that it sees nothing of are skipped, q stays in registers, results leave 16 bytes a lane.
// Rung 6 is kernels/attention_sm90.cu: products of whole warpgroups (wgmma) on tiles that the copy engine brings (TMA).
//
// Launch: 256 threads, row_tiles (tiles of 128 rows) * H * B blocks; shared: (ROWS + 2*KEYS) * PITCH elements.
#include "attention_mma.cuh"

KERNEL __launch_bounds__(THREADS) lab_4_tensor_cores(const T *q, const T *k, const T *v, T *y, float *lse, const Attention a) {
  extern __shared__ __align__(16) u8 memory[];
  const Place p = place_of(a, blockIdx.x, (int)a.row_tiles, (int)a.heads);
  const Tile t = tile_of(a, p.tile, ROWS);
  if (t.first >= t.end) return;
  const int key_head = p.head / (int)a.group, warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2;
  const u32 own = shared_at(memory), keys = own + OWN, values = keys + OTHER;
  q += head_at(a.q, p, p.head), k += head_at(a.k, p, key_head), v += head_at(a.v, p, key_head);
  load_rows<ROWS, PITCH, THREADS>(own, q, walk_of(a, a.q, 1), t.first, t.end, a.d, a.vector);
  const Visit visit = visit_of(a, t, KEYS);
  const float scale2 = scale_of(a) * LOG2_E;
  float acc[1][D / 8][4], s[1][KEYS / 8][4], factor[1][2], top[2] = {-infinity(), -infinity()}, sum[2] = {};
  clear(acc);
  for (int step = 0; step < visit.steps; step++) {
    const bool local = step >= visit.slot_steps;
    const int start = local ? visit.local + (step - visit.slot_steps) * KEYS : step * KEYS, end = local ? t.end : visit.slots;
    __syncthreads();
    load_rows<KEYS, PITCH, THREADS>(keys, k, walk_of(a, a.k, local ? 1 : a.stride), start, end, a.d, a.vector);
    load_rows<KEYS, PITCH, THREADS>(values, v, walk_of(a, a.v, local ? 1 : a.stride), start, end, a.d, a.vector);
    copies_issued();
    copies_wait<0>();
    __syncthreads();
    const Seen seen = rows_see(a, t, local);
    scores<KEYS / 8, true>(s, Lying(own + warp * 16 * ROW_BYTES), keys, Need{0, KEYS / 8});
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float now = top[h];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          const int j = start + n * 8 + (threadIdx.x & 3) * 2 + (e & 1);
          s[0][n][e] = j < seen.of[0][h].lo || j > seen.of[0][h].hi ? -infinity() : s[0][n][e] * scale2;
          now = fmaxf(now, s[0][n][e]);
        }
      now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
      now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
      const float base = now == -infinity() ? 0.0f : now, shrink = power2(top[h] - base);
      top[h] = now, sum[h] *= shrink;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) s[0][n][e] = power2(s[0][n][e] - base), sum[h] += s[0][n][e];
#pragma unroll
      for (int n = 0; n < D / 8; n++) acc[0][n][2 * h] *= shrink, acc[0][n][2 * h + 1] *= shrink;
    }
    mix<KEYS / 8, D / 8, true>(acc, s, values, Need{0, KEYS / 8});
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    factor[0][h] = 1.0f / sum[h];
    const int i = t.first + warp * 16 + h * 8 + g;
    if ((threadIdx.x & 3) == 0 && i < t.end) lse[stat_at(a, p, p.head, i)] = (top[h] + log2f(sum[h])) / LOG2_E;
  }
  store_rows(y, acc, factor, 0, (int)a.d, a.vector_out,
             [&](int r) { return t.first + r < t.end ? out_at(a, p, t.first + r, a.lq, p.head, a.heads) : -1; });
}
