// QK-norm and rotary position embedding (rotate-half) of a fused projection, in one pass over its query and key heads.
//
// forward:  of a head x: rstd = 1 / sqrt(mean(x^2) + eps), z = x rstd w (without norms, z = x), then for i < n/2 at the row's
//           position y[i] = z[i] cos - z[i + n/2] sin, y[i + n/2] = z[i + n/2] cos + z[i] sin; from n on y = z.
// backward: dz is dy turned by -sin; with g = dz w and m = mean(g x) rstd^2, dx = rstd (g - x m); dw = sum over rows and
//           heads of dz x rstd. Without norms, dx = dz. The gradient of value heads is copied.
//
// x: rows (B L of them, of any stride, dense inside) of H query, Hkv key and Hkv value heads, d elements each. y: the turned
// heads, [rows, (H + Hkv) d]. rstd [rows, H + Hkv], f32. dq, dk, dv: heads of any stride, dense inside. dx: [rows,
// (H + 2 Hkv) d]. w [d], one of q, one of k. Row r is at position r mod length; its angles are row index[position] of
// `table` [distinct positions, n], f32: n/2 cosines, then n/2 sines. All outputs are overwritten.
// Saved for backward: x and rstd, or without norms nothing. y is rounded once, from f32: z is not rounded on the way.
//
// `1 << shift` lanes of a warp have a head, 16 bytes each; the other half of a pair comes from the lane that has it. Forward,
// a warp takes the query heads of a row or its key heads, and reads its angles once. Backward, warps walk over rows, some
// blocks over their query heads and the others over keys and values, and keep their columns of dw in registers; each block
// writes a row of `partial` [blocks, d], those of queries first, and these are summed in their order. *_single have a warp
// for a head, or a row, and take elements one by one, for any d, n and alignment; there each warp has a row of `partial` for
// queries, and after all those one for keys.
//
// Bytes that must move, for elements of s bytes, a row: forward 2 s (H + Hkv) d (and 4 (H + Hkv) for rstd); backward
// s (3 H + 5 Hkv) d (and 4 (H + Hkv)), or 2 s (H + 2 Hkv) d without norms. The table stays in cache.
#include "rows.cuh"

constexpr int N = 16 / sizeof(T);
typedef Floats<T> F;

struct Sizes {
  i64 rows, length, heads, kv_heads, d, n;
};
// Elements from one sequence, position and head to the next.
struct Strides {
  i64 b, l, h;
};
// A row: its sequence, position and angles.
struct Row {
  i64 b, l;
  const float *angles;
};
DEVICE Row row_of(const float *table, const i64 *index, const Sizes &s, i64 row) {
  const Quotient at = divide(row, s.length);
  return {at.q, at.r, table + index[at.r] * s.n};
}
DEVICE i64 offset_of(const Strides &s, const Row &row) { return row.b * s.b + row.l * s.l; }

// ---- 16 bytes a lane ----

struct Lane {
  int column;        // of its first element; d or more for lanes that have none
  int group, groups; // which of the heads that the warp takes together, and how many these are
  int lanes;         // of a head
  int other;         // the lane that has the other halves of its pairs
  bool turns;
};
DEVICE Lane lane_of(const Sizes &s, int shift) {
  const int me = threadIdx.x & 31, apart = (int)s.n / 2 / N;
  Lane l;
  l.lanes = 1 << shift;
  l.group = me >> shift;
  l.groups = 32 >> shift;
  l.column = (me & (l.lanes - 1)) * N;
  l.turns = l.column < s.n;
  l.other = !l.turns ? me : l.column < s.n / 2 ? me + apart : me - apart;
  return l;
}
DEVICE Words others(const Words &v, const Lane &l) {
  Words o;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    o.w[j] = __shfl_sync(0xffffffffu, v.w[j], l.other);
    if (!l.turns) o.w[j] = 0;
  }
  return o;
}

// y = z c + other s
struct Turn {
  float c[N], s[N];
};
DEVICE Turn turn_of(const float *angles, const Lane &l, const Sizes &s, float sign) {
  Turn t;
#pragma unroll
  for (int j = 0; j < N; j++) t.c[j] = 1.0f, t.s[j] = 0.0f;
  if (!l.turns) return t;
  const int half = (int)s.n / 2;
  const bool first = l.column < half;
  const float *cosines = angles + (first ? l.column : l.column - half), *sines = cosines + half;
  if (first) sign = -sign;
#pragma unroll
  for (int j = 0; j < N; j += 4) { // half is a multiple of 4, so the table's runs begin on 16 bytes
    const Floats<float> c = unpacked<float>(*reinterpret_cast<const Words *>(cosines + j));
    const Floats<float> sine = unpacked<float>(*reinterpret_cast<const Words *>(sines + j));
#pragma unroll
    for (int k = 0; k < 4; k++) t.c[j + k] = c.x[k], t.s[j + k] = sign * sine.x[k];
  }
  return t;
}

