// AdamW over many parameters at once, and the norm that their gradients are clipped by.
//
// p = p (1 - lr wd) - rate m' / (sqrt(v') root + eps), m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2, with
// g = factor * gradient, rate = lr / (1 - b1^t), root = 1 / sqrt(1 - b2^t).
// norm = sqrt(sum of gradient^2) over everything; factor = clip < norm ? clip / norm : 1, computed on the device. Where the
// norm is not finite nothing changes.
//
// `tensors` is a table of what to update, uploaded once a step; a block has CHUNK elements of one tensor, found by bisecting
// the table's first chunks. A parameter of 16 bits has a master in f32: the step is taken there, and the parameter is its
// rounding. Moments are f32, gradients f32 or T. Everything is contiguous and updated in place. Sums of squares: one f32 a
// block, then one block sums these in f64: one order.
//
// Bytes that must move, an element: norm: the gradient. Update: gradient + 24 (m, v, p in f32, read and written), and 2 more
// written for a parameter of 16 bits with a master.
#include "common.cuh"

constexpr int CHUNK = 16384; // ops/cuda/adamw.rs has the same
constexpr int THREADS = 256;

struct Entry {
  T *param;
  const void *gradient;
  float *m, *v, *master; // master: null if param is its own
  i64 n, first_chunk;
  float keep; // 1 - lr wd
  u32 wide;   // the gradient is f32
};

// The table's last entry whose first chunk is not after this block.
DEVICE const Entry &entry_of(const Entry *tensors, i64 count) {
  i64 low = 0, high = count;
  while (high - low > 1) {
    const i64 middle = (low + high) / 2;
    if (tensors[middle].first_chunk <= (i64)blockIdx.x) low = middle;
    else high = middle;
  }
  return tensors[low];
}

template <typename D> struct alignas(4 * sizeof(D)) Four { D x[4]; };
template <typename D> DEVICE void load_four(float *x, const D *p) {
  const Four<D> v = *reinterpret_cast<const Four<D> *>(p);
#pragma unroll
  for (int j = 0; j < 4; j++) x[j] = to_f32(v.x[j]);
}
template <typename D> DEVICE void store_four(D *p, const float *x) {
  Four<D> v;
#pragma unroll
  for (int j = 0; j < 4; j++) v.x[j] = from_f32<D>(x[j]);
  *reinterpret_cast<Four<D> *>(p) = v;
}

// ---- the norm ----

template <typename G> DEVICE float squares(const G *g, i64 n) {
  constexpr int N = 16 / sizeof(G);
  const i64 whole = aligned16(g) ? n / N * N : 0;
  float sum = 0.0f;
#pragma unroll 4
  for (i64 i = (i64)threadIdx.x * N; i < whole; i += THREADS * N) {
    const Floats<G> x = unpacked<G>(*reinterpret_cast<const Words *>(g + i));
#pragma unroll
    for (int j = 0; j < N; j++) sum = fmaf(x.x[j], x.x[j], sum);
  }
  for (i64 i = whole + threadIdx.x; i < n; i += THREADS) sum = fmaf(to_f32(g[i]), to_f32(g[i]), sum);
  return sum;
}
KERNEL __launch_bounds__(THREADS) adamw_squares(float *partial, const Entry *tensors, i64 count) {
  __shared__ float shared[32];
  const Entry &e = entry_of(tensors, count);
  const i64 at = ((i64)blockIdx.x - e.first_chunk) * CHUNK, n = e.n - at < CHUNK ? e.n - at : CHUNK;
  const float sum = e.wide ? squares((const float *)e.gradient + at, n) : squares((const T *)e.gradient + at, n);
  const float total = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One block of 1024 threads. clip 0: no clipping.
KERNEL __launch_bounds__(1024) adamw_norm(float *norm, float *factor, const float *partial, i64 n, float clip) {
  __shared__ double sums[1024];
  double sum = 0.0;
  for (i64 i = threadIdx.x; i < n; i += 1024) sum += partial[i];
  sums[threadIdx.x] = sum;
  for (int half = 512; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) {
    const float total = (float)sqrt(sums[0]);
    *norm = total;
    *factor = clip > 0.0f && total > clip ? clip / total : 1.0f;
  }
}

// ---- the step ----

struct Step {
  float b1, c1, b2, c2, rate, root, eps; // c = 1 - b
};
DEVICE void update(float &p, float g, float &m, float &v, const Step &h, float keep) {
  m = fmaf(h.b1, m, h.c1 * g);
  v = fmaf(h.b2, v, h.c2 * g * g);
  p = p * keep - h.rate * m / (sqrtf(v) * h.root + h.eps);
}

KERNEL __launch_bounds__(THREADS) adamw_update(const Entry *tensors, i64 count, const float *norm, const float *factor,
                                               float b1, float c1, float b2, float c2, float rate, float root,
                                               float eps) {
  if (!(*norm < infinity())) return; // infinite or not a number
  const Entry e = entry_of(tensors, count);
  const Step h{b1, c1, b2, c2, rate, root, eps};
  const float scale = *factor;
  const i64 at = ((i64)blockIdx.x - e.first_chunk) * CHUNK, n = e.n - at < CHUNK ? e.n - at : CHUNK;
  T *param = e.param + at;
  float *m = e.m + at, *v = e.v + at, *master = e.master ? e.master + at : nullptr;
  const float *wide = e.wide ? (const float *)e.gradient + at : nullptr;
  const T *narrow = e.wide ? nullptr : (const T *)e.gradient + at;
  // chunks begin on 16 bytes where their tensors do
  const bool aligned = aligned16(m) && aligned16(v) && aligned16(param) && aligned16(e.gradient) && aligned16(master);
  const i64 whole = aligned ? n / 4 * 4 : 0;
#pragma unroll 1
  for (i64 i = (i64)threadIdx.x * 4; i < whole; i += THREADS * 4) {
    float p[4], g[4], first[4], second[4];
    if (wide) load_four(g, wide + i);
    else load_four(g, narrow + i);
    if (master) load_four(p, master + i);
    else load_four(p, param + i);
    load_four(first, m + i);
    load_four(second, v + i);
#pragma unroll
    for (int j = 0; j < 4; j++) update(p[j], g[j] * scale, first[j], second[j], h, e.keep);
    store_four(m + i, first);
    store_four(v + i, second);
    if (master) store_four(master + i, p);
    store_four(param + i, p);
  }
  for (i64 i = whole + threadIdx.x; i < n; i += THREADS) {
    float p = master ? master[i] : to_f32(param[i]), first = m[i], second = v[i];
    update(p, (wide ? wide[i] : to_f32(narrow[i])) * scale, first, second, h, e.keep);
    m[i] = first;
    v[i] = second;
    if (master) master[i] = p;
    param[i] = from_f32<T>(p);
  }
}
