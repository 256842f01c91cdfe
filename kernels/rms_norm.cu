// RMSNorm over rows of D elements, alone or after a residual add.
//
// forward:  h = x + residual (rounded to T; without a residual h is x), rstd = 1 / sqrt(mean(h^2) + eps), y = h rstd w.
// backward: with g = dy w and m = mean(g h) rstd^2, dx = rstd (g - h m) + dh; dw = sum over rows of dy h rstd.
//
// x, residual, dy: rows of any stride, dense inside. y, h, dx, dh: [rows, D] contiguous. w [D]. rstd [rows], f32.
// Saved for backward: h (or x) and rstd. Overwrites y, h, rstd, dx. dw is kept in f32 or T and accumulates where told to.
//
// Bytes that must move, for elements of s bytes: forward 2 s D a row (4 s D with a residual), backward 3 s D (4 s D with dh).
//
// Forward: `1 << shift` lanes of a warp hold a row in registers, PACKS times 16 bytes each (a row of 64 bf16 has 8 lanes,
// one of 2048 a warp); longer rows have a block each and are read a second time, from cache.
// Backward: blocks stay and walk over rows, keeping their columns of dw in registers: a row of at most 32 packs has
// lanes of a warp, a longer one a block, which loads the next row while it sums this one. Each block writes one row of `partial`
// [blocks, D], and a second kernel sums those by column: one order, whatever the scheduling.
#include "common.cuh"

constexpr int N = 16 / sizeof(T);
typedef Floats<T> F;

// Where sums take several terms they are fused by name (fmaf), so that every path rounds alike.

// ---- forward ----

struct Forward {
  T *y, *h;
  float *rstd;
  const T *x, *residual, *w;
  i64 rows, d;
  float eps;
};

DEVICE Words sum_of(const Words &a, const Words &b) {
  F x = unpacked<T>(a), y = unpacked<T>(b);
#pragma unroll
  for (int j = 0; j < N; j++) x.x[j] += y.x[j];
  return packed<T>(x);
}
DEVICE float add_squares(float sum, const Words &v) {
  const F x = unpacked<T>(v);
#pragma unroll
  for (int j = 0; j < N; j++) sum = fmaf(x.x[j], x.x[j], sum);
  return sum;
}
DEVICE Words normed(const Words &v, float rstd, const Words &weight) {
  F x = unpacked<T>(v);
  const F w = unpacked<T>(weight);
#pragma unroll
  for (int j = 0; j < N; j++) x.x[j] = x.x[j] * rstd * w.x[j];
  return packed<T>(x);
}

template <int PACKS> DEVICE void forward_row(const Forward &f, const View &xv, const View &rv, int shift) {
  const int d = (int)f.d, lanes = 1 << shift, lane = threadIdx.x & (lanes - 1);
  const i64 at = thread_index() >> shift;
  const bool live = at < f.rows;
  const i64 row = live ? at : f.rows - 1; // whole warps take part in sums
  const T *x = f.x + offset_of(xv, row);
  Words v[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; p++) v[p] = load_words(x, (p * lanes + lane) * N, d);
  if (f.residual) {
    const T *residual = f.residual + offset_of(rv, row);
    Words r[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) r[p] = load_words(residual, (p * lanes + lane) * N, d);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      v[p] = sum_of(v[p], r[p]);
      if (live) store_words(f.h + row * d, (p * lanes + lane) * N, d, v[p]);
    }
  }
  Words w[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; p++) w[p] = load_words(f.w, (p * lanes + lane) * N, d);
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PACKS; p++) sum = add_squares(sum, v[p]);
  const float rstd = 1.0f / sqrtf(lanes_sum(sum, lanes) / d + f.eps);
  if (!live) return;
  if (lane == 0) f.rstd[row] = rstd;
#pragma unroll
  for (int p = 0; p < PACKS; p++) store_words(f.y + row * d, (p * lanes + lane) * N, d, normed(v[p], rstd, w[p]));
}

