// The largest element of every row, and its place: of equals the first; NaN counts as larger than any number.
//
//   forward    x [rows, n] (dense rows, any stride between them): y[r] = x[r, at[r]], at [rows] int64. A team takes a row.
//   backward   dx[r, at[r]] = dy[r], 0 elsewhere: max_backward writes those elements alone, into zeros [rows, n].
//              A thread takes a row.
//
// forward writes all of y and at. at is saved.
#include "rows.cuh"

KERNEL TEAMS max_forward(T *__restrict__ y, i64 *__restrict__ at, const T *__restrict__ x, View view, i64 rows, i64 n, int lanes) {
  __shared__ Largest shared[32];
  const Team t = team(lanes);
  if (t.row >= rows) return;
  const T *row = x + offset_of(view, t.row);
  Largest best = NOTHING;
  for (i64 i = t.lane; i < n; i += t.lanes) best = larger(best, {to_f32(row[i]), i});
  best = team_largest(t, best, shared);
  if (t.lane == 0) {
    y[t.row] = row[best.at];
    at[t.row] = best.at;
  }
}

KERNEL max_backward(T *__restrict__ dx, const T *__restrict__ dy, const i64 *__restrict__ at, i64 rows, i64 n) {
  for (i64 r = thread_index(); r < rows; r += thread_count()) dx[r * n + at[r]] = dy[r];
}
