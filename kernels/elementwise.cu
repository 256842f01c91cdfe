// Elementwise arithmetic over views of any strides (0 where broadcast), and sums in place.
//
//   binary        y = a + b, a - b, a * b, a / b                       backward in ops/elementwise.rs, by the same functions
//   unary         y = -x, e^x, ln x, sqrt x, x s(x), c x               with s(x) = 1 / (1 + e^-x)
//     backward    dx = -dy, dy y, dy / x, dy / (2 y), dy (s + x s (1 - s)), c dy: a binary function of dy and x or y, or a
//                 unary one of dy
//   add_assign    sum += term; the sum is of T (add_to_same) or f32 (add_to_float)
//
// n elements, y contiguous; inputs by views of y's shape. Launch: for_each(n), or, for *_packed, a thread for each 16 bytes
// of T, where every input is dense along its innermost dimension or repeats one element there (repeat_*). Results do not
// depend on which. binary and unary write all of y; add_* accumulate into sum. Nothing is saved.
#include "rows.cuh"

// As `Binary` and `Unary` in ops/cuda/elementwise.rs number them.
enum { ADD, SUB, MUL, DIV, SQRT_BACKWARD, SILU_BACKWARD };
enum { NEG, EXP, LN, SQRT, SILU, SCALE };

// Operations are spelt out where the compiler might contract them, so that every path rounds alike.
DEVICE float exact_sigmoid(float x) { return 1.0f / __fadd_rn(1.0f, expf(-x)); }
DEVICE float silu_slope(float x) {
  const float s = exact_sigmoid(x);
  return __fmaf_rn(__fmul_rn(x, s), __fsub_rn(1.0f, s), s);
}

template <typename F> DEVICE void with_binary(int op, F f) {
  switch (op) {
    case ADD: return f([](float a, float b) { return a + b; });
    case SUB: return f([](float a, float b) { return a - b; });
    case MUL: return f([](float a, float b) { return a * b; });
    case DIV: return f([](float a, float b) { return a / b; });
    case SQRT_BACKWARD: return f([](float dy, float y) { return dy / (y + y); });
    case SILU_BACKWARD: return f([](float dy, float x) { return dy * silu_slope(x); });
  }
}
template <typename F> DEVICE void with_unary(int op, float c, F f) {
  switch (op) {
    case NEG: return f([](float x) { return -x; });
    case EXP: return f([](float x) { return expf(x); });
    case LN: return f([](float x) { return logf(x); });
    case SQRT: return f([](float x) { return sqrtf(x); });
    case SILU: return f([](float x) { return x * exact_sigmoid(x); });
    case SCALE: return f([c](float x) { return c * x; });
  }
}

constexpr int N = Pack<T>::N;

// The run of a view that begins at its element i.
DEVICE void load_view(float (&v)[N], const T *x, const View &view, i64 i, i64 left, int repeat) {
  const T *p = x + offset_of(view, i);
  if (repeat) {
    const float one = to_f32(*p);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = one;
  } else {
    load_run(v, p, left, true);
  }
}

KERNEL binary(T *__restrict__ y, const T *__restrict__ a, const T *__restrict__ b, View va, View vb, i64 n, int op) {
  with_binary(op, [&](auto f) {
    for (i64 i = thread_index(); i < n; i += thread_count())
      y[i] = from_f32<T>(f(to_f32(a[offset_of(va, i)]), to_f32(b[offset_of(vb, i)])));
  });
}

KERNEL binary_packed(T *__restrict__ y, const T *__restrict__ a, const T *__restrict__ b, View va, View vb, i64 n, int op,
                     int repeat_a, int repeat_b) {
  with_binary(op, [&](auto f) {
    for (i64 i = thread_index() * N; i < n; i += thread_count() * N) {
      float u[N], v[N];
      load_view(u, a, va, i, n - i, repeat_a);
      load_view(v, b, vb, i, n - i, repeat_b);
#pragma unroll
      for (int j = 0; j < N; j++) u[j] = f(u[j], v[j]);
      store_run(y + i, u, n - i, true);
    }
  });
}

KERNEL unary(T *__restrict__ y, const T *__restrict__ x, View vx, i64 n, int op, float c) {
  with_unary(op, c, [&](auto f) {
    for (i64 i = thread_index(); i < n; i += thread_count()) y[i] = from_f32<T>(f(to_f32(x[offset_of(vx, i)])));
  });
}

KERNEL unary_packed(T *__restrict__ y, const T *__restrict__ x, View vx, i64 n, int op, float c, int repeat) {
  with_unary(op, c, [&](auto f) {
    for (i64 i = thread_index() * N; i < n; i += thread_count() * N) {
      float v[N];
      load_view(v, x, vx, i, n - i, repeat);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = f(v[j]);
      store_run(y + i, v, n - i, true);
    }
  });
}

template <typename D> DEVICE void add_to(D *sum, const T *term, const View &view, i64 n) {
  for (i64 i = thread_index(); i < n; i += thread_count()) sum[i] = from_f32<D>(to_f32(sum[i]) + to_f32(term[offset_of(view, i)]));
}
template <typename D> DEVICE void add_to_packed(D *sum, const T *term, const View &view, i64 n, int repeat) {
  for (i64 i = thread_index() * N; i < n; i += thread_count() * N) {
    float s[N], t[N];
    load_run(s, sum + i, n - i, true);
    load_view(t, term, view, i, n - i, repeat);
#pragma unroll
    for (int j = 0; j < N; j++) s[j] += t[j];
    store_run(sum + i, s, n - i, true);
  }
}

KERNEL add_to_same(T *__restrict__ sum, const T *__restrict__ term, View v, i64 n) { add_to(sum, term, v, n); }
KERNEL add_to_float(float *__restrict__ sum, const T *__restrict__ term, View v, i64 n) { add_to(sum, term, v, n); }
KERNEL add_to_same_packed(T *__restrict__ sum, const T *__restrict__ term, View v, i64 n, int repeat) {
  add_to_packed(sum, term, v, n, repeat);
}
KERNEL add_to_float_packed(float *__restrict__ sum, const T *__restrict__ term, View v, i64 n, int repeat) {
  add_to_packed(sum, term, v, n, repeat);
}
