// Cross-entropy of logits z [rows, V] against labels, one a row (-1: the row does not count).
//
// forward:  lse = m + ln sum e^(z - m), m = max z; loss of a row = lse - z[label]; the mean is over rows that count.
// backward: dz = (e^(z - lse) - onehot(label)) dloss / count; 0 in rows that do not count.
//
// z: rows of any stride, dense inside. dz: [rows, V] contiguous, overwritten. lse, losses: [rows] f32, 0 where the row does
// not count. Saved for backward: z and lse. A block has a row. Every thread keeps a running maximum and a sum relative to
// it (rescaled with every 64 bytes that it takes), so forward reads each logit once.
//
// cross_entropy_in_place does both at once for logits that nobody else needs: they become the gradient of
// scale * (sum of the rows' losses). The row waits in shared memory between its two uses where it fits (`staged`), so it is
// read once and written once.
//
// Bytes that must move, for elements of s bytes: forward s V a row, backward and in place 2 s V. Next to that bound, where
// T has 16 bits, is that of exponentials: one for each logit, at 16 a cycle of a multiprocessor.
#include "common.cuh"

constexpr int N = 16 / sizeof(T);
typedef Floats<T> F;

// e^x: where T has 16 bits the chip's approximation of 2^x, whose error grows with |x| but matters where e^x does: near 0.
// What is below the normal numbers becomes 0, which saves three instructions on either side of it.
DEVICE float exp_of(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// Words of logits. -infinity stands for elements past the row's end: nothing is smaller, and it adds nothing.
DEVICE Words load_logits(const T *z, i64 column, i64 width) {
  if constexpr (PACKED) return *reinterpret_cast<const Words *>(z + column);
  F f;
#pragma unroll
  for (int j = 0; j < N; j++) f.x[j] = column + j < width ? to_f32(z[column + j]) : -infinity();
  return packed<T>(f);
}

// The larger elements of two pairs, or if one is NaN the other.
template <typename D> DEVICE u32 larger2(u32 a, u32 b);
template <> DEVICE u32 larger2<bf16>(u32 a, u32 b) { u32 y; asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); return y; }
template <> DEVICE u32 larger2<f16>(u32 a, u32 b) { u32 y; asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); return y; }
template <int M> DEVICE float largest(const Words (&v)[M]) {
  Words most = v[0];
#pragma unroll
  for (int u = 0; u < M; u++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 &x = most.w[j];
      if constexpr (sizeof(T) == 4) x = __float_as_uint(fmaxf(__uint_as_float(x), __uint_as_float(v[u].w[j])));
      else x = larger2<T>(x, v[u].w[j]);
    }
  }
  const F f = unpacked<T>(most);
  float x = f.x[0];
#pragma unroll
  for (int j = 1; j < N; j++) x = fmaxf(x, f.x[j]);
  return x;
}

// sum of e^(z - max) over what has been seen. It begins at the least finite number, so that -inf may be seen first.
struct Running {
  float max, sum;
};
DEVICE Running nothing() { return Running{-3.402823466e38f, 0.0f}; }
template <int M> DEVICE void see(Running &r, const Words (&v)[M]) {
  const float max = fmaxf(r.max, largest(v));
  float sum = r.sum * exp_of(r.max - max);
#pragma unroll
  for (int u = 0; u < M; u++) {
    F e = unpacked<T>(v[u]);
#pragma unroll
    for (int j = 0; j < N; j++) e.x[j] = exp_of(e.x[j] - max);
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
      for (int j = 0; j < half; j++) e.x[j] += e.x[j + half];
    sum += e.x[0];
  }
  r = Running{max, sum};
}
// A thread's part of a row: the words at its place in every step of the block, each given to `keep` too.
template <typename K> DEVICE Running see_row(const T *z, i64 width, K keep) {
  constexpr int UNROLL = 4; // loads under way together
  const i64 step = (i64)blockDim.x * N;
  Running r = nothing();
  i64 c = (i64)threadIdx.x * N;
  for (; c + (UNROLL - 1) * step < width; c += UNROLL * step) {
    Words v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) v[u] = load_logits(z, c + u * step, width);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) keep(c + u * step, v[u]);
    see(r, v);
  }
  for (; c < width; c += step) {
    const Words v[1] = {load_logits(z, c, width)};
    keep(c, v[0]);
    see(r, v);
  }
  return r;
}
// ln sum e^z over all threads of the block, for every thread: over each warp, then over warps. All of the block has read
// its part of the row when a thread returns.
DEVICE float log_sum_exp(const Running &r, Running (&parts)[32]) {
  auto over_warp = [](const Running &r) {
    const float max = warp_max(r.max);
    return Running{max, warp_sum(r.sum * exp_of(r.max - max))};
  };
  const int lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
  const Running of_warp = over_warp(r);
  if (lane == 0) parts[threadIdx.x >> 5] = of_warp;
  __syncthreads();
  const Running all = over_warp(lane < warps ? parts[lane] : nothing());
  return all.max + logf(all.sum);
}
// d(loss of the row)/dz * scale
DEVICE F gradient(const F &z, i64 column, float lse, i64 label, float scale) {
  F d;
#pragma unroll
  for (int j = 0; j < N; j++) {
    const float p = exp_of(z.x[j] - lse);
    d.x[j] = (column + j == label ? p - 1.0f : p) * scale;
  }
  return d;
}

