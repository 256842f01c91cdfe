// What kernels of attention to a cache's keys share: how a run is dealt out, and softmaxes over parts of it. The order of sums,
// which no launch may change, is told in cached_attention.cu.
//
// CASE: 2 * width + packed; heads are at most 64 << width wide, and packed rows begin and end on 16 bytes.
#pragma once
#ifndef CASE
#define CASE 1
#endif
#define PACKED (CASE & 1)
#include "common.cuh"

constexpr int D = 64 << CASE / 2;
constexpr int P = Pack<T>::N;
constexpr int LANES = D / P > 32 ? 32 : D / P, GROUPS = 32 / LANES;
constexpr int PACKS = D / P / LANES, E = PACKS * P;   // of a lane
constexpr int UNROLL = 4 / PACKS, STEP = GROUPS * UNROLL;
constexpr int TEAMS = 16, CHUNK = 1024, JOINED = 4;   // CHUNK as in ops/cuda/cached_attention.rs

// Scores are in units of log 2 where T has 16 bits, and natural in f32, whose exponentials are exact.
constexpr bool EXACT = Same<T, float>::value;
constexpr float UNIT = EXACT ? 1.0f : 1.4426950408889634f;
DEVICE float power(float x) {
  if constexpr (EXACT) {
    return expf(x);
  } else {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
}
// What powers are relative to: nothing seen yet gives powers of 0.
DEVICE float base_of(float top) { return top == -infinity() ? 0.0f : top; }

// ---- softmaxes over some of the keys, and two of them joined ----

struct Shares { float mine, theirs; };
DEVICE Shares joined(float &top, float other) {
  const float most = fmaxf(top, other), base = base_of(most);
  const Shares s = {power(top - base), power(other - base)};
  top = most;
  return s;
}
// Written out, so that every caller rounds alike.
DEVICE float mixed(float mine, float theirs, const Shares &s) { return fmaf(mine, s.mine, __fmul_rn(theirs, s.theirs)); }

struct Softmax {
  float top, sum, x[E];
};
DEVICE void clear(Softmax &s) {
  s.top = -infinity(), s.sum = 0.0f;
#pragma unroll
  for (int e = 0; e < E; e++) s.x[e] = 0.0f;
}
DEVICE void join(Softmax &s, const Softmax &o) {
  const Shares f = joined(s.top, o.top);
  s.sum = mixed(s.sum, o.sum, f);
#pragma unroll
  for (int e = 0; e < E; e++) s.x[e] = mixed(s.x[e], o.x[e], f);
}

// Columns of a lane: P from column `x` on and, in f32 heads of 256, P more LANES P columns further.
DEVICE int column(int x, int e) { return x + e / P * LANES * P + e % P; }

// A step's keys and values. `at` is the lane's first of them, of `rows` rows of k and v; past those all is zero.
struct Loaded { Words k[UNROLL][PACKS], v[UNROLL][PACKS]; };
DEVICE Words words_at(const T *row, int column, bool present, int d) {
  if constexpr (!PACKED) return load_words(row, column, present ? d : 0);
  Words v = {};   // as load_words, by 32-bit sizes
  if (present && column < d) v = *reinterpret_cast<const Words *>(row + column);
  return v;
}
template <typename Stride>
DEVICE void fetch(Loaded &l, const T *k, const T *v, Stride k_row, Stride v_row, int at, int rows, int x, int d) {
  k += at * k_row, v += at * v_row;
#pragma unroll
  for (int u = 0; u < UNROLL; u++)
#pragma unroll
    for (int p = 0; p < PACKS; p++) l.k[u][p] = words_at(k + u * GROUPS * k_row, column(x, p * P), at + u * GROUPS < rows, d);
#pragma unroll
  for (int u = 0; u < UNROLL; u++)
#pragma unroll
    for (int p = 0; p < PACKS; p++) l.v[u][p] = words_at(v + u * GROUPS * v_row, column(x, p * P), at + u * GROUPS < rows, d);
}

// What a query sees of a step goes into its softmax.
DEVICE void absorb(Softmax &s, const float (&query)[E], const Loaded &l, int at, int rows) {
  float score[UNROLL], most = s.top;
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    score[u] = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const Floats<T> key = unpacked<T>(l.k[u][p]);
#pragma unroll
      for (int e = 0; e < P; e++) score[u] = fmaf(query[p * P + e], key.x[e], score[u]);
    }
  }
#pragma unroll
  for (int o = 1; o < LANES; o <<= 1)
#pragma unroll
    for (int u = 0; u < UNROLL; u++) score[u] += __shfl_xor_sync(0xffffffffu, score[u], o);
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    if (at + u * GROUPS >= rows) score[u] = -infinity();
    most = fmaxf(most, score[u]);
  }
  const float base = base_of(most), shrink = power(s.top - base);
  s.top = most;
  s.sum = __fmul_rn(s.sum, shrink);
#pragma unroll
  for (int e = 0; e < E; e++) s.x[e] = __fmul_rn(s.x[e], shrink);
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const float weight = power(score[u] - base);
    s.sum = __fadd_rn(s.sum, weight);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const Floats<T> value = unpacked<T>(l.v[u][p]);
#pragma unroll
      for (int e = 0; e < P; e++) s.x[p * P + e] = fmaf(weight, value.x[e], s.x[p * P + e]);
    }
  }
}

// Softmaxes of the groups of a warp into that of group 0.
DEVICE void join_groups(Softmax &s) {
#pragma unroll
  for (int o = LANES; o < 32; o <<= 1) {
    Softmax other = {__shfl_xor_sync(0xffffffffu, s.top, o), __shfl_xor_sync(0xffffffffu, s.sum, o)};
#pragma unroll
    for (int e = 0; e < E; e++) other.x[e] = __shfl_xor_sync(0xffffffffu, s.x[e], o);
    join(s, other);
  }
}
