// Copies between strided views of one shape: y[to(i)] = x[from(i)] for n elements, i in row-major order. Writes those
// elements of y and no others; accumulates nothing. Strides of 0 repeat an element of x.
//
//   copy_strided      any strides. Launch: for_each(n)
//   copy_packed       16 bytes a thread: both views dense along the innermost dimension, or x repeated there
//   copy_transposed   x dense along another dimension than y: y[o, r, .., c] = x[o, r, .., c] with r dense in x and c in y,
//                     tile by tile through shared memory, so that both sides are read and written in runs.
//                     Launch: a block of 32 x 8 threads for each 32 x 32 tile of each o
#include "common.cuh"

KERNEL copy_strided(T *__restrict__ y, View to, const T *__restrict__ x, View from, i64 n) {
  for (i64 i = thread_index(); i < n; i += thread_count()) y[offset_of(to, i)] = x[offset_of(from, i)];
}

KERNEL copy_packed(T *__restrict__ y, View to, const T *__restrict__ x, View from, i64 n, int repeat) {
  constexpr int N = Pack<T>::N;
  for (i64 i = thread_index() * N; i < n; i += thread_count() * N) {
    T *q = y + offset_of(to, i);
    const T *p = x + offset_of(from, i);
    if (i + N <= n) {
      Pack<T> pack;
      if (repeat) {
        const T one = *p;
#pragma unroll
        for (int j = 0; j < N; j++) pack.x[j] = one;
      } else {
        pack = load_pack(p);
      }
      store_pack(q, pack);
    } else {
      // the end of a single row
      for (int j = 0; i + j < n; j++) q[j] = p[repeat ? 0 : j];
    }
  }
}

// o counts the other dimensions, whose strides are `to` and `from`; r has `rows` elements, 1 apart in x and to_row apart in
// y; c has `columns`, from_column apart in x and 1 in y.
KERNEL copy_transposed(T *__restrict__ y, View to, const T *__restrict__ x, View from, i64 rows, i64 columns, i64 to_row,
                       i64 from_column) {
  constexpr int TILE = 32;
  __shared__ T tile[TILE][TILE + 1];
  const i64 down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE;
  const i64 o = blockIdx.x / (down * across), at = blockIdx.x % (down * across);
  const i64 r0 = at / across * TILE, c0 = at % across * TILE;
  x += offset_of(from, o);
  y += offset_of(to, o);
  for (int k = threadIdx.y; k < TILE; k += blockDim.y) {
    const i64 r = r0 + threadIdx.x, c = c0 + k;
    if (r < rows && c < columns) tile[k][threadIdx.x] = x[r + c * from_column];
  }
  __syncthreads();
  for (int k = threadIdx.y; k < TILE; k += blockDim.y) {
    const i64 r = r0 + k, c = c0 + threadIdx.x;
    if (r < rows && c < columns) y[r * to_row + c] = tile[threadIdx.x][k];
  }
}
