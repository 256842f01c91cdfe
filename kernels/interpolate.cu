// A sparse matrix applied along a dimension: y[o, j, k] = sum of weight * x[o, column, k] over the entries of row j, in their
// order, in f32. Backward is the same with the matrix transposed.
//
//   y [lead, m, w] contiguous. Row j's entries are entries[starts[j]] up to entries[starts[j + 1]]: each the column in the
//   high and the weight's f32 bits in the low 32 bits.
//   interpolate_last     w = 1. A thread takes column j of ROWS rows o, so that entries are read once for all of them.
//                        Launch: blocks of 256 over m, times groups of ROWS rows
//   interpolate          x of any strides along k. Launch: for_each(n), n = lead m w
//   interpolate_packed   16 bytes of x a thread: dense and aligned along the innermost dimension, w a multiple of them
//
// Writes all of y; accumulates nothing.
#include "rows.cuh"

constexpr int ROWS = 8;

DEVICE i64 column_of(i64 entry) { return (i64)((u64)entry >> 32); }
DEVICE float weight_of(i64 entry) { return __uint_as_float((u32)entry); }

KERNEL interpolate_last(T *__restrict__ y, const T *__restrict__ x, View lead, i64 stride, const i64 *__restrict__ starts,
                        const i64 *__restrict__ entries, i64 leads, i64 m) {
  const i64 across = (m + blockDim.x - 1) / blockDim.x;
  const i64 j = blockIdx.x % across * blockDim.x + threadIdx.x, first = blockIdx.x / across * ROWS;
  if (j >= m) return;
  const T *row[ROWS];
  float sum[ROWS] = {};
#pragma unroll
  for (int r = 0; r < ROWS; r++) row[r] = x + offset_of(lead, first + r < leads ? first + r : leads - 1);
  const i64 end = starts[j + 1];
  for (i64 e = starts[j]; e < end; e++) {
    const i64 entry = entries[e], at = column_of(entry) * stride;
    const float weight = weight_of(entry);
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum[r] = __fmaf_rn(weight, to_f32(row[r][at]), sum[r]);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    if (first + r < leads) y[(first + r) * m + j] = from_f32<T>(sum[r]);
}

template <int N>
DEVICE void apply(T *__restrict__ y, const T *__restrict__ x, const View &lead, const View &inner, i64 stride,
                  const i64 *__restrict__ starts, const i64 *__restrict__ entries, i64 m, i64 w, i64 n) {
  for (i64 i = thread_index() * N; i < n; i += thread_count() * N) {
    const Quotient slice = divide(i, w), at = divide(slice.q, m);
    const T *from = x + offset_of(lead, at.q) + offset_of(inner, slice.r);
    float sum[N] = {};
    const i64 end = starts[at.r + 1];
    for (i64 e = starts[at.r]; e < end; e++) {
      const i64 entry = entries[e];
      float v[N];
      load_run(v, from + column_of(entry) * stride, N, true);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] = __fmaf_rn(weight_of(entry), v[j], sum[j]);
    }
    store_run(y + i, sum, N, true);
  }
}

KERNEL interpolate(T *y, const T *x, View lead, View inner, i64 stride, const i64 *starts, const i64 *entries, i64 m, i64 w,
                   i64 n) {
  apply<1>(y, x, lead, inner, stride, starts, entries, m, w, n);
}
KERNEL interpolate_packed(T *y, const T *x, View lead, View inner, i64 stride, const i64 *starts, const i64 *entries, i64 m,
                          i64 w, i64 n) {
  apply<Pack<T>::N>(y, x, lead, inner, stride, starts, entries, m, w, n);
}
