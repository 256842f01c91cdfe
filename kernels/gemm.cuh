// What the kernels of the matrix product share: arguments, the order of tiles, the epilogue, and the sum of a split one.
//
//   D[m, n] = A[m, k] B[k, n] (+ C[m, n]) (+ bias[n])        for each of a batch
//
// A module multiplies elements T. GEMM says how they lie, in bits: 1, k runs along memory in A (else m does); 2, k runs along
// memory in B (else n does); 4, D holds floats whatever T is (gradients, logits). Sums run in f32 over rising k and round
// once, when they are stored; C is added in f32 and may be D itself.
#pragma once
#include "common.cuh"

#ifndef GEMM
#define GEMM 3
#endif
constexpr bool A_K = GEMM & 1, B_K = GEMM & 2;
#if GEMM & 4
typedef float Out;
#else
typedef T Out;
#endif

// The words that src/ops/cuda/gemm_native.rs passes; strides count elements.
struct Product {
  const T *a, *b;
  const Out *c;         // null: nothing is added
  Out *d;
  const T *bias;        // null: none
  float *partial;       // [splits, batches, m, n] where k is split, else null
  i64 m, n, k;
  i64 lda, ldb, ldd;    // from one line of memory to the next; C lies as D does
  i64 batch_a, batch_b, batch_d;
  i64 batches;
  i64 splits, depth;    // k is summed in `splits` parts of `depth`, a multiple of 64 below 2^31
};

// ---- the order of tiles ----

// Blocks run roughly in order, and those that run together should share operands in L2: tiles are counted through bands of
// BAND rows of tiles, down a band's column of tiles before the next column.
struct Place {
  i64 row, column;   // the tile's first
  i64 k_begin, k_end;
  i64 split, batch;
};
template <int BM, int BN, int BAND> DEVICE Place place(const Product &p, u32 tile, i64 split, i64 batch) {
  const u32 rows = (u32)((p.m + BM - 1) / BM), columns = (u32)((p.n + BN - 1) / BN);
  const u32 band = tile / (BAND * columns), inside = tile - band * (BAND * columns);
  const u32 height = min(rows - band * BAND, (u32)BAND);
  const u32 column = inside / height, row = band * BAND + inside - column * height;
  const i64 begin = split * p.depth;
  return {(i64)row * BM, (i64)column * BN, begin, min(begin + p.depth, p.k), split, batch};
}

// ---- epilogue ----

// N neighbours of one row, `count` of them inside the matrix: up to 16 bytes an access.
template <typename E, int N> struct alignas(N * sizeof(E)) Chunk { E x[N]; };
template <int N, typename E> DEVICE void load_row(float (&x)[N], const E *from, int count) {
  constexpr int P = N < Pack<E>::N ? N : Pack<E>::N;
  if (count == N && reinterpret_cast<u64>(from) % sizeof(Chunk<E, P>) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += P) {
      const Chunk<E, P> v = *reinterpret_cast<const Chunk<E, P> *>(from + i);
#pragma unroll
      for (int j = 0; j < P; j++) x[i + j] = to_f32(v.x[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = i < count ? to_f32(from[i]) : 0.0f;
  }
}
template <int N, typename E> DEVICE void store_row(E *to, const float (&x)[N], int count) {
  constexpr int P = N < Pack<E>::N ? N : Pack<E>::N;
  if (count == N && reinterpret_cast<u64>(to) % sizeof(Chunk<E, P>) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += P) {
      Chunk<E, P> v;
#pragma unroll
      for (int j = 0; j < P; j++) v.x[j] = from_f32<E>(x[i + j]);
      *reinterpret_cast<Chunk<E, P> *>(to + i) = v;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) if (i < count) to[i] = from_f32<E>(x[i]);
  }
}
// Adds bias and C to M rows of N sums, rows `step` apart, and stores them; stores them as they are where k is split. C may be
// D: all that is read is read before anything is stored.
template <int M, int N> DEVICE void emit(const Product &p, const Place &tile, i64 row, int step, i64 column, float (&x)[M][N]) {
  const int count = (int)max((i64)0, min(p.n - column, (i64)N));
  const bool partial = p.partial;
  const i64 at = tile.batch * p.batch_d + row * p.ldd + column;
  if (!partial && (p.bias || p.c)) {
    float y[M][N], z[N];
    if (p.bias) load_row(z, p.bias + column, count);
#pragma unroll
    for (int i = 0; i < M; i++)
      if (p.c) load_row(y[i], p.c + at + i * step * p.ldd, row + i * step < p.m ? count : 0);
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int j = 0; j < N; j++) x[i][j] += (p.bias ? z[j] : 0.0f) + (p.c ? y[i][j] : 0.0f);
  }
  const i64 slab = (tile.split * p.batches + tile.batch) * p.m;
#pragma unroll
  for (int i = 0; i < M; i++) {
    const i64 r = row + i * step;
    if (r >= p.m) continue;
    if (partial) store_row(p.partial + (slab + r) * p.n + column, x[i], count);
    else store_row(p.d + at + i * step * p.ldd, x[i], count);
  }
}

// Adds the partial sums, in the order of k. One thread an element of D; grid (any, 1, batches).
DEVICE void sum_parts(const Product &p) {
  const i64 matrix = p.m * p.n, batch = blockIdx.z;
  for (i64 i = thread_index(); i < matrix; i += thread_count()) {
    float x = 0.0f;
    for (i64 s = 0; s < p.splits; s++) x += p.partial[(s * p.batches + batch) * matrix + i];
    const i64 row = i / p.n, column = i - row * p.n, at = batch * p.batch_d + row * p.ldd + column;
    if (p.bias) x += to_f32(p.bias[column]);
    if (p.c) x += to_f32(p.c[at]);
    p.d[at] = from_f32<Out>(x);
  }
}
