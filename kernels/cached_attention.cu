// Attention of new rows to a cache's: y = softmax(scale q k^T) v over the run of cache rows that each new row sees.
//
//   q [batch, H, n, d] by its strides, rows dense; row r = b n + i sees cache rows seen[0, r] .. seen[1, r] - 1 (int64
//   [2, batch n]). k and v [Hkv, T, d] by their strides, rows dense. y lies as [batch, n, H, d], overwritten.
//
// Launch: cached_attention, a block of 128 threads for each (r, query head); d at most 256. A warp takes 32 keys a step, the
// block 128: a lane scores one key, then the lanes hold columns of v. Online softmax in f32, a warp at a time; the warps' parts
// are joined in their order, so a row's result depends on nothing but its own keys.
// Shared: q in f32, and the warps' parts.
#include "rows.cuh"

constexpr int WARPS = 4, MOST = 256, COLUMNS = MOST / 32;

KERNEL __launch_bounds__(32 * WARPS)
cached_attention(T *__restrict__ y, const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,
                 const i64 *__restrict__ seen, i64 rows, i64 n, i64 heads, i64 group, i64 d, i64 q_batch, i64 q_head, i64 q_row,
                 i64 k_head, i64 k_row, i64 v_head, i64 v_row, float scale, i64 packed) {
  __shared__ float query[MOST];
  __shared__ float part[WARPS][MOST];
  __shared__ float tops[WARPS], sums[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 r = blockIdx.x / heads, h = blockIdx.x % heads;
  const T *from = q + r / n * q_batch + h * q_head + r % n * q_row;
  for (int c = threadIdx.x; c < d; c += blockDim.x) query[c] = to_f32(from[c]) * scale;
  __syncthreads();
  k += h / group * k_head;
  v += h / group * v_head;
  const i64 start = seen[r], end = seen[rows + r];

  float top = -infinity(), sum = 0.0f, acc[COLUMNS] = {};
  for (i64 base = start + 32 * warp; base < end; base += 32 * WARPS) {
    const i64 j = base + lane;
    float s = -infinity();
    if (j < end) {
      const T *row = k + j * k_row;
      s = 0.0f;
      constexpr int N = Pack<T>::N;
      if (packed) {
        for (int c = 0; c < d; c += N) {
          const Pack<T> pack = load_pack(row + c);
#pragma unroll
          for (int e = 0; e < N; e++) s += query[c + e] * to_f32(pack.x[e]);
        }
      } else {
        for (int c = 0; c < d; c++) s += query[c] * to_f32(row[c]);
      }
    }
    const float best = fmaxf(top, warp_max(s));   // finite: lane 0 has a key
    const float shrink = expf(top - best);
    const float p = j < end ? expf(s - best) : 0.0f;
    top = best;
    sum = sum * shrink + warp_sum(p);
#pragma unroll
    for (int e = 0; e < COLUMNS; e++) acc[e] *= shrink;
    const int keys = end - base < 32 ? (int)(end - base) : 32;
    for (int t = 0; t < keys; t++) {
      const float weight = __shfl_sync(0xffffffffu, p, t);
      const T *row = v + (base + t) * v_row;
#pragma unroll
      for (int e = 0; e < COLUMNS; e++)
        if (e * 32 + lane < d) acc[e] += weight * to_f32(row[e * 32 + lane]);
    }
  }
#pragma unroll
  for (int e = 0; e < COLUMNS; e++) part[warp][e * 32 + lane] = acc[e];
  if (lane == 0) tops[warp] = top, sums[warp] = sum;
  __syncthreads();
  float best = tops[0];   // warp 0 has at least one key
#pragma unroll
  for (int w = 1; w < WARPS; w++) best = fmaxf(best, tops[w]);
  float total = 0.0f, share[WARPS];
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    share[w] = expf(tops[w] - best);
    total += sums[w] * share[w];
  }
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float x = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x += part[w][c] * share[w];
    y[(r * heads + h) * d + c] = from_f32<T>(x / total);
  }
}