template <bool NORMED>
DEVICE void forward_heads(T *y, float *rstd, const T *x, const T *wq, const T *wk, const Strides &xs, const float *table,
                          const i64 *index, const Sizes &s, float eps, int shift) {
  constexpr int UNROLL = 4; // heads of a lane whose loads are under way together
  const i64 item = thread_index() >> 5, row = item >> 1;
  if (row >= s.rows) return;
  const bool keys = item & 1;
  const int count = (int)(keys ? s.kv_heads : s.heads), d = (int)s.d;
  const Lane l = lane_of(s, shift);
  const i64 skipped = keys ? s.heads : 0, first = row * (s.heads + s.kv_heads) + skipped;
  const Row at = row_of(table, index, s, row);
  x += offset_of(xs, at) + skipped * d;
  y += first * d;
  Turn t = turn_of(at.angles, l, s, 1.0f);
  if constexpr (NORMED) {
    rstd += first;
    // the weights go into the angles: y = rstd (x (w c) + other (w' s))
    const Words words = load_words(keys ? wk : wq, l.column, d);
    const F w = unpacked<T>(words), v = unpacked<T>(others(words, l));
#pragma unroll
    for (int j = 0; j < N; j++) t.c[j] *= w.x[j], t.s[j] *= v.x[j];
  }
  for (int h0 = 0; h0 < count; h0 += l.groups * UNROLL) {
    Words words[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int h = h0 + u * l.groups + l.group;
      words[u] = load_words(x + (i64)h * d, l.column, h < count ? d : 0);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (h0 + u * l.groups >= count) break;
      const int h = h0 + u * l.groups + l.group;
      const F z = unpacked<T>(words[u]), o = unpacked<T>(others(words[u], l));
      float scale = 1.0f;
      if constexpr (NORMED) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) sum = fmaf(z.x[j], z.x[j], sum);
        scale = 1.0f / sqrtf(lanes_sum(sum, l.lanes) / d + eps);
        if (l.column == 0 && h < count) rstd[h] = scale;
      }
      F to;
#pragma unroll
      for (int j = 0; j < N; j++) {
        to.x[j] = fmaf(z.x[j], t.c[j], o.x[j] * t.s[j]);
        if constexpr (NORMED) to.x[j] *= scale;
      }
      store_words(y + (i64)h * d, l.column, h < count ? d : 0, packed<T>(to));
    }
  }
}
#define FORWARD                                                                                                          \
  (T * y, float *rstd, const T *x, const T *wq, const T *wk, i64 xb, i64 xl, const float *table, const i64 *index,       \
   i64 rows, i64 length, i64 heads, i64 kv_heads, i64 d, i64 n, float eps, i64 shift)
#define SIZES {rows, length, heads, kv_heads, d, n}

KERNEL __launch_bounds__(128) qk_norm_rope FORWARD {
  forward_heads<true>(y, rstd, x, wq, wk, {xb, xl, 0}, table, index, SIZES, eps, (int)shift);
}
KERNEL __launch_bounds__(128) qk_rope FORWARD {
  forward_heads<false>(y, rstd, x, wq, wk, {xb, xl, 0}, table, index, SIZES, eps, (int)shift);
}

struct Backward {
  T *dx;
  float *partial;
  const T *x, *wq, *wk;
  const float *rstd;
  const T *dq, *dk, *dv;
  Strides xs, qs, ks, vs;
  const float *table;
  const i64 *index;
  Sizes s;
};

