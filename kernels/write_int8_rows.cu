// Rows scattered into an 8-bit cache in place, two pairs of target and x at once: of each row x[b, h, i, :], r = b n + i,
//
//   scale = max |x| / 127        scales[h, end[r] - 1] = scale        numbers[h, end[r] - 1, :] = round(x / scale)
//
// to the nearest integer, of two the even one, and 0 where x / scale is no number; NaN is the largest |x| there is.
//
//   numbers [heads, all, d] int8 and scales [heads, all] f32, contiguous; x [batch, heads, n, d] with dense rows, by its
//   strides; end [batch n] int64. rows: batch n heads. Writes the rows named and no others; accumulates nothing.
//   `lanes` threads, a power of two up to 32, take a row together. packed: rows of x begin and end on 16 bytes.
//   Launch: for_each(rows * lanes) times 2 along y, blocks of whole warps
#include "rows.cuh"

struct Pair {
  i8 *numbers;
  float *scales;
  const T *x;
  i64 batch_stride, head_stride, row_stride;
};

DEVICE Pair chosen(const Pair &a, const Pair &b) {
  const bool second = blockIdx.y;
  return {second ? b.numbers : a.numbers, second ? b.scales : a.scales, second ? b.x : a.x,
          second ? b.batch_stride : a.batch_stride, second ? b.head_stride : a.head_stride,
          second ? b.row_stride : a.row_stride};
}

KERNEL write_int8_rows(Pair first, Pair second, const i64 *end, i64 n, i64 heads, i64 d, i64 all, i64 rows, int lanes,
                       int packed) {
  begin_early();
  constexpr int N = Pack<T>::N;
  const Pair p = chosen(first, second);
  const int lane = threadIdx.x & 31, own = lane & (lanes - 1), together = 32 / lanes;   // rows of a warp
  for (i64 base = thread_index() / 32 * together; base < rows; base += thread_count() / 32 * together) {
    const i64 mine = base + lane / lanes, row = mine < rows ? mine : rows - 1;
    const Quotient head = divide(row, heads), at = divide(head.q, n);
    const T *x = p.x + at.q * p.batch_stride + head.r * p.head_stride + at.r * p.row_stride;
    // magnitudes are in the order of their bits
    u32 largest = 0;
    for (i64 e = own * N; e < d; e += lanes * N) {
      float v[N];
      load_run(v, x + e, d - e, packed);
#pragma unroll
      for (int j = 0; j < N; j++) largest = max(largest, __float_as_uint(v[j]) & 0x7fffffffu);
    }
    for (int o = lanes >> 1; o > 0; o >>= 1) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, o));
    if (mine >= rows) continue;
    const float scale = __uint_as_float(largest) / 127.0f;
    const i64 to = head.r * all + end[head.q] - 1;
    if (own == 0) p.scales[to] = scale;
    for (i64 e = own * N; e < d; e += lanes * N) {
      float v[N];
      load_run(v, x + e, d - e, packed);
      u32 words[N / 4] = {};
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float steps = v[j] / scale;
        const int number = steps == steps ? __float2int_rn(fminf(fmaxf(steps, -127.0f), 127.0f)) : 0;
        words[j / 4] |= (u32)(number & 255) << j % 4 * 8;
      }
      i8 *y = p.numbers + to * d + e;
      if (packed) {
#pragma unroll
        for (int j = 0; j < N / 4; j++) reinterpret_cast<u32 *>(y)[j] = words[j];
      } else {
#pragma unroll
        for (int j = 0; j < N; j++)
          if (e + j < d) y[j] = (i8)(words[j / 4] >> j % 4 * 8);
      }
    }
  }
}
