// Rungs 1 and 2: a query row in the registers of a warp.
#pragma once
#include "attention.cuh"

struct Row {
  static constexpr int N = D / 32; // columns of a lane
  int i, head, batch, lane;
  float q[N], y[N], top, sum, scale;

  DEVICE Row(const T *from, const Attention &a) {
    const int tiles = (int)(a.lq + 3) / 4, rest = blockIdx.x / tiles;
    i = blockIdx.x % tiles * 4 + threadIdx.x / 32, head = rest % (int)a.heads, batch = rest / (int)a.heads, lane = threadIdx.x % 32;
    top = -infinity(), sum = 0.0f, scale = scale_of(a);
    from += batch * a.q.batch + head * a.q.head + i * a.q.row;
#pragma unroll
    for (int e = 0; e < N; e++) q[e] = i < a.lq && lane * N + e < a.d ? to_f32(from[lane * N + e]) * scale : 0.0f, y[e] = 0.0f;
  }
  // Key j joins the softmax.
  DEVICE void see(const T *k, const T *v, const Attention &a, int j) {
    const int key_head = head / (int)a.group;
    k += batch * a.k.batch + key_head * a.k.head + j * a.k.row;
    v += batch * a.v.batch + key_head * a.v.head + j * a.v.row;
    float s = 0.0f;
#pragma unroll
    for (int e = 0; e < N; e++) s += lane * N + e < a.d ? q[e] * to_f32(k[lane * N + e]) : 0.0f;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
    const float now = fmaxf(top, s), shrink = __expf(top - now), p = __expf(s - now);
    top = now, sum = sum * shrink + p;
#pragma unroll
    for (int e = 0; e < N; e++) y[e] = y[e] * shrink + (lane * N + e < a.d ? p * to_f32(v[lane * N + e]) : 0.0f);
  }
  DEVICE void store(T *to, float *lse, const Attention &a) const {
    to += ((batch * a.lq + i) * a.heads + head) * a.d;
#pragma unroll
    for (int e = 0; e < N; e++)
      if (lane * N + e < a.d) to[lane * N + e] = from_f32<T>(y[e] / sum);
    if (lane == 0) lse[(batch * a.heads + head) * a.lq + i] = top + logf(sum);
  }
};
