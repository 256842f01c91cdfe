// Change of float dtype: y[i] = x[i], rounded to nearest even. T is x's type; y's is in the entry point's name.
// Contiguous both; a thread moves 8 elements. Writes all of y.
#include "common.cuh"

template <typename D> DEVICE void cast_to(D *__restrict__ y, const T *__restrict__ x, i64 n) {
  constexpr int N = 8;
  const i64 i = thread_index() * N;
  if (i + N <= n && aligned16(x) && aligned16(y)) {
    alignas(16) T in[N];
    alignas(16) D out[N];
#pragma unroll
    for (int p = 0; p < N; p += Pack<T>::N) *reinterpret_cast<Pack<T> *>(in + p) = load_pack(x + i + p);
#pragma unroll
    for (int j = 0; j < N; j++) out[j] = from_f32<D>(to_f32(in[j]));
#pragma unroll
    for (int p = 0; p < N; p += Pack<D>::N) store_pack(y + i + p, *reinterpret_cast<Pack<D> *>(out + p));
  } else {
    for (i64 j = i; j < i + N && j < n; j++) y[j] = from_f32<D>(to_f32(x[j]));
  }
}

KERNEL cast_to_float(float *y, const T *x, i64 n) { cast_to(y, x, n); }
KERNEL cast_to_bf16(bf16 *y, const T *x, i64 n) { cast_to(y, x, n); }
KERNEL cast_to_f16(f16 *y, const T *x, i64 n) { cast_to(y, x, n); }
