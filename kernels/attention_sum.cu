// Attention backward where the rows that see a slot are split among blocks: dk and dv of slots are the sum of what the
// splits found, in their order.
//
//   dk, dv [B, Lk, Hkv, d] at rows 0, S, 2S, ... = sum over splits of partial, f32 [2 (dk, dv), splits, B, slots, Hkv, d]
//
// Launch: grid (x, 2), y 0 for dk and 1 for dv. A split whose rows all come before a slot has written nothing for it.
#include "attention.cuh"

KERNEL attention_backward_sum(const float *partial, T *dk, T *dv, Attention a) {
  const int slots = (int)((a.lk + a.stride - 1) / a.stride);
  const i64 row = a.heads / a.group * a.d, n = a.batch * slots * row;
  partial += blockIdx.y * a.splits * n;
  T *out = blockIdx.y == 0 ? dk : dv;
  for (i64 i = thread_index(); i < n; i += thread_count()) {
    const i64 r = i / row, b = r / slots;
    const int j = (int)(r - b * slots);
    float sum = 0.0f;
    for (i64 s = seeing_slot(a, j).lo / a.split_rows; s < a.splits; s++) sum += partial[s * n + i];
    out[(b * a.lk + j * a.stride) * row + (i - r * row)] = from_f32<T>(sum);
  }
}