// The gradients of `count` heads of a row, those of dy `stride` elements apart.
template <bool NORMED>
DEVICE void backward_heads(float (&dw)[N], T *dx, const T *x, const float *rstd, const T *dy, i64 stride, int count, int d,
                           const Words &weight, const Turn &t, const Lane &l) {
  constexpr int UNROLL = 4;
  for (int h0 = 0; h0 < count; h0 += l.groups * UNROLL) {
    Words xs[UNROLL], dys[UNROLL];
    float scale[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int h = h0 + u * l.groups + l.group, at = h < count ? h : 0, width = h < count ? d : 0;
      dys[u] = load_words(dy + at * stride, l.column, width);
      if constexpr (NORMED) {
        xs[u] = load_words(x + (i64)at * d, l.column, width);
        scale[u] = rstd[at];
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (h0 + u * l.groups >= count) break;
      const int h = h0 + u * l.groups + l.group;
      const F g = unpacked<T>(dys[u]), o = unpacked<T>(others(dys[u], l));
      F dz;
#pragma unroll
      for (int j = 0; j < N; j++) dz.x[j] = fmaf(g.x[j], t.c[j], o.x[j] * t.s[j]);
      if constexpr (NORMED) {
        const F v = unpacked<T>(xs[u]), w = unpacked<T>(weight);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) {
          dw[j] = fmaf(dz.x[j] * v.x[j], scale[u], dw[j]); // heads past the last are zeros
          dz.x[j] *= w.x[j];
          sum = fmaf(dz.x[j], v.x[j], sum);
        }
        const float m = lanes_sum(sum, l.lanes) / d * scale[u] * scale[u];
#pragma unroll
        for (int j = 0; j < N; j++) dz.x[j] = scale[u] * fmaf(-v.x[j], m, dz.x[j]);
      }
      store_words(dx + (i64)h * d, l.column, h < count ? d : 0, packed<T>(dz));
    }
  }
}
DEVICE void copy_heads(T *dx, const T *dy, i64 stride, int count, int d, const Lane &l) {
  constexpr int UNROLL = 4;
  for (int h0 = l.group; h0 < count; h0 += l.groups * UNROLL) {
    Words v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int h = h0 + u * l.groups;
      if (h < count) v[u] = load_words(dy + h * stride, l.column, d);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int h = h0 + u * l.groups;
      if (h < count) store_words(dx + (i64)h * d, l.column, d, v[u]);
    }
  }
}

// The first q_blocks blocks have query heads, the others key and value heads; their warps walk over rows.
template <bool NORMED> DEVICE void backward_rows(const Backward &b, int q_blocks, int shift, float (*sums)[32 * N]) {
  const Sizes &s = b.s;
  const int d = (int)s.d, heads = (int)s.heads, kv_heads = (int)s.kv_heads;
  const bool keys = blockIdx.x >= q_blocks;
  const int block = keys ? blockIdx.x - q_blocks : blockIdx.x, blocks = keys ? gridDim.x - q_blocks : q_blocks;
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, skipped = keys ? heads : 0, count = keys ? kv_heads : heads;
  const Lane l = lane_of(s, shift);
  const T *dy = keys ? b.dk : b.dq;
  const Strides dys = keys ? b.ks : b.qs;
  Words w = {};
  if constexpr (NORMED) w = load_words(keys ? b.wk : b.wq, l.column, d);
  float dw[N] = {};
  for (i64 r = (i64)block * warps + warp; r < s.rows; r += (i64)blocks * warps) {
    const Row row = row_of(b.table, b.index, s, r);
    const Turn t = turn_of(row.angles, l, s, -1.0f);
    const T *x = NORMED ? b.x + offset_of(b.xs, row) + skipped * d : nullptr;
    const float *rstd = NORMED ? b.rstd + r * (heads + kv_heads) + skipped : nullptr;
    T *dx = b.dx + (r * (heads + 2 * kv_heads) + skipped) * d;
    backward_heads<NORMED>(dw, dx, x, rstd, dy + offset_of(dys, row), dys.h, count, d, w, t, l);
    if (keys) copy_heads(dx + kv_heads * d, b.dv + offset_of(b.vs, row), b.vs.h, kv_heads, d, l);
  }
  if constexpr (NORMED) {
    // over the groups of a warp, then over warps
#pragma unroll
    for (int j = 0; j < N; j++) {
      for (int o = l.lanes; o < 32; o <<= 1) dw[j] += __shfl_xor_sync(0xffffffffu, dw[j], o);
      if (l.group == 0) sums[warp][l.column + j] = dw[j];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
      float sum = 0.0f;
      for (int p = 0; p < warps; p++) sum += sums[p][c];
      b.partial[(i64)blockIdx.x * d + c] = sum;
    }
  }
}

#define BACKWARD                                                                                                         \
  (T * dx, float *partial, const T *x, const T *wq, const T *wk, const float *rstd, const T *dq, const T *dk,            \
   const T *dv, i64 xb, i64 xl, i64 qb, i64 ql, i64 qh, i64 kb, i64 kl, i64 kh, i64 vb, i64 vl, i64 vh,                  \
   const float *table, const i64 *index, i64 rows, i64 length, i64 heads, i64 kv_heads, i64 d, i64 n, i64 q_blocks,      \
   i64 shift)
#define GATHERED                                                                                                         \
  const Backward b{dx, partial, x, wq, wk, rstd, dq, dk, dv, {xb, xl, 0}, {qb, ql, qh}, {kb, kl, kh}, {vb, vl, vh},      \
                   table, index, SIZES}