KERNEL __launch_bounds__(256, 6) cross_entropy(float *lse, float *losses, const T *__restrict__ z, View zv,
                                               const i64 *labels, i64 width) {
  __shared__ Running parts[32];
  const i64 row = blockIdx.x, label = labels[row];
  if (label < 0) {
    if (threadIdx.x == 0) lse[row] = losses[row] = 0.0f;
    return;
  }
  z += offset_of(zv, row);
  const float l = log_sum_exp(see_row(z, width, [](i64, const Words &) {}), parts);
  if (threadIdx.x == 0) {
    lse[row] = l;
    losses[row] = l - to_f32(z[label]);
  }
}

// dloss: one f32 on the device.
KERNEL __launch_bounds__(512) cross_entropy_backward(T *__restrict__ dz, const T *__restrict__ z, View zv,
                                                     const float *lse, const i64 *labels, const float *dloss, i64 width,
                                                     float count) {
  const i64 row = blockIdx.x, label = labels[row], step = (i64)blockDim.x * N;
  z += offset_of(zv, row);
  dz += row * width;
  const float scale = dloss[0] / count, l = lse[row];
#pragma unroll 4
  for (i64 c = (i64)threadIdx.x * N; c < width; c += step) {
    if (label < 0) {
      store_words(dz, c, width, Words{});
    } else {
      store_words(dz, c, width, packed<T>(gradient(unpacked<T>(load_words(z, c, width)), c, l, label, scale)));
    }
  }
}

// z [rows, V] contiguous, every row counts. Without `want_gradient` only the losses are written.
KERNEL __launch_bounds__(512) cross_entropy_in_place(T *z, float *losses, const i64 *labels, i64 width, float scale,
                                                     i64 want_gradient, i64 staged) {
  __shared__ Running parts[32];
  extern __shared__ Words stage[];
  const i64 row = blockIdx.x, label = labels[row], step = (i64)blockDim.x * N;
  z += row * width;
  const float at_label = to_f32(z[label]); // before the row is overwritten
  const Running r = see_row(z, width, [&](i64 column, const Words &v) {
    if (staged) stage[column / N] = v;
  });
  const float lse = log_sum_exp(r, parts);
  if (threadIdx.x == 0) losses[row] = lse - at_label;
  if (!want_gradient) return;
  // a thread takes up again what it has seen itself
#pragma unroll 4
  for (i64 c = (i64)threadIdx.x * N; c < width; c += step) {
    const Words v = staged ? stage[c / N] : load_words(z, c, width);
    store_words(z, c, width, packed<T>(gradient(unpacked<T>(v), c, lse, label, scale)));
  }
}

// mean = (sum of n losses) / count, summed in f64 by one block of 1024 threads.
KERNEL __launch_bounds__(1024) cross_entropy_mean(float *mean, const float *losses, i64 n, i64 count) {
  __shared__ double sums[1024];
  double sum = 0.0;
  for (i64 i = threadIdx.x; i < n; i += 1024) sum += losses[i];
  sums[threadIdx.x] = sum;
  for (int half = 512; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *mean = (float)(sums[0] / count);
}
