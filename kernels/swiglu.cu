// SwiGLU's gate, elementwise over rows of `width` elements.
//
// forward:  y = silu(gate) up, silu(g) = g s, s = sigmoid(g) = 1 / (1 + e^-g).
// backward: s again from the gate; dgate = dy up s (1 + g (1 - s)), dup = dy g s; and y again, unless `y` is null.
//
// gate, up, dy: rows of any stride, dense inside (halves of one projection too). y, dgate, dup: [rows, width] contiguous,
// overwritten; forward's y and dgate may lie where gate does, dup where up does, and backward's y where dy does. Saved for backward: gate and
// up. A thread moves 16 bytes of each; tensors that lie in one piece come as one long row. Bytes that must move, for elements
// of s bytes: forward 3 s, backward 5 s each, or 6 s with y.
#include "rows.cuh"

constexpr int N = 16 / sizeof(T);
typedef Floats<T> F;

// Where 16 bytes number i lie: their row and column.
DEVICE void place(i64 i, i64 rows, i64 parts, i64 &row, i64 &column) {
  if (rows == 1) {
    row = 0;
    column = i * N;
  } else if ((u64)i <= 0xffffffffull && (u64)parts <= 0xffffffffull) {
    row = (u32)i / (u32)parts;
    column = (i64)((u32)i - (u32)row * (u32)parts) * N;
  } else {
    row = i / parts;
    column = (i - row * parts) * N;
  }
}

// `parts` is the number of 16 bytes in a row, rounded up.
KERNEL __launch_bounds__(256) swiglu(T *y, const T *gate, const T *up, View gv, View uv,
                                     i64 rows, i64 width, i64 parts) {
  begin_early();
  const i64 i = thread_index();
  if (i >= rows * parts) return;
  i64 row, column;
  place(i, rows, parts, row, column);
  const F g = unpacked<T>(load_words(gate + offset_of(gv, row), column, width));
  const F u = unpacked<T>(load_words(up + offset_of(uv, row), column, width));
  F out;
#pragma unroll
  for (int j = 0; j < N; j++) out.x[j] = g.x[j] * sigmoid(g.x[j]) * u.x[j];
  store_words(y + row * width, column, width, packed<T>(out));
}

KERNEL __launch_bounds__(256) swiglu_backward(T *dgate, T *dup, T *y, const T *gate, const T *up, const T *dy, View gv,
                                              View uv, View dyv, i64 rows, i64 width, i64 parts) {
  const i64 i = thread_index();
  if (i >= rows * parts) return;
  i64 row, column;
  place(i, rows, parts, row, column);
  const Words gw = load_words(gate + offset_of(gv, row), column, width);
  const Words uw = load_words(up + offset_of(uv, row), column, width);
  const Words dw = load_words(dy + offset_of(dyv, row), column, width);
  const F g = unpacked<T>(gw), u = unpacked<T>(uw), d = unpacked<T>(dw);
  F to_gate, to_up, out;
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float s = sigmoid(g.x[j]);
    out.x[j] = g.x[j] * s * u.x[j];
    to_up.x[j] = d.x[j] * g.x[j] * s;
    to_gate.x[j] = d.x[j] * u.x[j] * s * fmaf(g.x[j], 1.0f - s, 1.0f);
  }
  store_words(dgate + row * width, column, width, packed<T>(to_gate));
  store_words(dup + row * width, column, width, packed<T>(to_up));
  if (y) store_words(y + row * width, column, width, packed<T>(out));
}
