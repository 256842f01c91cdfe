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
// `1 << shift` lanes of a warp have a head, 16 bytes each; the other half of a pair comes from the lane that has it. Loads
// run some heads ahead of the arithmetic. Forward, a warp takes the query heads of a row or its key heads (even blocks have
// queries, odd ones keys, of the same rows), and reads its angles once. Backward, warps walk over rows and take all heads of
// each; a lane's columns of dw, of queries and of keys, are summed over a row in registers and over rows in shared memory,
// and each block writes two rows of `partial` [2 blocks, d], which are summed in their order: all those of queries come
// first, then those of keys. *_single have a warp for a head, or a row, and take elements one by one, for any d, n and
// alignment; there each warp has two rows of `partial`.
//
// Bytes that must move, for elements of s bytes, a row: forward 2 s (H + Hkv) d (and 4 (H + Hkv) for rstd); backward
// s (3 H + 5 Hkv) d (and 4 (H + Hkv)), or 2 s (H + 2 Hkv) d without norms. The table stays in cache. Next to that bound is
// the one of issued instructions: a warp's share of heads takes some 85 of them forward and 130 backward, for 1 KiB and for
// 1.5 KiB moved.
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

// LANES: of heads that fill so many lanes and are turned from end to end, whose sizes are then constants; 0: of any others.
struct Lane {
  int column;        // of its first element; d or more for lanes that have none
  int group, groups; // which of the heads that the warp takes together, and how many these are
  int lanes;         // of a head
  int other;         // the lane that has the other halves of its pairs
  bool turns, low;   // whether it has pairs, and whether their first halves
};
template <int LANES> DEVICE Lane lane_of(const Sizes &s, int shift) {
  const int me = threadIdx.x & 31;
  if constexpr (LANES) {
    const int at = me % LANES;
    return {at * N, me / LANES, 32 / LANES, LANES, me ^ (LANES / 2), true, at < LANES / 2};
  } else {
    const int lanes = 1 << shift, column = (me & (lanes - 1)) * N, apart = (int)s.n / 2 / N;
    const bool turns = column < s.n, low = column < s.n / 2;
    return {column, me >> shift, 32 >> shift, lanes, !turns ? me : low ? me + apart : me - apart, turns, low};
  }
}
template <int LANES> DEVICE Words others(const Words &v, const Lane &l) {
  Words o;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if constexpr (LANES) {
      o.w[j] = __shfl_xor_sync(0xffffffffu, v.w[j], LANES / 2);
    } else {
      o.w[j] = __shfl_sync(0xffffffffu, v.w[j], l.other);
      if (!l.turns) o.w[j] = 0;
    }
  }
  return o;
}
template <int LANES> DEVICE float head_sum(float x, const Lane &l) {
  if constexpr (LANES) {
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
  } else {
    return lanes_sum(x, l.lanes);
  }
}
template <typename D> DEVICE Words words_at(const D *p) { return *reinterpret_cast<const Words *>(p); }
DEVICE void words_to(T *p, const Words &v) { *reinterpret_cast<Words *>(p) = v; }

// y = z c + other s
struct Turn {
  float c[N], s[N];
};
DEVICE Turn turn_of(const float *angles, const Lane &l, int n, float sign) {
  Turn t;
#pragma unroll
  for (int j = 0; j < N; j++) t.c[j] = 1.0f, t.s[j] = 0.0f;
  if (!l.turns) return t;
  const float *cosines = angles + (l.low ? l.column : l.column - n / 2), *sines = cosines + n / 2;
  if (l.low) sign = -sign;
#pragma unroll
  for (int j = 0; j < N; j += 4) { // n / 2 is a multiple of 4, so the table's runs begin on 16 bytes
    const Words cosine_words = words_at(cosines + j), sine_words = words_at(sines + j);
    const Floats<float> c = unpacked<float>(cosine_words), sine = unpacked<float>(sine_words);
#pragma unroll
    for (int k = 0; k < 4; k++) t.c[j + k] = c.x[k], t.s[j + k] = sign * sine.x[k];
  }
  return t;
}

