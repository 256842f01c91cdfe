// The decoder's sequence of blocks, from slots, a separator and tokens; and its gradient, taken apart again.
//
// A block of `stride` = C - 1 + header rows is its slot, the separator where header is 2, and its tokens but the last, which
// nobody reads; after K = N / C full blocks come the last slot's header and the N mod C tokens left.
//
// forward:  y[b, k stride] = slots[b, k], y[b, k stride + 1] = separator (header 2),
//           y[b, k stride + header + t] = tokens[b, k C + t].
// backward: dslots and dtokens are these rows of dy, zeros for tokens that y leaves out;
//           dseparator = sum over b and k of dy[b, k stride + 1].
//
// slots [B, K + 1, D], tokens [B, N, D], dy [B, L, D]: rows of any stride, dense inside; separator [D]. y [B, L, D], dslots
// and dtokens contiguous. Outputs are overwritten; nothing is saved.
//
// `1 << shift` lanes of a warp have a row, 16 bytes each at a time. Each block of the separator's kernel sums some rows into a
// row of `partial` [blocks, D], f32, and these are summed in their order (rms_norm_weight). Bytes that must move: 2 s D for each
// row of y forward, and backward as many, zeros besides, and s D for each separator once more.
#include "rows.cuh"

// What a lane has of a row, or zeros where there is none.
DEVICE void copy_row(T *__restrict__ to, const T *__restrict__ from, i64 d, int shift) {
  constexpr int N = 16 / sizeof(T), UNROLL = 4; // loads under way together
  const i64 step = (i64)N << shift;
  for (i64 c = (i64)(threadIdx.x & ((1 << shift) - 1)) * N; c < d; c += step * UNROLL) {
    Words v[UNROLL] = {};
    if (from) {
#pragma unroll
      for (int u = 0; u < UNROLL; u++) v[u] = load_words(from, c + u * step, d);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) store_words(to, c + u * step, d, v[u]);
  }
}

KERNEL __launch_bounds__(256) assemble_blocks(T *y, const T *slots, const T *separator, const T *tokens, i64 sb, i64 sk,
                                              i64 tb, i64 tn, i64 rows, i64 d, i64 chunk, i64 header, i64 length,
                                              i64 shift) {
  const i64 row = thread_index() >> shift;
  if (row >= rows) return;
  const Quotient at = divide(row, length), block = divide(at.r, chunk - 1 + header);
  const T *from = block.r == 0       ? slots + at.q * sb + block.q * sk
                  : block.r < header ? separator
                                     : tokens + at.q * tb + (block.q * chunk + block.r - header) * tn;
  copy_row(y + row * d, from, d, (int)shift);
}

// Rows of dslots, and then those of dtokens.
KERNEL __launch_bounds__(256) assemble_blocks_backward(T *dslots, T *dtokens, const T *dy, i64 yb, i64 yl, i64 batch, i64 d,
                                                       i64 chunk, i64 header, i64 tokens, i64 shift) {
  const i64 full = tokens / chunk, slots = batch * (full + 1), stride = chunk - 1 + header;
  i64 row = thread_index() >> shift;
  if (row < slots) {
    const Quotient at = divide(row, full + 1);
    return copy_row(dslots + row * d, dy + at.q * yb + at.r * stride * yl, d, (int)shift);
  }
  row -= slots;
  if (row >= batch * tokens) return;
  const Quotient at = divide(row, tokens), block = divide(at.r, chunk);
  const bool left_out = block.q < full && block.r == chunk - 1;
  const T *from = dy + at.q * yb + (block.q * stride + header + block.r) * yl;
  copy_row(dtokens + row * d, left_out ? nullptr : from, d, (int)shift);
}

// A thread sums 16 bytes' columns of every gridDim.y-th separator.
KERNEL __launch_bounds__(128) assemble_blocks_separator(float *partial, const T *dy, i64 yb, i64 yl, i64 separators, i64 d,
                                                        i64 slots, i64 stride) {
  constexpr int N = 16 / sizeof(T), UNROLL = 4;
  const i64 c = thread_index() * N;
  if (c >= d) return;
  float sum[N] = {};
  for (i64 i = blockIdx.y; i < separators; i += (i64)gridDim.y * UNROLL) {
    Words v[UNROLL] = {};
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const i64 j = i + (i64)u * gridDim.y;
      if (j >= separators) break;
      const Quotient at = divide(j, slots);
      v[u] = load_words(dy + at.q * yb + (at.r * stride + 1) * yl, c, d);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const Floats<T> x = unpacked<T>(v[u]);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += x.x[j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++)
    if (c + j < d) partial[blockIdx.y * d + c + j] = sum[j];
}
