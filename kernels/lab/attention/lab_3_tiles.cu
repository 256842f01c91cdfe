// Attention under the CAT mask, rung 3 of 6: tiles in shared memory.
//
// A block takes 64 query rows and streams 64 keys at a time, first slots (rows S apart, gathered by the load), then the local
// keys from its first row's block on. Each key that is fetched serves 64 rows: reads of K and V fall 64 times. The online
// softmax moves in steps of 64 keys. Arithmetic is still one multiply-add at a time, in f32: a thread has 4 x 4 scores and
// 4 x 4 results of its tile.
//
// Launch: 256 threads, row_tiles (tiles of 64 rows) * H * B blocks; shared: 4 * 64 * 65 floats + 64 floats.
#include "attention.cuh"

constexpr int TILE = 64, WIDE = 65;

KERNEL __launch_bounds__(256) lab_3_tiles(const T *q, const T *k, const T *v, T *y, float *lse, const Attention a) {
  extern __shared__ __align__(16) float memory[];
  float *qs = memory, *ks = qs + TILE * WIDE, *vs = ks + TILE * WIDE, *ps = vs + TILE * WIDE, *shrinks = ps + TILE * WIDE;
  const Place p = place_of(a, blockIdx.x, (int)a.row_tiles, (int)a.heads);
  const Tile t = tile_of(a, p.tile, TILE);
  if (t.first >= t.end) return;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, key_head = p.head / (int)a.group;
  q += head_at(a.q, p, p.head), k += head_at(a.k, p, key_head), v += head_at(a.v, p, key_head);
  const auto load = [&](float *to, const T *from, i64 row, int first, int end) {
    for (int i = threadIdx.x; i < TILE * TILE; i += 256) {
      const int r = i / TILE, x = i % TILE;
      to[r * WIDE + x] = first + r < end && x < a.d ? to_f32(from[(first + r) * row + x]) : 0.0f;
    }
  };
  load(qs, q, a.q.row, t.first, t.end);
  // thread r < 64 owns the softmax of row r
  float top = -infinity(), sum = 0.0f, acc[4][4] = {};
  const Visit visit = visit_of(a, t, TILE);
  for (int step = 0; step < visit.steps; step++) {
    const bool local = step >= visit.slot_steps;
    const int start = local ? visit.local + (step - visit.slot_steps) * TILE : step * TILE, end = local ? t.end : visit.slots;
    const i64 apart = local ? 1 : a.stride;
    __syncthreads();
    load(ks, k, a.k.row * apart, start, end);
    load(vs, v, a.v.row * apart, start, end);
    __syncthreads();
    float s[4][4] = {};
    for (int x = 0; x < TILE; x++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] += qs[(ty * 4 + i) * WIDE + x] * ks[(tx * 4 + j) * WIDE + x];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = min(t.first + ty * 4 + i, t.end - 1);
      const Range seen = local ? locals_of(a, row) : slots_of(a, row);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int key = start + tx * 4 + j;
        ps[(ty * 4 + i) * WIDE + tx * 4 + j] = key >= seen.lo && key <= seen.hi ? s[i][j] * scale_of(a) : -infinity();
      }
    }
    __syncthreads();
    if (threadIdx.x < TILE) {
      float *row = ps + threadIdx.x * WIDE, now = top;
      for (int x = 0; x < TILE; x++) now = fmaxf(now, row[x]);
      const float base = now == -infinity() ? 0.0f : now, shrink = __expf(top - base);
      sum *= shrink;
      for (int x = 0; x < TILE; x++) row[x] = __expf(row[x] - base), sum += row[x];
      shrinks[threadIdx.x] = shrink;
      top = now;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[i][j] *= shrinks[ty * 4 + i];
    for (int x = 0; x < TILE; x++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] += ps[(ty * 4 + i) * WIDE + x] * vs[x * WIDE + tx * 4 + j];
  }
  __syncthreads();
  if (threadIdx.x < TILE) {
    shrinks[threadIdx.x] = 1.0f / sum;
    if (t.first + threadIdx.x < t.end) lse[stat_at(a, p, p.head, t.first + threadIdx.x)] = top + logf(sum);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (t.first + ty * 4 + i < t.end && tx * 4 + j < a.d)
        y[out_at(a, p, t.first + ty * 4 + i, a.lq, p.head, a.heads) + tx * 4 + j] = from_f32<T>(acc[i][j] * shrinks[ty * 4 + i]);
}
