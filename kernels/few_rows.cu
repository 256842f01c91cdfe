// Linear maps of a few rows, with the norm before and the gate or the residual add behind: the weights are read once, and
// that is all the cost.
//
//   n = x, or with g (the weight of RMSNorm) n = x g rstd, rstd = 1 / sqrt(mean(x^2) + eps)
//   few_rows         y[r, c] = sum over k of n[r, k] w[c, k], + bias[c] + residual[r, c]
//   few_rows_gated   y[r, c] = silu(sum of n[r, k] w[c, k]) (sum of n[r, k] up[c, k]), silu(a) = a / (1 + e^-a)
//
// x [rows, K], w and up [C, K], residual and y [rows, C], each by a row stride, rows dense; g [K], bias [C]; g, bias and
// residual may be null, and y may lie where the residual does. Sums are in f32, and y is rounded once: n is not rounded.
//
// A warp takes COLUMNS columns (or one of w and the same of up) for ROWS rows of x, of which the first `rows` are there: lane l
// has elements N l, N l + 1, .. of every 32 N, 16 bytes at once, AHEAD loads of w on their way. rstd is a factor of the whole
// sum, so the sum of squares is taken on the way. x comes from the first-level cache: every warp reads all of it. A sum's
// order depends on K alone: a row's result is the same in every bit whatever rows are beside it.
//
// Weights do not change while kernels run that are submitted one behind the other, so the first of them are asked for before
// the kernel before this one is done (`await_kernel_before`).
//
// Launch: 128 threads, a warp for each COLUMNS columns (gated: each column); *_1, _2, _4, _8 by ROWS. PACKED=1: rows of all
// begin and end on 16 bytes.
#include "rows.cuh"

constexpr int N = 16 / sizeof(T), WARPS = 4;
typedef Floats<T> F;

// 64-bit fields only (`product` in src/ops/cuda/few_rows.rs).
struct Few {
  i64 rows, k, cols, x_row, w_row, up_row, residual_row, y_row, eps_bits;
};

// Weights are read by one warp and once: they need no place in the first-level cache.
DEVICE Words load_weights(const T *row, i64 at, i64 k) {
#if PACKED && defined(__CUDA_ARCH__)
  Words v = {};
  if (at < k)
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
        : "l"(row + at));
  return v;
#else
  return load_words(row, at, k);
#endif
}

template <int ROWS, bool GATED>
DEVICE void product(T *y, const T *x, const T *g, const T *w, const T *up, const T *bias, const T *residual, const Few &f) {
  constexpr int COLUMNS = GATED || ROWS > 2 ? 2 : 1, AHEAD = 8 / COLUMNS, RUN = 32 * N;
  const int lane = threadIdx.x & 31;
  const i64 warp = (i64)blockIdx.x * WARPS + (threadIdx.x >> 5), first = GATED ? warp : warp * COLUMNS;
  launch_dependents();
  const i64 k = f.k, last = f.cols - 1;
  const T *columns[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    const i64 at = GATED ? first : first + c;
    columns[c] = (GATED && c ? up : w) + (at < last ? at : last) * (GATED && c ? f.up_row : f.w_row);
  }
  Words ahead[AHEAD][COLUMNS];
#pragma unroll
  for (int u = 0; u < AHEAD; u++)
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) ahead[u][c] = load_weights(columns[c], u * RUN + lane * N, k);
  await_kernel_before();
  if (first > last) return;

  // what this lane adds to in the end: row and column of its result
  constexpr int OUT = GATED ? 1 : COLUMNS;
  const int own = lane / OUT;
  const i64 column = first + lane % OUT;
  const bool writes = own < ROWS && own < f.rows && column <= last;
  float start = 0.0f;
  if (writes && bias) start = to_f32(bias[column]);
  if (writes && residual) start += to_f32(residual[own * f.residual_row + column]);

  const T *rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) rows[r] = x + (r < f.rows ? r : f.rows - 1) * f.x_row;
  float sums[ROWS][COLUMNS] = {}, squares[ROWS] = {};
#pragma unroll 1
  for (i64 from = 0; from < k; from += AHEAD * RUN) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const i64 at = from + u * RUN + lane * N;
      F weights[COLUMNS], norm;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        weights[c] = unpacked<T>(ahead[u][c]);
        ahead[u][c] = load_weights(columns[c], at + AHEAD * RUN, k);
      }
      if (g) norm = unpacked<T>(load_words(g, at, k));
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        F n = unpacked<T>(load_words(rows[r], at, k));
        if (g) {
#pragma unroll
          for (int j = 0; j < N; j++) {
            squares[r] = fmaf(n.x[j], n.x[j], squares[r]);
            n.x[j] = __fmul_rn(n.x[j], norm.x[j]);
          }
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
#pragma unroll
          for (int j = 0; j < N; j++) sums[r][c] = fmaf(n.x[j], weights[c].x[j], sums[r][c]);
      }
    }
  }

  float mine = 0.0f, gated = 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float rstd = g ? 1.0f / sqrtf(warp_sum(squares[r]) / (float)k + __uint_as_float((u32)f.eps_bits)) : 1.0f;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const float sum = __fmul_rn(warp_sum(sums[r][c]), rstd);
      if (own != r) continue;
      if (GATED && c) gated = sum;
      else if (lane % OUT == (GATED ? 0 : c)) mine = sum;
    }
  }
  if (!writes) return;
  if constexpr (GATED) mine = mine * sigmoid(mine) * gated;
  else mine = __fadd_rn(mine, start);
  y[own * f.y_row + column] = from_f32<T>(mine);
}

#define PARAMETERS T *y, const T *x, const T *g, const T *w, const T *up, const T *bias, const T *residual, Few f
#define KERNELS(ROWS, BLOCKS)                                                                                         \
  KERNEL __launch_bounds__(32 * WARPS, BLOCKS) few_rows_##ROWS(PARAMETERS) {                                            \
    product<ROWS, false>(y, x, g, w, up, bias, residual, f);                                                            \
  }                                                                                                                     \
  KERNEL __launch_bounds__(32 * WARPS, BLOCKS) few_rows_gated_##ROWS(PARAMETERS) {                                      \
    product<ROWS, true>(y, x, g, w, up, bias, residual, f);                                                             \
  }
KERNELS(1, 5)
KERNELS(2, 5)
KERNELS(4, 4)
KERNELS(8, 3)
