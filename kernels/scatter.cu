// The gradient of a gather: sum[o, i, k] += sum of dy[o, j, k] over the j with index[j] = i.
//
//   dy [lead, m, w] by views over o and k, and its stride along j; sum [lead, n, w] contiguous, of T or f32 (*_float).
//   The host groups positions by index: group g is of index target[g], its positions are order[starts[g]] up to
//   order[starts[g + 1]], ascending. Launches may cover some of the groups.
//
// A thread takes N neighbouring elements of one group's sum: N = 1, or 16 bytes of dy (*_packed: dy dense and aligned along
// the innermost dimension, w a multiple of N). Block X x Y: with Y = 1 a group's positions are added in order; with Y > 1
// (groups of many positions) they are cut into Y runs of almost equal length, whose sums are added in order. f32 throughout,
// rounded once, when the old sum is added. Launch: blocks of X threads over groups * lead * w / N, dynamic shared memory
// X Y N floats where Y > 1.
//
// Accumulates into sum, at the groups' indices only; each element has one owner, so no order depends on scheduling.
#include "rows.cuh"

template <int N, typename D>
DEVICE void scatter(D *__restrict__ sum, const T *__restrict__ dy, const View &lead, const View &inner, i64 stride,
                    const i64 *__restrict__ target, const i64 *__restrict__ starts, const i64 *__restrict__ order, i64 groups,
                    i64 leads, i64 n, i64 w) {
  extern __shared__ float parts[];
  const int X = blockDim.x, Y = blockDim.y;
  const i64 item = (i64)blockIdx.x * X + threadIdx.x;
  const bool mine = item < groups * leads * (w / N);
  float acc[N] = {};
  D *to = sum;
  if (mine) {
    const Quotient run = divide(item, w / N), at = divide(run.q, groups);
    const i64 k = run.r * N, begin = starts[at.r], count = starts[at.r + 1] - begin;
    const T *from = dy + offset_of(lead, at.q) + offset_of(inner, k);
    to = sum + (at.q * n + target[at.r]) * w + k;
    const i64 end = begin + count * (threadIdx.y + 1) / Y;
#pragma unroll 4
    for (i64 p = begin + count * threadIdx.y / Y; p < end; p++) {
      float v[N];
      load_run(v, from + order[p] * stride, N, true);
#pragma unroll
      for (int j = 0; j < N; j++) acc[j] += v[j];
    }
  }
  if (Y > 1) {
#pragma unroll
    for (int j = 0; j < N; j++) parts[(threadIdx.y * N + j) * X + threadIdx.x] = acc[j];
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int y = 1; y < Y; y++)
#pragma unroll
      for (int j = 0; j < N; j++) acc[j] += parts[(y * N + j) * X + threadIdx.x];
  }
  if (!mine) return;
  float old[N];
  load_run(old, to, N, true);
#pragma unroll
  for (int j = 0; j < N; j++) old[j] += acc[j];
  store_run(to, old, N, true);
}

#define PARAMETERS                                                                                                            \
  const T *dy, View lead, View inner, i64 stride, const i64 *target, const i64 *starts, const i64 *order, i64 groups,         \
      i64 leads, i64 n, i64 w
#define ARGUMENTS dy, lead, inner, stride, target, starts, order, groups, leads, n, w

KERNEL scatter_add(T *sum, PARAMETERS) { scatter<1>(sum, ARGUMENTS); }
KERNEL scatter_add_float(float *sum, PARAMETERS) { scatter<1>(sum, ARGUMENTS); }
KERNEL scatter_add_packed(T *sum, PARAMETERS) { scatter<Pack<T>::N>(sum, ARGUMENTS); }
KERNEL scatter_add_float_packed(float *sum, PARAMETERS) { scatter<Pack<T>::N>(sum, ARGUMENTS); }