#define FORWARD(NAME, PACKS)                                                                                             \
  KERNEL __launch_bounds__(128) NAME(T *y, T *h, float *rstd, const T *x, const T *residual, const T *w, View xv,        \
                                     View rv, i64 rows, i64 d, float eps, i64 shift) {                                   \
    begin_early();                                                                                                       \
    const Forward f{y, h, rstd, x, residual, w, rows, d, eps};                                                           \
    forward_row<PACKS>(f, xv, rv, (int)shift);                                                                           \
  }
FORWARD(rms_norm_1, 1)
FORWARD(rms_norm_2, 2)
FORWARD(rms_norm_4, 4)
FORWARD(rms_norm_8, 8)

// A block a row, of any length.
DEVICE void forward_long(const Forward &f, const View &xv, const View &rv, float *shared) {
  const i64 row = blockIdx.x, first = (i64)threadIdx.x * N, step = (i64)blockDim.x * N;
  const T *x = f.x + offset_of(xv, row);
  const T *residual = f.residual ? f.residual + offset_of(rv, row) : nullptr;
  T *h = f.h + row * f.d, *y = f.y + row * f.d;
  float sum = 0.0f;
  for (i64 c = first; c < f.d; c += step) {
    Words v = load_words(x, c, f.d);
    if (residual) {
      v = sum_of(v, load_words(residual, c, f.d));
      store_words(h, c, f.d, v);
    }
    sum = add_squares(sum, v);
  }
  const float rstd = 1.0f / sqrtf(block_sum(sum, shared) / f.d + f.eps);
  if (threadIdx.x == 0) f.rstd[row] = rstd;
  const T *again = residual ? h : x; // a thread reads what it wrote itself
  for (i64 c = first; c < f.d; c += step)
    store_words(y, c, f.d, normed(load_words(again, c, f.d), rstd, load_words(f.w, c, f.d)));
}
KERNEL __launch_bounds__(512) rms_norm_long(T *y, T *h, float *rstd, const T *x, const T *residual, const T *w, View xv,
                                            View rv, i64 rows, i64 d, float eps) {
  begin_early();
  __shared__ float shared[32];
  const Forward f{y, h, rstd, x, residual, w, rows, d, eps};
  forward_long(f, xv, rv, shared);
}

// ---- backward ----

struct Backward {
  T *dx;
  float *partial;
  const T *x, *w;
  const float *rstd;
  const T *dy, *dh;
  i64 rows, d;
};
// 16 bytes of a row: its own, and what flows back to it.
struct Part {
  Words x, dy, dh;
};

DEVICE Part load_part(const T *x, const T *dy, const T *dh, i64 column, i64 d) {
  Part r = {};
  r.x = load_words(x, column, d);
  r.dy = load_words(dy, column, d);
  if (dh) r.dh = load_words(dh, column, d);
  return r;
}
// sum + dot(g, x)
DEVICE float add_gx(float sum, const Part &r, const Words &weight) {
  const F x = unpacked<T>(r.x), dy = unpacked<T>(r.dy), w = unpacked<T>(weight);
#pragma unroll
  for (int j = 0; j < N; j++) sum = fmaf(dy.x[j] * w.x[j], x.x[j], sum);
  return sum;
}
DEVICE Words row_gradient(const Part &r, const Words &weight, float rstd, float m) {
  const F x = unpacked<T>(r.x), dy = unpacked<T>(r.dy), dh = unpacked<T>(r.dh), w = unpacked<T>(weight);
  F dx;
#pragma unroll
  for (int j = 0; j < N; j++) dx.x[j] = fmaf(rstd, fmaf(-x.x[j], m, dy.x[j] * w.x[j]), dh.x[j]);
  return packed<T>(dx);
}
DEVICE void add_weight_gradient(float *dw, const Part &r, float rstd) {
  const F x = unpacked<T>(r.x), dy = unpacked<T>(r.dy);
#pragma unroll
  for (int j = 0; j < N; j++) dw[j] = fmaf(dy.x[j] * x.x[j], rstd, dw[j]);
}