// 1 / sqrt(x), x > 0. The chip's approximation is within 2 ulp, which 16-bit elements do not see. Where T is f32 a step of
// Newton's brings it to 1 or so; of the ends, 0 and infinity, that step would make NaN.
DEVICE float inverse_root(float x) {
  const float r = rsqrtf(x);
  if constexpr (sizeof(T) == 2) return r;
  const float off = fmaf(-x * r, r, 1.0f);
  return off == off ? fmaf(0.5f * r, off, r) : r;
}

template <bool NORMED, int LANES>
DEVICE void forward_heads(T *y, float *rstd, const T *x, const T *wq, const T *wk, const Strides &xs, const float *table,
                          const i64 *index, const Sizes &s, float eps, int shift) {
  constexpr int DEPTH = 4; // heads of a lane whose loads are under way together
  // Of two neighbouring blocks one has query heads and one has keys, of one row a warp: so loops are the block's, and the
  // compiler knows that warps are whole where they shuffle. Warps past the last row take it again and store nothing.
  const i64 wanted = (i64)(blockIdx.x >> 1) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  const bool keys = blockIdx.x & 1, lives = wanted < s.rows;
  const i64 row = lives ? wanted : s.rows - 1;
  const int count = (int)(keys ? s.kv_heads : s.heads), d = LANES ? LANES * N : (int)s.d, n = LANES ? d : (int)s.n;
  const Lane l = lane_of<LANES>(s, shift);
  const Quotient at = divide(row, s.length);
  const i64 skipped = keys ? s.heads : 0, first = row * (s.heads + s.kv_heads) + skipped;
  const int step = l.groups * d, mine = lives && l.column < d ? count : 0; // lanes of none keep zeros and store nothing
  x += at.q * xs.b + at.r * xs.l + (skipped + l.group) * d + l.column;
  y += (first + l.group) * d + l.column;
  const i64 angles = index[at.r] * n;
  Words words[DEPTH] = {}, weight = {};
#pragma unroll
  for (int u = 0; u < DEPTH; u++)
    if (u * l.groups + l.group < mine) words[u] = words_at(x + u * step);
  if constexpr (NORMED) weight = load_words(keys ? wk : wq, l.column, d);
  __syncwarp(); // all these loads are under way before the first of them is waited for
  Turn t = turn_of(table + angles, l, n, 1.0f);
  const float inverse = 1.0f / d;
  if constexpr (NORMED) {
    rstd += first + l.group;
    // the weights go into the angles: y = rstd (x (w c) + other (w' s))
    const F w = unpacked<T>(weight), v = unpacked<T>(others<LANES>(weight, l));
#pragma unroll
    for (int j = 0; j < N; j++) t.c[j] *= w.x[j], t.s[j] *= v.x[j];
  }
  for (int h0 = 0; h0 < count; h0 += l.groups * DEPTH) {
#pragma unroll
    for (int u = 0; u < DEPTH; u++) {
      if (h0 + u * l.groups >= count) break;
      const int h = h0 + u * l.groups + l.group;
      const F z = unpacked<T>(words[u]), o = unpacked<T>(others<LANES>(words[u], l));
      float scale = 1.0f;
      if constexpr (NORMED) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < N; j++) sum = fmaf(z.x[j], z.x[j], sum);
        scale = inverse_root(fmaf(head_sum<LANES>(sum, l), inverse, eps));
        if (l.column == 0 && h < mine) rstd[u * l.groups] = scale;
      }
      F to;
#pragma unroll
      for (int j = 0; j < N; j++) {
        to.x[j] = fmaf(z.x[j], t.c[j], o.x[j] * t.s[j]);
        if constexpr (NORMED) to.x[j] *= scale;
      }
      if (h < mine) words_to(y + u * step, packed<T>(to));
      // words of a head past the last stay what they were: nothing of them is stored
      if (h + l.groups * DEPTH < mine) words[u] = words_at(x + (u + DEPTH) * step);
    }
    x += DEPTH * step;
    y += DEPTH * step;
    if constexpr (NORMED) rstd += l.groups * DEPTH;
  }
}
#define FORWARD                                                                                                          \
  (T * y, float *rstd, const T *x, const T *wq, const T *wk, i64 xb, i64 xl, const float *table, const i64 *index,       \
   i64 rows, i64 length, i64 heads, i64 kv_heads, i64 d, i64 n, float eps, i64 shift)
