// Sums over any dimensions of a view, in f32, rounded once: y[o] = sum over r of x[o, r], o over the dimensions that are
// kept and r over those that are summed, both in row-major order. Backward repeats dy, as a view.
//
// What is added in which order follows from the shape alone, so views sum like their copies, bit for bit:
//
//   rows      the last dimension is summed. A team takes a run of a row; a lane takes N neighbours at a time into N sums,
//             which are added pairwise, and over the team. n elements a row, `runs` runs of `run` elements (a multiple of
//             what a team takes at a time). Launch: a team for each (row, run)
//   columns   the last dimension (w) is kept. A block of X x Y threads takes N X columns of a run of rows: thread (x, y)
//             every Y-th row of N columns; then the Y sums are added pairwise. n rows, `runs` runs of `run` rows.
//             Launch: (blocks over the columns of each o, runs), block (X, Y), X Y = 256, powers of 2
//
// Where there are several runs, *_partial leave their f32 sums (rows: [o, run], columns: [o, run, w]), and *_finish sum
// those. Everything is overwritten; nothing is saved.
#include "rows.cuh"

template <typename I, typename O>
DEVICE void rows(O *__restrict__ y, const I *__restrict__ x, const View &kept, const View &summed, i64 m, i64 n, i64 run,
                 i64 runs, int lanes, bool packed) {
  constexpr int N = Pack<I>::N;
  __shared__ float shared[32];
  const Team t = team(lanes);
  if (t.row >= m * runs) return;
  const Quotient at = divide(t.row, runs);
  x += offset_of(kept, at.q);
  const i64 begin = at.r * run, end = begin + run < n ? begin + run : n;
  float sum[N] = {};
  for (i64 i = begin + t.lane * N; i < end; i += t.lanes * N) {
    float v[N];
    if (packed) {
      load_run(v, x + offset_of(summed, i), end - i, true);
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = i + j < end ? to_f32(x[offset_of(summed, i + j)]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] += v[j];
  }
  const float all = team_sum(t, sum_of(sum), shared);
  if (t.lane == 0) y[t.row] = from_f32<O>(all);
}

KERNEL TEAMS sum_rows(T *y, const T *x, View kept, View summed, i64 m, i64 n, i64 run, i64 runs, int lanes, int packed) {
  rows(y, x, kept, summed, m, n, run, runs, lanes, packed);
}
KERNEL TEAMS sum_rows_partial(float *y, const T *x, View kept, View summed, i64 m, i64 n, i64 run, i64 runs, int lanes, int packed) {
  rows(y, x, kept, summed, m, n, run, runs, lanes, packed);
}
KERNEL TEAMS sum_rows_finish(T *y, const float *x, View kept, View summed, i64 m, i64 n, i64 run, i64 runs, int lanes, int packed) {
  rows(y, x, kept, summed, m, n, run, runs, lanes, packed);
}

constexpr int THREADS = 256;

template <typename I, typename O>
DEVICE void columns(O *__restrict__ y, const I *__restrict__ x, const View &kept, const View &summed, i64 w, i64 n, i64 run,
                    i64 runs, bool packed) {
  constexpr int N = Pack<I>::N;
  __shared__ float part[N][THREADS];
  const int X = blockDim.x, Y = blockDim.y, me = threadIdx.y * X + threadIdx.x;
  const i64 across = (w + X * N - 1) / (X * N);
  const i64 o = blockIdx.x / across, c = (blockIdx.x % across * X + threadIdx.x) * N, s = blockIdx.y;
  const i64 begin = s * run, end = begin + run < n ? begin + run : n;
  float sum[N] = {};
  if (c < w) {
    x += offset_of(kept, o) + c;
    for (i64 r = begin + threadIdx.y; r < end; r += Y) {
      float v[N];
      load_run(v, x + offset_of(summed, r), w - c, packed);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += v[j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) part[j][me] = sum[j];
  __syncthreads();
  for (int half = Y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
#pragma unroll
      for (int j = 0; j < N; j++) part[j][me] += part[j][me + half * X];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && c < w) {
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] = part[j][me];
    store_run(y + (o * runs + s) * w + c, sum, w - c, false);
  }
}

KERNEL sum_columns(T *y, const T *x, View kept, View summed, i64 w, i64 n, i64 run, i64 runs, int packed) {
  columns(y, x, kept, summed, w, n, run, runs, packed);
}
KERNEL sum_columns_partial(float *y, const T *x, View kept, View summed, i64 w, i64 n, i64 run, i64 runs, int packed) {
  columns(y, x, kept, summed, w, n, run, runs, packed);
}
KERNEL sum_columns_finish(T *y, const float *x, View kept, View summed, i64 w, i64 n, i64 run, i64 runs, int packed) {
  columns(y, x, kept, summed, w, n, run, runs, packed);
}