KERNEL __launch_bounds__(256, 2) qk_norm_rope_backward BACKWARD {
  __shared__ float sums[8][32 * N];
  GATHERED;
  backward_rows<true>(b, (int)q_blocks, (int)shift, sums);
}
KERNEL __launch_bounds__(256, 3) qk_rope_backward BACKWARD {
  GATHERED;
  backward_rows<false>(b, (int)q_blocks, (int)shift, nullptr);
}

// ---- elements one by one ----

DEVICE float weight_at(const T *w, i64 i) { return w ? to_f32(w[i]) : 1.0f; }

KERNEL __launch_bounds__(256) qk_norm_rope_single FORWARD {
  const i64 item = thread_index() >> 5, half = n / 2;
  const int lane = threadIdx.x & 31;
  const Quotient at = divide(item, heads + kv_heads);
  if (at.q >= rows) return;
  const Row row = row_of(table, index, SIZES, at.q);
  const T *w = at.r < heads ? wq : wk;
  x += offset_of(Strides{xb, xl, 0}, row) + at.r * d;
  y += item * d;
  float scale = 1.0f;
  if (w) {
    float sum = 0.0f;
    for (i64 i = lane; i < d; i += 32) sum = fmaf(to_f32(x[i]), to_f32(x[i]), sum);
    scale = 1.0f / sqrtf(warp_sum(sum) / d + eps);
    if (lane == 0) rstd[item] = scale;
  }
  auto z = [&](i64 i) { return to_f32(x[i]) * scale * weight_at(w, i); };
  for (i64 i = lane; i < half; i += 32) {
    const float a = z(i), b = z(i + half), c = row.angles[i], sine = row.angles[half + i];
    y[i] = from_f32<T>(fmaf(a, c, -(b * sine)));
    y[i + half] = from_f32<T>(fmaf(b, c, a * sine));
  }
  for (i64 i = n + lane; i < d; i += 32) y[i] = from_f32<T>(z(i));
}

// A lane's columns, the same in every head: those of pairs, and from n on single ones.
template <typename V> DEVICE void columns(i64 n, i64 d, V visit) {
  const int lane = threadIdx.x & 31;
  for (i64 i = lane; i < n / 2; i += 32) visit(i), visit(i + n / 2);
  for (i64 i = n + lane; i < d; i += 32) visit(i);
}

KERNEL __launch_bounds__(256) qk_norm_rope_backward_single BACKWARD {
  GATHERED;
  const i64 first = thread_index() >> 5, warps = thread_count() >> 5, half = n / 2, turned = heads + kv_heads;
  if (wq) {
    for (int k = 0; k < 2; k++) columns(n, d, [&](i64 i) { partial[(k * warps + first) * d + i] = 0.0f; });
  }
  for (i64 r = first; r < rows; r += warps) {
    const Row row = row_of(table, index, b.s, r);
    for (i64 head = 0; head < turned + kv_heads; head++) {
      T *to = dx + (r * (turned + kv_heads) + head) * d;
      if (head >= turned) {
        const T *from = dv + offset_of(b.vs, row) + (head - turned) * vh;
        columns(n, d, [&](i64 i) { to[i] = from[i]; });
        continue;
      }
      const bool keys = head >= heads;
      const T *dy = keys ? dk + offset_of(b.ks, row) + (head - heads) * kh : dq + offset_of(b.qs, row) + head * qh;
      auto dz = [&](i64 i) {
        if (i >= n) return to_f32(dy[i]);
        const bool low = i < half;
        const i64 angle = low ? i : i - half;
        const float other = to_f32(dy[low ? i + half : angle]), sine = row.angles[half + angle];
        return fmaf(to_f32(dy[i]), row.angles[angle], other * (low ? sine : -sine));
      };
      if (!wq) {
        columns(n, d, [&](i64 i) { to[i] = from_f32<T>(dz(i)); });
        continue;
      }
      const T *v = x + offset_of(b.xs, row) + head * d, *w = keys ? wk : wq;
      const float scale = rstd[r * turned + head];
      float sum = 0.0f;
      columns(n, d, [&](i64 i) { sum = fmaf(dz(i) * to_f32(w[i]), to_f32(v[i]), sum); });
      const float m = warp_sum(sum) / d * scale * scale;
      float *dw = partial + ((keys ? warps : 0) + first) * d;
      columns(n, d, [&](i64 i) {
        const float g = dz(i), value = to_f32(v[i]);
        dw[i] = fmaf(g * value, scale, dw[i]);
        to[i] = from_f32<T>(scale * fmaf(-value, m, g * to_f32(w[i])));
      });
    }
  }
}