#define SIZES {rows, length, heads, kv_heads, d, n}
// The usual widths, 64 and 128 of 16-bit elements, are those of constant sizes.
#define FOR_LANES(run, normed, ...)                                                                                      \
  if (n == d && d == 8 * N) run<normed, 8>(__VA_ARGS__);                                                                 \
  else if (n == d && d == 16 * N) run<normed, 16>(__VA_ARGS__);                                                          \
  else run<normed, 0>(__VA_ARGS__)

KERNEL __launch_bounds__(128, 8) qk_norm_rope FORWARD {
  begin_early();
  FOR_LANES(forward_heads, true, y, rstd, x, wq, wk, Strides{xb, xl, 0}, table, index, SIZES, eps, (int)shift);
}
KERNEL __launch_bounds__(128, 8) qk_rope FORWARD {
  begin_early();
  FOR_LANES(forward_heads, false, y, rstd, x, wq, wk, Strides{xb, xl, 0}, table, index, SIZES, eps, (int)shift);
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

constexpr int WARPS = 8;
// Each lane's parts of dw, of queries and of keys, four columns together.
typedef Pack<float> Parts[2][WARPS][N / 4][32];

// Warps walk over rows: of each its query heads, its key heads and its value heads.
template <bool NORMED, int LANES> DEVICE void backward_rows(const Backward &b, int shift, Parts *parts) {
  constexpr int DEPTH = LANES ? 4 : 2;
  const Sizes &s = b.s;
  const int heads = (int)s.heads, kv_heads = (int)s.kv_heads, d = LANES ? LANES * N : (int)s.d, n = LANES ? d : (int)s.n;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Lane l = lane_of<LANES>(s, shift);
  const int step = l.groups * d;
  const float inverse = 1.0f / d;
  if constexpr (NORMED) {
#pragma unroll
    for (int j = 0; j < N / 4; j++) (*parts)[0][warp][j][lane] = (*parts)[1][warp][j][lane] = Pack<float>{};
  }
  for (i64 first = (i64)blockIdx.x * WARPS; first < s.rows; first += (i64)gridDim.x * WARPS) {
    const bool lives = first + warp < s.rows; // others take the last row again and store nothing
    const i64 r = lives ? first + warp : s.rows - 1;
    const Quotient at = divide(r, s.length);
    const i64 angles = b.index[at.r] * n;
    Turn t;
#pragma unroll 1
    for (int keys = 0; keys < 2; keys++) {
      const int count = keys ? kv_heads : heads, mine = lives && l.column < d ? count : 0;
      const i64 skipped = (keys ? heads : 0) + l.group;
      const T *x = NORMED ? b.x + at.q * b.xs.b + at.r * b.xs.l + skipped * d + l.column : nullptr;
      const float *rstd = NORMED ? b.rstd + r * (heads + kv_heads) + skipped : nullptr;
      const Strides &dys = keys ? b.ks : b.qs;
      const T *dy = (keys ? b.dk : b.dq) + at.q * dys.b + at.r * dys.l + l.group * dys.h + l.column;
      T *dx = b.dx + (r * (heads + 2 * kv_heads) + skipped) * d + l.column;
      const i64 dy_step = l.groups * dys.h;
      // of heads past the last, words stay what they were, and their scale is 0: nothing of them is stored or summed
      Words x_words[DEPTH] = {}, dy_words[DEPTH] = {};
      float scales[DEPTH] = {};
      auto load = [&](int u, int head) {
        dy_words[u] = words_at(dy + head * dy_step);
        if constexpr (NORMED) x_words[u] = words_at(x + head * step), scales[u] = rstd[head * l.groups];
      };
#pragma unroll
      for (int u = 0; u < DEPTH; u++)
        if (u * l.groups + l.group < mine) load(u, u);
      Words weight = {};
      if constexpr (NORMED) weight = load_words(keys ? b.wk : b.wq, l.column, d);
      __syncwarp(); // all these loads are under way before the first of them is waited for
      if (!keys) t = turn_of(b.table + angles, l, n, -1.0f);
      const F w = unpacked<T>(weight);
      float dw[N] = {};
      for (int h0 = 0; h0 < count; h0 += l.groups * DEPTH) {
#pragma unroll
        for (int u = 0; u < DEPTH; u++) {
          if (h0 + u * l.groups >= count) break;
          const int h = h0 + u * l.groups + l.group;
          const float scale = scales[u];
          const F g = unpacked<T>(dy_words[u]), o = unpacked<T>(others<LANES>(dy_words[u], l)), v = unpacked<T>(x_words[u]);
          F dz;
#pragma unroll
          for (int j = 0; j < N; j++) dz.x[j] = fmaf(g.x[j], t.c[j], o.x[j] * t.s[j]);
          if constexpr (NORMED) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < N; j++) {
              const float product = dz.x[j] * v.x[j];
              dw[j] = fmaf(product, scale, dw[j]);
              sum = fmaf(product, w.x[j], sum);
            }
            const float m = head_sum<LANES>(sum, l) * inverse * scale * scale;
#pragma unroll
            for (int j = 0; j < N; j++) dz.x[j] = scale * fmaf(-v.x[j], m, dz.x[j] * w.x[j]);
          }
          if (h < mine) words_to(dx + u * step, packed<T>(dz));
          scales[u] = 0.0f;
          if (h + l.groups * DEPTH < mine) load(u, u + DEPTH);
        }
        dy += DEPTH * dy_step;
        dx += DEPTH * step;
        if constexpr (NORMED) x += DEPTH * step, rstd += DEPTH * l.groups;
      }
      if constexpr (NORMED) {
#pragma unroll
        for (int j = 0; j < N; j += 4) {
          Pack<float> &sum = (*parts)[keys][warp][j / 4][lane];
          sum = {sum.x[0] + dw[j], sum.x[1] + dw[j + 1], sum.x[2] + dw[j + 2], sum.x[3] + dw[j + 3]};
        }
      }
    }
    copy_heads(b.dx + (r * (heads + 2 * kv_heads) + heads + kv_heads) * d, b.dv + at.q * b.vs.b + at.r * b.vs.l, b.vs.h,
               lives ? kv_heads : 0, d, l);
  }
  if constexpr (NORMED) {
    // over the groups of a warp, and over warps
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * d; i += 32 * WARPS) {
      const int keys = i >= d, c = keys ? i - d : i;
      float sum = 0.0f;
      for (int p = 0; p < WARPS; p++)
        for (int g = 0; g < l.groups; g++) sum += (*parts)[keys][p][c % N / 4][g * l.lanes + c / N].x[c % 4];
      b.partial[((i64)keys * gridDim.x + blockIdx.x) * d + c] = sum;
    }
  }
}

