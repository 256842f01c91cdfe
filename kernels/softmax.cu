// Softmax and its logarithm over rows of w elements. With l = ln sum e^x, taken as max + ln sum e^(x - max):
//
//   forward    y = e^(x - l), or x - l (log); l [rows], f32, is saved with x
//   backward   with p = e^(x - l): dx = p (dy - sum(dy p)), or dy - p sum(dy) (log)
//
// x and dy have dense rows, any strides between them (views over rows); y and dx are contiguous. A team takes a row, a lane
// N neighbours at a time; `packed`: rows begin at multiples of 16 bytes. Rows are read again for every pass, from cache.
// Writes all of y, l, dx; accumulates nothing.
#include "rows.cuh"

constexpr int N = Pack<T>::N;

KERNEL TEAMS softmax_forward(T *__restrict__ y, float *__restrict__ lse, const T *__restrict__ x, View view, i64 rows, i64 w,
                       int lanes, int packed, int packed_out, int log) {
  __shared__ float shared[32];
  const Team t = team(lanes);
  if (t.row >= rows) return;
  x += offset_of(view, t.row);
  y += t.row * w;
  const i64 first = t.lane * N, step = t.lanes * N;
  float max = -infinity();
  for (i64 i = first; i < w; i += step) {
    float v[N];
    load_run(v, x + i, w - i, packed, -infinity());
#pragma unroll
    for (int j = 0; j < N; j++) max = fmaxf(max, v[j]);
  }
  max = team_max(t, max, shared);
  float sum[N] = {};
  for (i64 i = first; i < w; i += step) {
    float v[N];
    load_run(v, x + i, w - i, packed);
#pragma unroll
    for (int j = 0; j < N; j++)
      if (i + j < w) sum[j] = __fadd_rn(sum[j], e_to(v[j] - max));
  }
  const float l = max + logf(team_sum(t, sum_of(sum), shared));
  if (t.lane == 0) lse[t.row] = l;
  for (i64 i = first; i < w; i += step) {
    float v[N];
    load_run(v, x + i, w - i, packed);
#pragma unroll
    for (int j = 0; j < N; j++) {
      v[j] -= l;
      if (!log) v[j] = e_to(v[j]);
    }
    store_run(y + i, v, w - i, packed_out);
  }
}

KERNEL TEAMS softmax_backward(T *__restrict__ dx, const T *__restrict__ x, const float *__restrict__ lse, const T *__restrict__ dy,
                        View view, View dy_view, i64 rows, i64 w, int lanes, int packed, int packed_dy, int packed_out,
                        int log) {
  __shared__ float shared[32];
  const Team t = team(lanes);
  if (t.row >= rows) return;
  x += offset_of(view, t.row);
  dy += offset_of(dy_view, t.row);
  dx += t.row * w;
  const float l = lse[t.row];
  const i64 first = t.lane * N, step = t.lanes * N;
  float sum[N] = {};
  for (i64 i = first; i < w; i += step) {
    float g[N], v[N];
    load_run(g, dy + i, w - i, packed_dy);
    if (!log) load_run(v, x + i, w - i, packed);
#pragma unroll
    for (int j = 0; j < N; j++)
      if (i + j < w) sum[j] = log ? sum[j] + g[j] : __fmaf_rn(g[j], e_to(v[j] - l), sum[j]);
  }
  const float all = team_sum(t, sum_of(sum), shared);
  for (i64 i = first; i < w; i += step) {
    float g[N], v[N];
    load_run(g, dy + i, w - i, packed_dy);
    load_run(v, x + i, w - i, packed);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float p = e_to(v[j] - l);
      v[j] = log ? __fmaf_rn(-p, all, g[j]) : __fmul_rn(p, __fsub_rn(g[j], all));
    }
    store_run(dx + i, v, w - i, packed_out);
  }
}