// Rows of at most 32 packs: `1 << shift` lanes have a row, 16 bytes each. Blocks of 256 threads.
DEVICE void backward_short(const Backward &b, const View &xv, const View &dyv, int shift, float (*sums)[32 * N]) {
  constexpr int UNROLL = 2; // rows of a thread whose loads are under way together
  const int d = (int)b.d, lanes = 1 << shift, lane = threadIdx.x & (lanes - 1);
  const int groups = blockDim.x >> shift, group = threadIdx.x >> shift, column = lane * N;
  const Words w = load_words(b.w, column, d);
  float dw[N] = {};
  for (i64 base = (i64)blockIdx.x * groups * UNROLL; base < b.rows; base += (i64)gridDim.x * groups * UNROLL) {
    Part r[UNROLL];
    float rstd[UNROLL];
    i64 at[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      // past the end, the last row is read, and counts as nothing
      at[u] = base + u * groups + group;
      const i64 row = at[u] < b.rows ? at[u] : b.rows - 1;
      const T *dh = b.dh ? b.dh + row * d : nullptr;
      r[u] = load_part(b.x + offset_of(xv, row), b.dy + offset_of(dyv, row), dh, column, d);
      rstd[u] = b.rstd[row];
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const float m = lanes_sum(add_gx(0.0f, r[u], w), lanes) / d * rstd[u] * rstd[u];
      if (at[u] < b.rows) {
        add_weight_gradient(dw, r[u], rstd[u]);
        store_words(b.dx + at[u] * d, column, d, row_gradient(r[u], w, rstd[u], m));
      }
    }
  }
  // over the groups of a warp, then over warps
#pragma unroll
  for (int j = 0; j < N; j++)
    for (int o = lanes; o < 32; o <<= 1) dw[j] += __shfl_xor_sync(0xffffffffu, dw[j], o);
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if ((threadIdx.x & 31) < lanes)
#pragma unroll
    for (int j = 0; j < N; j++) sums[warp][column + j] = dw[j];
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < warps; i++) sum += sums[i][c];
    b.partial[(i64)blockIdx.x * d + c] = sum;
  }
}
KERNEL __launch_bounds__(256, 3)
    rms_norm_backward_short(T *dx, float *partial, const T *x, const T *w, const float *rstd, const T *dy, const T *dh,
                            View xv, View dyv, i64 rows, i64 d, i64 shift) {
  __shared__ float sums[8][32 * N];
  const Backward b{dx, partial, x, w, rstd, dy, dh, rows, d};
  backward_short(b, xv, dyv, (int)shift, sums);
}

// A block a row, PACKS times 16 bytes a thread: PACKS * blockDim.x * N >= D. `shared` is used in turns, so that one barrier
// a row is enough.
template <int PACKS>
DEVICE void backward_block(const Backward &b, const View &xv, const View &dyv, float (*shared)[16]) {
  const int d = (int)b.d, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  auto column = [&](int p) { return (int)(p * blockDim.x + threadIdx.x) * N; };
  Words w[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; p++) w[p] = load_words(b.w, column(p), d);
  float dw[PACKS * N] = {};
  Part next[PACKS];
  float next_rstd = 0.0f;
  auto load = [&](i64 row) {
    const T *x = b.x + offset_of(xv, row), *dy = b.dy + offset_of(dyv, row), *dh = b.dh ? b.dh + row * d : nullptr;
#pragma unroll
    for (int p = 0; p < PACKS; p++) next[p] = load_part(x, dy, dh, column(p), d);
    next_rstd = b.rstd[row];
  };
  i64 row = blockIdx.x;
  if (row < b.rows) load(row);
  for (int turn = 0; row < b.rows; row += gridDim.x, turn ^= 1) {
    Part r[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) r[p] = next[p];
    const float rstd = next_rstd;
    if (row + gridDim.x < b.rows) load(row + gridDim.x);
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) sum = add_gx(sum, r[p], w[p]);
    sum = warp_sum(sum);
    if (lane == 0) shared[turn][warp] = sum;
    __syncthreads();
    sum = warp_sum(lane < warps ? shared[turn][lane] : 0.0f);
    const float m = sum / d * rstd * rstd;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      add_weight_gradient(dw + p * N, r[p], rstd);
      store_words(b.dx + row * d, column(p), d, row_gradient(r[p], w[p], rstd, m));
    }
  }
