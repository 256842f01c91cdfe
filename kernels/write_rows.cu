// Rows scattered into a cache in place: target[h, end[r] - 1, :] = x[b, h, i, :], r = b n + i, for one pair of target and x or
// for two at once, which differ in where they lie.
//
//   target [heads, all, d] contiguous; x [batch, heads, n, d] with dense rows, by its strides; end [batch n] int64.
//   total: elements of x. Writes the rows named and no others; accumulates nothing.
//   write_rows          any alignment. Launch: for_each(total), times 1 or 2 along y
//   write_rows_packed   16 bytes a thread: rows of all begin and end on 16 bytes
#include "rows.cuh"

struct Pair {
  T *target;
  const T *x;
  i64 batch_stride, head_stride, row_stride;
};

DEVICE Pair chosen(const Pair &a, const Pair &b) {
  const bool second = blockIdx.y;
  return {second ? b.target : a.target, second ? b.x : a.x, second ? b.batch_stride : a.batch_stride,
          second ? b.head_stride : a.head_stride, second ? b.row_stride : a.row_stride};
}

// Of element e of x in the order [batch, n, heads, d]: where it comes from and where it goes.
struct Move { i64 from, to; };
DEVICE Move move_of(i64 e, const Pair &p, const i64 *end, i64 n, i64 heads, i64 d, i64 all) {
  const Quotient head = divide(e, d), row = divide(head.q, heads), at = divide(row.q, n);
  return {at.q * p.batch_stride + row.r * p.head_stride + at.r * p.row_stride + head.r,
          (row.r * all + end[row.q] - 1) * d + head.r};
}

KERNEL write_rows(Pair first, Pair second, const i64 *end, i64 n, i64 heads, i64 d, i64 all, i64 total) {
  begin_early();
  const Pair p = chosen(first, second);
  for (i64 e = thread_index(); e < total; e += thread_count()) {
    const Move m = move_of(e, p, end, n, heads, d, all);
    p.target[m.to] = p.x[m.from];
  }
}

KERNEL write_rows_packed(Pair first, Pair second, const i64 *end, i64 n, i64 heads, i64 d, i64 all, i64 total) {
  begin_early();
  constexpr int N = Pack<T>::N;
  const Pair p = chosen(first, second);
  for (i64 e = thread_index() * N; e < total; e += thread_count() * N) {
    const Move m = move_of(e, p, end, n, heads, d, all);
    store_pack(p.target + m.to, load_pack(p.x + m.from));
  }
}
