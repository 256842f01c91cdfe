// What kernels over rows and runs share: runs of N elements as f32, teams of threads that take a row together, quotients.
#pragma once
#include "common.cuh"

// ---- runs of N elements ----

// N elements from p on, as f32, of which `left` exist; `fill` stands for the others. `packed`: p lies at a multiple of 16
// bytes. Elements come to the same places either way, so sums over them do not depend on alignment.
template <int N, typename D> DEVICE void load_run(float (&v)[N], const D *p, i64 left, bool packed, float fill = 0.0f) {
  constexpr int M = Pack<D>::N;
  if constexpr (N % M == 0) {
    if (packed && left >= N) {
#pragma unroll
      for (int q = 0; q < N; q += M) {
        const Pack<D> pack = load_pack(p + q);
#pragma unroll
        for (int j = 0; j < M; j++) v[q + j] = to_f32(pack.x[j]);
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = j < left ? to_f32(p[j]) : fill;
}

// The first `left` of N elements to p, rounded.
template <int N, typename D> DEVICE void store_run(D *p, const float (&v)[N], i64 left, bool packed) {
  constexpr int M = Pack<D>::N;
  if constexpr (N % M == 0) {
    if (packed && left >= N) {
#pragma unroll
      for (int q = 0; q < N; q += M) {
        Pack<D> pack;
#pragma unroll
        for (int j = 0; j < M; j++) pack.x[j] = from_f32<D>(v[q + j]);
        store_pack(p + q, pack);
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++)
    if (j < left) p[j] = from_f32<D>(v[j]);
}

// Pairwise.
template <int N> DEVICE float sum_of(const float (&v)[N]) {
  float s[N];
#pragma unroll
  for (int j = 0; j < N; j++) s[j] = v[j];
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
    for (int j = 0; j < half; j++) s[j] += s[j + half];
  return s[0];
}

// ---- teams: a warp, or a whole block, takes a row (`Teams` in ops/cuda/rows.rs) ----

// Blocks have up to 1024 threads, so a kernel of teams may take 64 registers.
#define TEAMS __launch_bounds__(1024, 1)
struct Team {
  i64 row;      // past the last row in the last block's spare warps, which then leave
  int lane;
  int lanes;    // 32, or the block's size
};
DEVICE Team team(int lanes) {
  if (lanes == 32) return {(i64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), (int)(threadIdx.x & 31), 32};
  return {(i64)blockIdx.x, (int)threadIdx.x, (int)blockDim.x};
}
DEVICE float team_sum(const Team &t, float x, float *shared) { return t.lanes == 32 ? warp_sum(x) : block_sum(x, shared); }
DEVICE float team_max(const Team &t, float x, float *shared) { return t.lanes == 32 ? warp_max(x) : block_max(x, shared); }

// ---- the largest element and its place: of equals the first; NaN counts as larger than any number ----

struct Largest {
  float x;
  i64 at;
};
#define NOTHING (Largest{-infinity(), 0x7fffffffffffffffll})
DEVICE Largest larger(const Largest &a, const Largest &b) {
  const bool a_nan = a.x != a.x, b_nan = b.x != b.x;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (!a_nan && a.x != b.x) return a.x > b.x ? a : b;
  return a.at <= b.at ? a : b;
}
DEVICE Largest warp_largest(Largest a) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1)
    a = larger(a, {__shfl_xor_sync(0xffffffffu, a.x, o), __shfl_xor_sync(0xffffffffu, a.at, o)});
  return a;
}
// For every thread of the team. `shared` holds 32.
DEVICE Largest team_largest(const Team &t, Largest a, Largest *shared) {
  a = warp_largest(a);
  if (t.lanes == 32) return a;
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  if (lane == 0) shared[threadIdx.x >> 5] = a;
  __syncthreads();
  a = warp_largest(lane < warps ? shared[lane] : NOTHING);
  __syncthreads();
  return a;
}

// ---- quotients ----

struct Quotient { i64 q, r; };
// i / d and i % d, neither negative. 32-bit division is several times faster, and most sizes fit.
DEVICE Quotient divide(i64 i, i64 d) {
  if (((u64)i | (u64)d) <= 0xffffffffull) {
    const u32 q = (u32)i / (u32)d;
    return {(i64)q, (i64)((u32)i - q * (u32)d)};
  }
  const i64 q = i / d;
  return {q, i - q * d};
}

// e^x: within 1 ulp or so for f32 elements; for 16-bit ones the faster form, which errs by (2 + 1.2 |x|) 2^-24.
DEVICE float e_to(float x) {
  if constexpr (Same<T, float>::value) return expf(x);
  else return __expf(x);
}

// 1 / (1 + e^-x): where T has 16 bits, e^x and 1/x are the chip's approximations (2^-22), far below T's rounding.
DEVICE float sigmoid(float x) {
  if constexpr (Same<T, float>::value) return 1.0f / (1.0f + expf(-x));
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + __expf(-x)));
  return y;
}
