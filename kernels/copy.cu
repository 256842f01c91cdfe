// A strided view, copied into row-major order: y[i] = x[offset(i)]. n elements, one thread each (or each 16 bytes).
// Writes all of y; accumulates nothing.
#include "common.cuh"

KERNEL copy_strided(T *__restrict__ y, const T *__restrict__ x, View v, i64 n) {
  for (i64 i = thread_index(); i < n; i += thread_count()) y[i] = x[offset_of(v, i)];
}

// The innermost dimension is dense, and every row begins and ends on 16 bytes.
KERNEL copy_packed(T *__restrict__ y, const T *__restrict__ x, View v, i64 n) {
  constexpr int N = Pack<T>::N;
  for (i64 i = thread_index() * N; i < n; i += thread_count() * N) store_pack(y + i, load_pack(x + offset_of(v, i)));
}
