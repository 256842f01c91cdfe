// Slices picked along a dimension: y[o, j, k] = x[o, index[j], k], o over the dimensions before it, k over those behind it.
//
//   y [lead, m, w] contiguous; x by views over o and k, and its stride along the dimension. n elements of y in all.
//   gather          any strides. Launch: for_each(n)
//   gather_packed   16 bytes a thread: x dense and aligned along the innermost dimension, w a multiple of 16 bytes
//
// Writes all of y. Backward: scatter.cu.
#include "rows.cuh"

DEVICE i64 source(const View &lead, const View &inner, const i64 *index, i64 stride, i64 m, i64 w, i64 i) {
  const Quotient slice = divide(i, w), at = divide(slice.q, m);
  return offset_of(lead, at.q) + index[at.r] * stride + offset_of(inner, slice.r);
}

KERNEL gather(T *__restrict__ y, const T *__restrict__ x, View lead, View inner, const i64 *__restrict__ index, i64 stride,
              i64 m, i64 w, i64 n) {
  for (i64 i = thread_index(); i < n; i += thread_count()) y[i] = x[source(lead, inner, index, stride, m, w, i)];
}

KERNEL gather_packed(T *__restrict__ y, const T *__restrict__ x, View lead, View inner, const i64 *__restrict__ index,
                     i64 stride, i64 m, i64 w, i64 n) {
  constexpr int N = Pack<T>::N;
  for (i64 i = thread_index() * N; i < n; i += thread_count() * N)
    store_pack(y + i, load_pack(x + source(lead, inner, index, stride, m, w, i)));
}
