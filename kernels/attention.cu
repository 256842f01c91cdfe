// Attention under a structured mask for 16-bit T, on the tensor cores: forward. Backward is attention_backward.cu, f32 is
// attention_f32.cu; masks and tiles are explained in attention.cuh.
//
//   y = softmax(scale q k^T, masked) v        lse = log sum_j exp(scale q k_j)
//
// q [B, H, Lq, d], k and v [B, Hkv, Lk, d]: views with dense rows. y lies as [B, Lq, H, d], lse (f32, natural) as
// [B, H, Lq]; both are overwritten. Online softmax in f32 with powers of 2; P is rounded to T before it meets v.
//
// Launch: attention_forward, row_tiles * H * B blocks (B is 1 under JOINED) of THREADS; a block takes ROWS query rows of one
// head, keeps q in registers where d <= 64, and streams KEYS keys a step through two stages of shared memory.
// Shared: (ROWS + 2*STAGES*KEYS) * PITCH elements.
#include "attention_mma.cuh"

struct Softmax {
  float top[MT][2], sum[MT][2]; // largest score and the lane's part of the sum, in units of `factor`
};

// A step of keys: `ALL` where every row of the warp sees all of them.
template <bool ALL, typename Own>
DEVICE void forward_step(float (&acc)[MT][D / 8][4], Softmax &x, const Own &q, u32 k, u32 v, const Seen &seen, int start, float scale2) {
  constexpr int NT = KEYS / 8;
  const Need need = ALL ? Need{0, NT} : seen.need(start, KEYS);
  float s[MT][NT][4];
  scores<NT, ALL>(s, q, k, need);
  float factor = scale2;
  if (!(scale2 > 0.0f)) { // the largest score is not the largest product then
    factor = 1.0f;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[m][n][e] *= scale2;
  }
  const int column = start + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = x.top[m][h];
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          const int j = column + n * 8 + (e & 1);
          if (!ALL && (j < seen.of[m][h].lo || j > seen.of[m][h].hi)) s[m][n][e] = -infinity();
          top = fmaxf(top, s[m][n][e]);
        }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float base = top == -infinity() ? 0.0f : top * factor; // nothing seen yet: all powers are 0
      const float shrink = power2(x.top[m][h] * factor - base);
      x.top[m][h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          s[m][n][e] = power2(s[m][n][e] * factor - base);
          sum += s[m][n][e];
        }
      x.sum[m][h] = x.sum[m][h] * shrink + sum;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        acc[m][n][2 * h] *= shrink;
        acc[m][n][2 * h + 1] *= shrink;
      }
    }
  mix<NT, D / 8, ALL>(acc, s, v, need);
}

template <typename Own>
DEVICE void forward_rows(const T *k, const T *v, T *y, float *lse, const Attention &a, const Place &p, const Tile &t, u32 own, u32 stages) {
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2;
  const int row = t.first + warp * 16 * MT, last_row = min(row + 16 * MT, t.end) - 1;
  const float scale2 = scale_of(a) * LOG2_E;
  const Visit visit = visit_of(a, t, KEYS);
  const auto load = [&](int step) {
    const u32 to = stages + (step & 1) * 2 * OTHER;
    const bool local = step >= visit.slot_steps;
    const int start = local ? visit.local + (step - visit.slot_steps) * KEYS : step * KEYS, end = local ? t.end : visit.slots;
    const i64 apart = local ? 1 : a.stride;
    load_rows<KEYS, PITCH, THREADS>(to, k, walk_of(a, a.k, apart), start, end, a.d, a.vector);
    load_rows<KEYS, PITCH, THREADS>(to + OTHER, v, walk_of(a, a.v, apart), start, end, a.d, a.vector);
    copies_issued();
  };
  load(0);
  copies_wait<1>(); // q
  __syncthreads();
  const Own q(own + warp * 16 * MT * ROW_BYTES);

  float acc[MT][D / 8][4];
  clear(acc);
  Softmax x;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) x.top[m][h] = -infinity(), x.sum[m][h] = 0.0f;
  Seen seen;
  for (int step = 0; step < visit.steps; step++) {
    const bool local = step >= visit.slot_steps;
    if (step == 0 || step == visit.slot_steps) seen = rows_see(a, t, local);
    if (step + 1 < visit.steps) {
      load(step + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    const int start = local ? visit.local + (step - visit.slot_steps) * KEYS : step * KEYS;
    const u32 at = stages + (step & 1) * 2 * OTHER;
    const Need need = seen.need(start, KEYS);
    if (seen.all(start, KEYS)) forward_step<true>(acc, x, q, at, at + OTHER, seen, start, scale2);
    else if (need.first < need.end) forward_step<false>(acc, x, q, at, at + OTHER, seen, start, scale2);
    __syncthreads();
  }
  if (row > last_row) return;
  float factor[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = x.sum[m][h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      factor[m][h] = 1.0f / sum;
      const int i = row + m * 16 + h * 8 + g;
      if ((threadIdx.x & 3) == 0 && i <= last_row)
        lse[stat_at(a, p, p.head, i)] = (x.top[m][h] * (scale2 > 0.0f ? scale2 : 1.0f) + log2f(sum)) / LOG2_E;
    }
  store_rows(y, acc, factor, 0, (int)a.d, a.vector_out,
             [&](int r) { return t.first + r < t.end ? out_at(a, p, t.first + r, a.lq, p.head, a.heads) : -1; });
}

KERNEL __launch_bounds__(THREADS, BLOCKS) attention_forward(const T *q, const T *k, const T *v, T *y, float *lse, Attention a) {
  extern __shared__ __align__(16) u8 memory[];
  const Place p = place_of(a, blockIdx.x, (int)a.row_tiles, (int)a.heads);
  const Tile t = tile_of(a, p.tile, ROWS);
  if (t.first >= t.end) return;
  const int key_head = p.head / (int)a.group;
  const u32 own = shared_at(memory);
  load_rows<ROWS, PITCH, THREADS>(own, q + head_at(a.q, p, p.head), walk_of(a, a.q, 1), t.first, t.end, a.d, a.vector);
  copies_issued();
  k += head_at(a.k, p, key_head);
  v += head_at(a.v, p, key_head);
  if constexpr (D <= 64) forward_rows<Held>(k, v, y, lse, a, p, t, own, own + OWN);
  else forward_rows<Lying>(k, v, y, lse, a, p, t, own, own + OWN);
}
