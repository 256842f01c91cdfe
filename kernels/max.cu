// The largest element of every row, and its place: of equals the first; NaN counts as larger than any number.
//
//   forward    x [rows, n] (dense rows, any stride between them): y[r] = x[r, at[r]], at [rows] int64. A team takes a row.
//   backward   dx[r, at[r]] = dy[r], 0 elsewhere: max_backward writes those elements alone, into zeros [rows, n].
//              A thread takes a row.
//
// forward writes all of y and at. at is saved.
#include "rows.cuh"

struct Largest {
  float x;
  i64 at;
};
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

KERNEL max_forward(T *__restrict__ y, i64 *__restrict__ at, const T *__restrict__ x, View view, i64 rows, i64 n, int lanes) {
  __shared__ float values[32];
  __shared__ i64 places[32];
  const Team t = team(lanes);
  if (t.row >= rows) return;
  const T *row = x + offset_of(view, t.row);
  const Largest none = {-infinity(), 0x7fffffffffffffffll};
  Largest best = none;
  for (i64 i = t.lane; i < n; i += t.lanes) best = larger(best, {to_f32(row[i]), i});
  best = warp_largest(best);
  if (lanes != 32) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0) values[warp] = best.x, places[warp] = best.at;
    __syncthreads();
    best = warp_largest(lane < (int)(blockDim.x >> 5) ? Largest{values[lane], places[lane]} : none);
  }
  if (t.lane == 0) {
    y[t.row] = row[best.at];
    at[t.row] = best.at;
  }
}

KERNEL max_backward(T *__restrict__ dx, const T *__restrict__ dy, const i64 *__restrict__ at, i64 rows, i64 n) {
  for (i64 r = thread_index(); r < rows; r += thread_count()) dx[r * n + at[r]] = dy[r];
}
