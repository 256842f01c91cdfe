// Attention under the CAT mask, rung 1 of 6: the definition.
//
// A warp takes a query row and walks over every key of the triangle, asks the mask about each, and keeps a running softmax:
// a new largest score shrinks the sum and the result so far. A lane holds d/32 columns of q and of the result.
// Costs: L^2/2 questions a head for L^2/(2S) + L S/2 answers that matter, and K and V come from the caches, a row of 128
// bytes at a time, for one query row each.
//
// Launch: a block of 4 warps for 4 rows of a head, ceil(L/4) * H * B blocks. Arguments are those of attention.cu.
#include "lab_rows.cuh"

KERNEL __launch_bounds__(128) lab_1_definition(const T *q, const T *k, const T *v, T *y, float *lse, const Attention a) {
  Row r(q, a);
  if (r.i >= a.lq) return;
  for (int j = 0; j <= r.i; j++) {
    const Range local = locals_of(a, r.i);
    const bool slot = j % (int)a.stride == 0, own = j >= local.lo && j <= local.hi;
    if (slot || own) r.see(k, v, a, j);
  }
  r.store(y, lse, a);
}
