// What linear_cross_entropy needs beside products and `cross_entropy_in_place`.
//
// linear_cross_entropy_scale: grad[i] *= *seed, n elements, in place. The seed, one f32 on the device, is nearly always 1,
// and then nothing is read or written. Bytes that must move, for elements of s bytes: 2 s n, or none.
//
// linear_cross_entropy_rows: row to_rows[i] of `to` = row from_rows[i] of `from`, i < n, rows of d, both contiguous; a list
// that is null stands for start, start + 1, ... A thread moves 16 bytes (`parts` of them in a row). Bytes: 2 s n d.
#include "common.cuh"

constexpr int N = 16 / sizeof(T);

KERNEL __launch_bounds__(256) linear_cross_entropy_scale(T *grad, const float *seed, i64 n) {
  const float c = *seed;
  if (c == 1.0f) return;
  for (i64 i = thread_index() * N; i < n; i += thread_count() * N) {
    Floats<T> x = unpacked<T>(load_words(grad, i, n));
#pragma unroll
    for (int j = 0; j < N; j++) x.x[j] *= c;
    store_words(grad, i, n, packed<T>(x));
  }
}

KERNEL __launch_bounds__(256) linear_cross_entropy_rows(T *__restrict__ to, const T *__restrict__ from,
                                                        const i64 *to_rows, i64 to_start, const i64 *from_rows,
                                                        i64 from_start, i64 n, i64 d, i64 parts) {
  const i64 i = thread_index() / parts, column = thread_index() % parts * N;
  if (i >= n) return;
  const i64 a = to_rows ? to_rows[i] : to_start + i, b = from_rows ? from_rows[i] : from_start + i;
  store_words(to + a * d, column, d, load_words(from + b * d, column, d));
}
