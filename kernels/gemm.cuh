// What the kernels of the matrix product share: arguments, the order of tiles, the epilogue, and the sum of a split one.
//
//   D[m, n] = A[m, k] B[k, n] (+ C[m, n]) (+ bias[n])        for each of a batch
//
// A module multiplies elements T into elements Out (FELID_OUT: T, or float for gradients and logits). Sums run in f32 over
// rising k and round once, when they are stored; C is added in f32 and may be D itself.
#pragma once
#include "common.cuh"

#ifndef FELID_OUT
#define FELID_OUT FELID_T
#endif
typedef FELID_OUT Out;

// Which dimension lies along memory: k (1), or m for A and n for B (0). `ld` is the stride of the other one.
#ifndef GEMM_A_K
#define GEMM_A_K 1
#endif
#ifndef GEMM_B_K
#define GEMM_B_K 1
#endif

// `Product` in ops/cuda/gemm_native.rs; strides count elements.
struct Product {
  const T *a, *b;
  const Out *c;         // null: nothing is added
  Out *d;
  const T *bias;        // null: none
  float *partial;       // [splits, batch, m, n] where k is split, else null
  i64 m, n, k;
  i64 lda, ldb, ldd;    // C lies as D does
  i64 batch_a, batch_b, batch_d;
  i64 split;            // how much of k each blockIdx.y takes: a multiple of 64, below 2^31
};

// ---- the order of tiles ----

// Blocks run roughly in order, so those that run together should share operands in L2: the grid walks bands of GROUP tile
// rows, down a band's column of tiles before the next column.
constexpr int GROUP = 16;
struct Place {
  i64 row, column;   // the tile's first
  i64 k_begin, k_end;
};
template <int BM, int BN> DEVICE Place place(const Product &p) {
  const u32 rows = (u32)((p.m + BM - 1) / BM), columns = (u32)((p.n + BN - 1) / BN);
  const u32 band = blockIdx.x / (GROUP * columns), inside = blockIdx.x - band * (GROUP * columns);
  const u32 height = min(rows - band * GROUP, (u32)GROUP);
  const u32 column = inside / height, row = band * GROUP + inside - column * height;
  const i64 begin = blockIdx.y * p.split;
  return {(i64)row * BM, (i64)column * BN, begin, min(begin + p.split, p.k)};
}

// ---- epilogue ----

// N neighbours of one row, `count` of them inside the matrix.
template <int N, typename E> DEVICE void load_row(float (&x)[N], const E *from, int count) {
  constexpr int P = Pack<E>::N < N ? Pack<E>::N : N;
  if (count == N && P == Pack<E>::N && aligned16(from)) {
#pragma unroll
    for (int i = 0; i < N; i += P) {
      const Pack<E> v = load_pack(from + i);
#pragma unroll
      for (int j = 0; j < P; j++) x[i + j] = to_f32(v.x[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = i < count ? to_f32(from[i]) : 0.0f;
  }
}
template <int N, typename E> DEVICE void store_row(E *to, const float (&x)[N], int count) {
  constexpr int P = Pack<E>::N < N ? Pack<E>::N : N;
  if (count == N && P == Pack<E>::N && aligned16(to)) {
#pragma unroll
    for (int i = 0; i < N; i += P) {
      Pack<E> v;
#pragma unroll
      for (int j = 0; j < P; j++) v.x[j] = from_f32<E>(x[i + j]);
      store_pack(to + i, v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) if (i < count) to[i] = from_f32<E>(x[i]);
  }
}
// Adds what is added and stores N neighbours of a row, from `column` on.
template <int N> DEVICE void finish(const Product &p, i64 row, i64 column, i64 batch, float (&x)[N], int count) {
  const i64 at = batch * p.batch_d + row * p.ldd + column;
  float y[N];
  if (p.bias) {
    load_row(y, p.bias + column, count);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += y[i];
  }
  if (p.c) {
    load_row(y, p.c + at, count);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += y[i];
  }
  store_row(p.d + at, x, count);
}
// The same for a tile's sums, which are partial ones where k is split.
template <int N> DEVICE void emit(const Product &p, i64 row, i64 column, float (&x)[N]) {
  if (row >= p.m || column >= p.n) return;
  const int count = (int)min(p.n - column, (i64)N);
  const i64 batch = blockIdx.z;
  if (p.partial) {
    const i64 slab = (i64)blockIdx.y * gridDim.z + batch;
    store_row(p.partial + (slab * p.m + row) * p.n + column, x, count);
  } else {
    finish(p, row, column, batch, x, count);
  }
}

// Adds the partial sums, in the order of k. One thread an element of D; grid (x, 1, batch).
KERNEL gemm_sum(const Product p, i64 splits) {
  const i64 slab = p.m * p.n;
  const i64 batch = blockIdx.z;
  for (i64 i = thread_index(); i < slab; i += thread_count()) {
    float x[1] = {0.0f};
    for (i64 s = 0; s < splits; s++) x[0] += p.partial[(s * gridDim.z + batch) * slab + i];
    const i64 row = i / p.n;
    finish(p, row, i - row * p.n, batch, x, 1);
  }
}