#pragma unroll
  for (int p = 0; p < PACKS; p++)
#pragma unroll
    for (int j = 0; j < N; j++)
      if (column(p) + j < d) b.partial[(i64)blockIdx.x * d + column(p) + j] = dw[p * N + j];
}

#define BACKWARD(NAME, PACKS, ...)                                                                                       \
  KERNEL __launch_bounds__(__VA_ARGS__)                                                                                  \
      NAME(T *dx, float *partial, const T *x, const T *w, const float *rstd, const T *dy, const T *dh, View xv,          \
           View dyv, i64 rows, i64 d) {                                                                                  \
    __shared__ float shared[2][16];                                                                                      \
    const Backward b{dx, partial, x, w, rstd, dy, dh, rows, d};                                                          \
    backward_block<PACKS>(b, xv, dyv, shared);                                                                           \
  }
BACKWARD(rms_norm_backward_1, 1, 256, 3)
BACKWARD(rms_norm_backward_2, 2, 512)

// A block a row, of any length: its row of `partial` serves as the sum.
DEVICE void backward_long(const Backward &b, const View &xv, const View &dyv, float *shared) {
  float *sums = b.partial + (i64)blockIdx.x * b.d;
  const i64 d = b.d, first = (i64)threadIdx.x * N, step = (i64)blockDim.x * N;
  for (i64 row = blockIdx.x; row < b.rows; row += gridDim.x) {
    const T *x = b.x + offset_of(xv, row), *dy = b.dy + offset_of(dyv, row), *dh = b.dh ? b.dh + row * d : nullptr;
    float sum = 0.0f;
    for (i64 c = first; c < d; c += step)
      sum = add_gx(sum, load_part(x, dy, nullptr, c, d), load_words(b.w, c, d));
    const float rstd = b.rstd[row], m = block_sum(sum, shared) / d * rstd * rstd;
    for (i64 c = first; c < d; c += step) {
      const Part r = load_part(x, dy, dh, c, d);
      store_words(b.dx + row * d, c, d, row_gradient(r, load_words(b.w, c, d), rstd, m));
      float dw[N];
#pragma unroll
      for (int j = 0; j < N; j++) dw[j] = row != blockIdx.x && c + j < d ? sums[c + j] : 0.0f;
      add_weight_gradient(dw, r, rstd);
#pragma unroll
      for (int j = 0; j < N; j++)
        if (c + j < d) sums[c + j] = dw[j];
    }
  }
}
KERNEL __launch_bounds__(512) rms_norm_backward_long(T *dx, float *partial, const T *x, const T *w, const float *rstd,
                                                     const T *dy, const T *dh, View xv, View dyv, i64 rows, i64 d) {
  __shared__ float shared[32];
  const Backward b{dx, partial, x, w, rstd, dy, dh, rows, d};
  backward_long(b, xv, dyv, shared);
}

// dw[c] = (add ? dw[c] : 0) + sum over `parts` rows of partial [parts, D]; dw is f32 if `wide`, else T. Blocks of 32 columns
// and 16 threads for each.
KERNEL rms_norm_weight(void *dw, const float *partial, i64 parts, i64 d, i64 wide, i64 add) {
  __shared__ float sums[16][33];
  const i64 c = (i64)blockIdx.x * 32 + threadIdx.x;
  float sum = 0.0f;
  if (c < d) {
#pragma unroll 4
    for (i64 i = threadIdx.y; i < parts; i += 16) sum += partial[i * d + c];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= d) return;
  float total = 0.0f;
  for (int i = 0; i < 16; i++) total += sums[i][threadIdx.x];
  if (wide) {
    float *to = (float *)dw + c;
    *to = add ? *to + total : total;
  } else {
    T *to = (T *)dw + c;
    *to = from_f32<T>(add ? to_f32(*to) + total : total);
  }
}
