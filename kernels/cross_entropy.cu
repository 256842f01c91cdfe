// Cross-entropy of logits z [rows, V] against labels, one a row (-1: the row does not count).
//
// forward:  lse = m + ln sum e^(z - m), m = max z; loss of a row = lse - z[label]; the mean is over rows that count.
// backward: dz = (e^(z - lse) - onehot(label)) dloss / count; 0 in rows that do not count.
//
// z: rows of any stride, dense inside. dz: [rows, V] contiguous, overwritten. lse, losses: [rows] f32, 0 where the row does
// not count. Saved for backward: z and lse. A block has a row. Every thread keeps a running maximum and a sum relative to
// it (rescaled when the maximum rises), so forward reads each logit once.
//
// cross_entropy_in_place does both at once for logits that nobody else needs: they become the gradient of
// scale * (sum of the rows' losses). The row waits in shared memory between its two uses where it fits (`staged`), so it is
// read once and written once.
//
// Bytes that must move, for elements of s bytes: forward s V a row, backward and in place 2 s V.
#include "common.cuh"

constexpr int N = 16 / sizeof(T);
typedef Floats<T> F;

// e^x: where T has 16 bits the chip's approximation, whose error grows with |x| but matters where e^x does: near 0.
DEVICE float exp_of(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  else return __expf(x);
}

// sum of e^(z - max) over what has been seen. It begins at the least finite number, so that -inf may be seen first.
struct Running {
  float max, sum;
};
DEVICE Running nothing() { return Running{-3.402823466e38f, 0.0f}; }
DEVICE void see(Running &r, const F &z, i64 column, i64 width) {
  float max = r.max;
#pragma unroll
  for (int j = 0; j < N; j++)
    if (PACKED || column + j < width) max = fmaxf(max, z.x[j]);
  float sum = r.sum * exp_of(r.max - max);
#pragma unroll
  for (int j = 0; j < N; j++)
    if (PACKED || column + j < width) sum += exp_of(z.x[j] - max);
  r = Running{max, sum};
}
// ln sum e^z over all threads of the block.
DEVICE float log_sum_exp(const Running &r, float *shared) {
  const float max = block_max(r.max, shared);
  return max + logf(block_sum(r.sum * exp_of(r.max - max), shared));
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

KERNEL __launch_bounds__(512) cross_entropy(float *lse, float *losses, const T *__restrict__ z, View zv,
                                            const i64 *labels, i64 width) {
  __shared__ float shared[32];
  constexpr int UNROLL = 4; // loads under way together
  const i64 row = blockIdx.x, label = labels[row], step = (i64)blockDim.x * N;
  if (label < 0) {
    if (threadIdx.x == 0) lse[row] = losses[row] = 0.0f;
    return;
  }
  z += offset_of(zv, row);
  Running r = nothing();
  for (i64 c = (i64)threadIdx.x * N; c < width; c += UNROLL * step) {
    Words v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) v[u] = load_words(z, c + u * step, width);
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (c + u * step < width) see(r, unpacked<T>(v[u]), c + u * step, width);
  }
  const float l = log_sum_exp(r, shared);
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

// z [rows, V] contiguous, every row counts; blocks of at least two warps, whose barriers part reading from writing. Without `want_gradient` only the losses are written.
KERNEL __launch_bounds__(512) cross_entropy_in_place(T *z, float *losses, const i64 *labels, i64 width, float scale,
                                                     i64 want_gradient, i64 staged) {
  __shared__ float shared[32];
  extern __shared__ Words stage[];
  constexpr int UNROLL = 4;
  const i64 row = blockIdx.x, label = labels[row], step = (i64)blockDim.x * N;
  z += row * width;
  Running r = nothing();
  const float at_label = to_f32(z[label]); // before the row is overwritten
  for (i64 c = (i64)threadIdx.x * N; c < width; c += UNROLL * step) {
    Words v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) v[u] = load_words(z, c + u * step, width);
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (c + u * step < width) {
        if (staged) stage[(c + u * step) / N] = v[u];
        see(r, unpacked<T>(v[u]), c + u * step, width);
      }
  }
  const float lse = log_sum_exp(r, shared);
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
