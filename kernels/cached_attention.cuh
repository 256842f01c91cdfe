// What kernels of attention to a cache's keys share: how a run is dealt out, and softmaxes over parts of it. The order of sums,
// which no launch may change, is told in cached_attention.cu.
//
// CASE: 6 * int8 + 2 * width + packed; heads are at most 64 << width wide, and packed rows begin and end on 16 bytes, those of
// int8 keys and values on 8.
#pragma once
#ifndef CASE
#define CASE 1
#endif
#define PACKED (CASE & 1)
#define INT8 (CASE >= 6)
#include "common.cuh"

constexpr int D = 64 << CASE % 6 / 2;
#if INT8
typedef i8 S;          // what keys and values are kept as, times an f32 scale a row
constexpr int P = 8;   // of a row in a pack: with 16, queries and sums would take more registers than there are
#else
typedef T S;
constexpr int P = Pack<T>::N;
#endif
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
#if INT8
struct alignas(8) Kept { u32 w[2]; };
struct Numbers { float x[P]; };
struct Loaded {
  Kept k[UNROLL][PACKS], v[UNROLL][PACKS];
  float k_scale[UNROLL], v_scale[UNROLL];
};
// x + 128 as the lowest byte of 2^23, less 2^23 + 128: exact, and cheaper than a conversion.
DEVICE Numbers numbers_of(const Kept &v) {
  Numbers f;
#pragma unroll
  for (int j = 0; j < P; j++)
    f.x[j] = __uint_as_float(__byte_perm(v.w[j / 4] ^ 0x80808080u, 0x4b000000u, 0x7440 + j % 4)) - 8388736.0f;
  return f;
}
DEVICE void fetch_scales(Loaded &l, const float *k, const float *v, int at, int rows) {
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const int row = at + u * GROUPS;
    l.k_scale[u] = row < rows ? k[row] : 0.0f, l.v_scale[u] = row < rows ? v[row] : 0.0f;
  }
}
#else
typedef Words Kept;
typedef Floats<T> Numbers;
struct Loaded { Kept k[UNROLL][PACKS], v[UNROLL][PACKS]; };
DEVICE Numbers numbers_of(const Kept &v) { return unpacked<T>(v); }
#endif
DEVICE Kept kept_at(const S *row, int column, bool present, int d) {
  Kept v = {};
  if constexpr (PACKED) {
    if (present && column < d) v = *reinterpret_cast<const Kept *>(row + column);
  } else {
#if INT8
#pragma unroll
    for (int j = 0; j < P; j++)
      if (present && column + j < d) v.w[j / 4] |= (u32)(u8)row[column + j] << j % 4 * 8;
#else
    v = load_words(row, column, present ? d : 0);
#endif
  }
  return v;
}
template <typename Stride>
DEVICE void fetch(Loaded &l, const S *k, const S *v, Stride k_row, Stride v_row, int at, int rows, int x, int d) {
  k += at * k_row, v += at * v_row;
#pragma unroll
  for (int u = 0; u < UNROLL; u++)
#pragma unroll
    for (int p = 0; p < PACKS; p++) l.k[u][p] = kept_at(k + u * GROUPS * k_row, column(x, p * P), at + u * GROUPS < rows, d);
#pragma unroll
  for (int u = 0; u < UNROLL; u++)
#pragma unroll
    for (int p = 0; p < PACKS; p++) l.v[u][p] = kept_at(v + u * GROUPS * v_row, column(x, p * P), at + u * GROUPS < rows, d);
}

// What a query sees of a step goes into its softmax.
DEVICE void absorb(Softmax &s, const float (&query)[E], const Loaded &l, int at, int rows) {
  float score[UNROLL], most = s.top;
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    score[u] = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const Numbers key = numbers_of(l.k[u][p]);
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
#if INT8
    score[u] = __fmul_rn(score[u], l.k_scale[u]);
#endif
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
    float weight = power(score[u] - base);
    s.sum = __fadd_rn(s.sum, weight);
#if INT8
    weight = __fmul_rn(weight, l.v_scale[u]);
#endif
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const Numbers value = numbers_of(l.v[u][p]);
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
