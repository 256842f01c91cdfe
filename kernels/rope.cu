// Rotary position embedding, rotate-half.
//
// forward:  for i < n/2 at the row's position: y[i] = x[i] cos - x[i + n/2] sin, y[i + n/2] = x[i + n/2] cos + x[i] sin;
//           elements from n on pass unchanged.
// backward: the same with -sin.
//
// x: rows of d elements of any stride, dense inside. y: [rows, d] contiguous, overwritten. Row r is at position
// (r / repeat) mod length; its cosines and sines are row index[position] of `table` [distinct positions, n], f32: n/2
// cosines, then n/2 sines. Saves nothing: backward needs the table alone.
//
// A thread turns 16 bytes of each half (rope_packed) or one pair (rope_single), or passes as many elements of the rest.
// Bytes that must move, for elements of s bytes: 2 s d a row. The table stays in cache: heads share positions.
#include "common.cuh"

constexpr int N = 16 / sizeof(T);
typedef Floats<T> F;

// i = q * n + r; returns q, in 32 bits where they hold it.
DEVICE i64 divided(i64 i, i64 n, i64 &r) {
  if ((u64)i <= 0xffffffffull && (u64)n <= 0xffffffffull) {
    const u32 q = (u32)i / (u32)n;
    r = (u32)i - q * (u32)n;
    return q;
  }
  const i64 q = i / n;
  r = i - q * n;
  return q;
}

struct Rope {
  const float *table;
  const i64 *index;
  i64 n, length, repeat;
};
DEVICE const float *angles_of(const Rope &r, i64 row) {
  i64 rest, position;
  divided(divided(row, r.repeat, rest), r.length, position);
  return r.table + r.index[position] * r.n;
}

// n/2 and d are multiples of N, and every row begins on 16 bytes.
KERNEL __launch_bounds__(256) rope_packed(T *__restrict__ y, const T *__restrict__ x, View xv, const float *table,
                                          const i64 *index, i64 rows, i64 d, i64 n, i64 length, i64 repeat, float sign) {
  const i64 half = n / 2, turning = half / N, items = turning + (d - n) / N;
  i64 item;
  const i64 row = divided(thread_index(), items, item);
  if (row >= rows) return;
  x += offset_of(xv, row);
  y += row * d;
  if (item >= turning) {
    const i64 at = n + (item - turning) * N;
    *reinterpret_cast<Words *>(y + at) = *reinterpret_cast<const Words *>(x + at);
    return;
  }
  const i64 at = item * N;
  const Words w1 = *reinterpret_cast<const Words *>(x + at), w2 = *reinterpret_cast<const Words *>(x + half + at);
  const float *angles = angles_of(Rope{table, index, n, length, repeat}, row) + at;
  const F a = unpacked<T>(w1), b = unpacked<T>(w2);
  F y1, y2;
#pragma unroll
  for (int j = 0; j < N; j += 4) { // half is a multiple of 4, so the table's runs begin on 16 bytes
    const Floats<float> c = unpacked<float>(*reinterpret_cast<const Words *>(angles + j));
    const Floats<float> s = unpacked<float>(*reinterpret_cast<const Words *>(angles + half + j));
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float sine = sign * s.x[k];
      y1.x[j + k] = fmaf(a.x[j + k], c.x[k], -(b.x[j + k] * sine));
      y2.x[j + k] = fmaf(b.x[j + k], c.x[k], a.x[j + k] * sine);
    }
  }
  *reinterpret_cast<Words *>(y + at) = packed<T>(y1);
  *reinterpret_cast<Words *>(y + half + at) = packed<T>(y2);
}

KERNEL __launch_bounds__(256) rope_single(T *__restrict__ y, const T *__restrict__ x, View xv, const float *table,
                                          const i64 *index, i64 rows, i64 d, i64 n, i64 length, i64 repeat, float sign) {
  const i64 half = n / 2, items = d - half;
  i64 i;
  const i64 row = divided(thread_index(), items, i);
  if (row >= rows) return;
  x += offset_of(xv, row);
  y += row * d;
  if (i >= half) {
    y[half + i] = x[half + i];
    return;
  }
  const float *angles = angles_of(Rope{table, index, n, length, repeat}, row) + i;
  const float a = to_f32(x[i]), b = to_f32(x[half + i]), c = angles[0], sine = sign * angles[half];
  y[i] = from_f32<T>(fmaf(a, c, -(b * sine)));
  y[half + i] = from_f32<T>(fmaf(b, c, a * sine));
}