#define BACKWARD                                                                                                         \
  (T * dx, float *partial, const T *x, const T *wq, const T *wk, const float *rstd, const T *dq, const T *dk,            \
   const T *dv, i64 xb, i64 xl, i64 qb, i64 ql, i64 qh, i64 kb, i64 kl, i64 kh, i64 vb, i64 vl, i64 vh,                  \
   const float *table, const i64 *index, i64 rows, i64 length, i64 heads, i64 kv_heads, i64 d, i64 n, i64 shift)
#define GATHERED                                                                                                         \
  const Backward b{dx, partial, x, wq, wk, rstd, dq, dk, dv, {xb, xl, 0}, {qb, ql, qh}, {kb, kl, kh}, {vb, vl, vh},      \
                   table, index, SIZES}

KERNEL __launch_bounds__(32 * WARPS, 2) qk_norm_rope_backward BACKWARD {
  __shared__ Parts parts;
  GATHERED;
  FOR_LANES(backward_rows, true, b, (int)shift, &parts);
}
KERNEL __launch_bounds__(32 * WARPS, 3) qk_rope_backward BACKWARD {
  GATHERED;
  FOR_LANES(backward_rows, false, b, (int)shift, nullptr);
}

// ---- elements one by one ----

DEVICE float weight_at(const T *w, i64 i) { return w ? to_f32(w[i]) : 1.0f; }

KERNEL __launch_bounds__(256) qk_norm_rope_single FORWARD {
  begin_early();
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
