// Rows scattered into a cache in place: target[h, end[r] - 1, :] = x[b, h, i, :], r = b n + i.
//
//   target [heads, all, d] contiguous; x [batch, heads, n, d] with dense rows, by its strides; end [batch n] int64.
//   total: elements of x. Writes the rows named and no others; accumulates nothing.
//   write_rows          any alignment. Launch: for_each(total)
//   write_rows_packed   16 bytes a thread: rows of both begin and end on 16 bytes
#include "rows.cuh"

// Of element e of x in the order [batch, n, heads, d]: where it comes from and where it goes.
struct Move { i64 from, to; };
DEVICE Move move_of(i64 e, const i64 *end, i64 batch_stride, i64 head_stride, i64 row_stride, i64 n, i64 heads, i64 d, i64 all) {
  const Quotient head = divide(e, d), row = divide(head.q, heads), at = divide(row.q, n);
  return {at.q * batch_stride + row.r * head_stride + at.r * row_stride + head.r, (row.r * all + end[row.q] - 1) * d + head.r};
}

KERNEL write_rows(T *target, const T *x, const i64 *end, i64 batch_stride, i64 head_stride, i64 row_stride, i64 n, i64 heads,
                  i64 d, i64 all, i64 total) {
  for (i64 e = thread_index(); e < total; e += thread_count()) {
    const Move m = move_of(e, end, batch_stride, head_stride, row_stride, n, heads, d, all);
    target[m.to] = x[m.from];
  }
}

KERNEL write_rows_packed(T *target, const T *x, const i64 *end, i64 batch_stride, i64 head_stride, i64 row_stride, i64 n,
                         i64 heads, i64 d, i64 all, i64 total) {
  constexpr int N = Pack<T>::N;
  for (i64 e = thread_index() * N; e < total; e += thread_count() * N) {
    const Move m = move_of(e, end, batch_stride, head_stride, row_stride, n, heads, d, all);
    store_pack(target + m.to, load_pack(x + m.from));
  }
}
