// Attention backward under a structured mask for 16-bit T, on the tensor cores. Forward is attention.cu; masks and tiles
// are explained in attention.cuh.
//
//   P = exp(scale q k^T - lse)     delta = sum(dy y)     dS = P (dy v^T - delta)
//   dv = P^T dy                    dq = scale dS k       dk = scale dS^T q
//
// Two passes compute P again, each for its own side; nothing is added across blocks, and every sum has one order.
// - attention_backward_rows: a tile of query rows past the keys that they see, as forward. Writes delta [B, H, Lq] and dq;
//   with `local_keys` (one query head a key head, whole blocks in a tile) dk and dv of the local keys too, which only
//   these rows see and whose k, v, q and dy lie in shared memory at the end.
//   row_tiles * H * B blocks (B is 1 under JOINED); shared: (2*ROWS + 2*STAGES*KEYS) * PITCH elements, 2*ROWS floats.
// - attention_backward_keys, after it: a tile of keys past the rows that see them, of all query heads of the group.
//   local = 0: ROWS slots, key_tiles * splits * PARTS * Hkv * B blocks; with splits > 1 sums go to `partial`, f32
//   [2, splits, B, slots, Hkv, d], for attention_sum.cu (d even then). local = 1: local keys, row_tiles * PARTS * Hkv * B blocks.
//   shared: (2*ROWS + 2*STAGES*KEYS) * PITCH elements, 2*STAGES*KEYS floats.
// P and dS are rounded to T before their products. dq, dk, dv lie as [B, L, heads, d] and are overwritten.
#include "attention_mma.cuh"

constexpr int CHUNK = 32;                    // streamed rows that are in registers at a time
constexpr int NT = CHUNK / 8;
constexpr int COLUMNS = D <= 128 ? D : 128;  // columns of dk and dv that a block (of the key pass) yields
constexpr int PARTS = D / COLUMNS;

// dq += dS k for a warp's rows and one chunk of keys.
template <bool ALL>
DEVICE void row_step(float (&dq)[MT][D / 8][4], const Lying &q, const Lying &dy, u32 k, u32 v, const float (&lse2)[MT][2],
                     const float (&delta)[MT][2], const Seen &seen, int start, float scale2) {
  const Need need = {0, NT};
  float s[MT][NT][4], ds[MT][NT][4];
  scores<NT, true>(s, q, k, need);
  scores<NT, true>(ds, dy, v, need);
  const int column = start + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int h = e >> 1, j = column + n * 8 + (e & 1);
        float p = power2(s[m][n][e] * scale2 - lse2[m][h]);
        if (!ALL && (j < seen.of[m][h].lo || j > seen.of[m][h].hi)) p = 0.0f;
        ds[m][n][e] = p * (ds[m][n][e] - delta[m][h]);
      }
  mix<NT, D / 8, true>(dq, ds, k, need);
}

// dk += dS^T q, dv += P^T dy for a warp's keys and one chunk of query rows.
template <bool ALL>
DEVICE void key_step(float (&dk)[MT][COLUMNS / 8][4], float (&dv)[MT][COLUMNS / 8][4], const Lying &k, const Lying &v, u32 q,
                     u32 dy, const float *lse, const float *delta, const Seen &seen, int start, float scale2, u32 column_bytes) {
  const Need need = {0, NT};
  const int t = (threadIdx.x & 3) * 2;
  float s[MT][NT][4], ds[MT][NT][4];
  scores<NT, true>(s, k, q, need);
  scores<NT, true>(ds, v, dy, need);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float l = lse[n * 8 + t + e] * LOG2_E, dl = delta[n * 8 + t + e];
      const int i = start + n * 8 + t + e;
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float &p = s[m][n][2 * h + e], &g = ds[m][n][2 * h + e];
          p = power2(p * scale2 - l);
          if (!ALL && (i < seen.of[m][h].lo || i > seen.of[m][h].hi)) p = 0.0f;
          g = p * (g - dl);
        }
    }
  mix<NT, COLUMNS / 8, true>(dv, s, dy + column_bytes, need);
  mix<NT, COLUMNS / 8, true>(dk, ds, q + column_bytes, need);
}
// `count` query rows, from row `start` of their numbering on, that lie at q and dy.
DEVICE void key_steps(float (&dk)[MT][COLUMNS / 8][4], float (&dv)[MT][COLUMNS / 8][4], const Lying &k, const Lying &v, u32 q,
                      u32 dy, const float *lse, const float *delta, const Seen &seen, int start, int count, float scale2, u32 column_bytes) {
#pragma unroll 1
  for (int c = 0; c < count; c += CHUNK) {
    const u32 at = c * ROW_BYTES;
    const Need need = seen.need(start + c, CHUNK);
    if (seen.all(start + c, CHUNK))
      key_step<true>(dk, dv, k, v, q + at, dy + at, lse + c, delta + c, seen, start + c, scale2, column_bytes);
    else if (need.first < need.end)
      key_step<false>(dk, dv, k, v, q + at, dy + at, lse + c, delta + c, seen, start + c, scale2, column_bytes);
  }
}
DEVICE void fill(float (&x)[MT][2], float value) {
#pragma unroll
  for (int m = 0; m < MT; m++) x[m][0] = x[m][1] = value;
}

// delta = sum(dy y) of the warp's rows, into shared memory (with lse) and into device memory.
DEVICE void row_stats(const T *y, const T *own_dy, const float *lse, float *delta, float *lse_here, float *delta_here,
                      const Attention &a, const Place &p, const Tile &t) {
  constexpr int P = Pack<T>::N, LANES = D % 64 == 0 ? 8 : D % 32 == 0 ? 4 : 2; // lanes a row
  const int lane = threadIdx.x & 31, d = (int)a.d;
#pragma unroll 2
  for (int step = lane / LANES; step < 16 * MT; step += 32 / LANES) {
    const int r = (threadIdx.x >> 5) * 16 * MT + step, i = t.first + r;
    float sum = 0.0f;
    if (i < t.end) {
      const T *from = y + out_at(a, p, i, a.lq, p.head, a.heads);
      for (int x = lane % LANES * P; x < d; x += LANES * P) {
        const Pack<T> g = load_pack(own_dy + r * PITCH + x);
        if (a.vector_out) {
          const Pack<T> o = load_pack(from + x);
#pragma unroll
          for (int e = 0; e < P; e++) sum += to_f32(g.x[e]) * to_f32(o.x[e]);
        } else {
          for (int e = 0; e < P && x + e < d; e++) sum += to_f32(g.x[e]) * to_f32(from[x + e]);
        }
      }
    }
#pragma unroll
    for (int o = 1; o < LANES; o <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (lane % LANES == 0) {
      delta_here[r] = sum;
      lse_here[r] = infinity(); // rows past the end: their P is 0
      if (i < t.end) {
        const i64 at = stat_at(a, p, p.head, i);
        lse_here[r] = lse[at];
        delta[at] = sum;
      }
    }
  }
}

KERNEL __launch_bounds__(THREADS, BLOCKS)
attention_backward_rows(const T *q, const T *k, const T *v, const T *y, const T *dy, const float *lse, float *delta,
                        T *dq, T *dk, T *dv, Attention a) {
  extern __shared__ __align__(16) u8 memory[];
  const Place p = place_of(a, blockIdx.x, (int)a.row_tiles, (int)a.heads);
  const Tile t = tile_of(a, p.tile, ROWS);
  if (t.first >= t.end) return;
  const int key_head = p.head / (int)a.group, warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2;
  const u32 own_q = shared_at(memory), own_dy = own_q + OWN, stages = own_dy + OWN;
  float *lse_here = reinterpret_cast<float *>(memory + 2 * OWN + 2 * STAGES * OTHER), *delta_here = lse_here + ROWS;
  const float scale2 = scale_of(a) * LOG2_E;
  k += head_at(a.k, p, key_head);
  v += head_at(a.v, p, key_head);
  load_rows<ROWS, PITCH, THREADS>(own_q, q + head_at(a.q, p, p.head), walk_of(a, a.q, 1), t.first, t.end, a.d, a.vector);
  load_rows<ROWS, PITCH, THREADS>(own_dy, dy + head_at(a.dy, p, p.head), walk_of(a, a.dy, 1), t.first, t.end, a.d, a.vector);
  copies_issued();
  const Visit visit = visit_of(a, t, KEYS);
  const auto load = [&](int step) {
    const u32 to = stages + (step & 1) * 2 * OTHER;
    const bool local = step >= visit.slot_steps;
    const int start = local ? visit.local + (step - visit.slot_steps) * KEYS : step * KEYS, end = local ? t.end : visit.slots;
    const i64 apart = local ? 1 : a.stride;
    load_rows<KEYS, PITCH, THREADS>(to, k, walk_of(a, a.k, apart), start, end, a.d, a.vector);
    load_rows<KEYS, PITCH, THREADS>(to + OTHER, v, walk_of(a, a.v, apart), start, end, a.d, a.vector);
    copies_issued();
  };
  load(0);
  copies_wait<1>(); // q and dy
  __syncthreads();
  row_stats(y, reinterpret_cast<const T *>(memory + OWN), lse, delta, lse_here, delta_here, a, p, t);
  __syncwarp();

  {
    const Lying my_q(own_q + warp * 16 * MT * ROW_BYTES), my_dy(own_dy + warp * 16 * MT * ROW_BYTES);
    float lse2[MT][2], my_delta[MT][2], acc[MT][D / 8][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = warp * 16 * MT + m * 16 + h * 8 + g;
        lse2[m][h] = lse_here[r] * LOG2_E;
        my_delta[m][h] = delta_here[r];
      }
    clear(acc);
    Seen seen;
    for (int step = 0; step < visit.steps; step++) {
      const bool local = step >= visit.slot_steps;
      if (step == 0 || step == visit.slot_steps) seen = rows_see(a, t, local);
      if (step + 1 < visit.steps) {
        load(step + 1);
        copies_wait<1>();
      } else {
        copies_wait<0>();
      }
      __syncthreads();
      const int start = local ? visit.local + (step - visit.slot_steps) * KEYS : step * KEYS;
#pragma unroll 1
      for (int c = 0; c < KEYS; c += CHUNK) {
        const u32 at = stages + (step & 1) * 2 * OTHER + c * ROW_BYTES;
        const Need need = seen.need(start + c, CHUNK);
        if (seen.all(start + c, CHUNK)) row_step<true>(acc, my_q, my_dy, at, at + OTHER, lse2, my_delta, seen, start + c, scale2);
        else if (need.first < need.end)
          row_step<false>(acc, my_q, my_dy, at, at + OTHER, lse2, my_delta, seen, start + c, scale2);
      }
      if (step + 1 < visit.steps) __syncthreads();
    }
    fill(lse2, scale_of(a));
    store_rows(dq, acc, lse2, 0, (int)a.d, a.vector_out,
               [&](int r) { return t.first + r < t.end ? out_at(a, p, t.first + r, a.lq, p.head, a.heads) : -1; });
  }
  if (!a.local_keys) return;

  // The tile's own rows as local keys: the last ROWS/KEYS (at most STAGES) tiles that streamed past, still there.
  const int step = visit.slot_steps + warp * 16 * MT / KEYS;
  const Seen seen = keys_seen(a, t, true);
  if (!seen.any) return;
  const u32 at = stages + (step & 1) * 2 * OTHER + warp * 16 * MT % KEYS * ROW_BYTES;
  const Lying my_k(at), my_v(at + OTHER);
#pragma unroll 1
  for (int part = 0; part < PARTS; part++) {
    float acc_k[MT][COLUMNS / 8][4], acc_v[MT][COLUMNS / 8][4], factor[MT][2];
    clear(acc_k);
    clear(acc_v);
    key_steps(acc_k, acc_v, my_k, my_v, own_q, own_dy, lse_here, delta_here, seen, t.first, ROWS, scale2, part * COLUMNS * 2);
    const auto to = [&](int r) {
      const int j = t.first + r;
      return j < t.end && !opens_block(a, j) ? out_at(a, p, j, a.lk, key_head, a.heads / a.group) : -1;
    };
    fill(factor, scale_of(a));
    store_rows(dk, acc_k, factor, part * COLUMNS, (int)a.d, a.vector_out, to);
    fill(factor, 1.0f);
    store_rows(dv, acc_v, factor, part * COLUMNS, (int)a.d, a.vector_out, to);
  }
}

KERNEL __launch_bounds__(THREADS, BLOCKS)
attention_backward_keys(const T *q, const T *k, const T *v, const T *dy, const float *lse, const float *delta, T *dk,
                        T *dv, float *partial, Attention a, int local) {
  extern __shared__ __align__(16) u8 memory[];
  const int key_heads = (int)(a.heads / a.group), warp = threadIdx.x >> 5;
  const int part = blockIdx.x % PARTS;
  i64 block = blockIdx.x / PARTS;
  Place p;
  Tile t; // of keys: slots, or local keys
  int split = 0, first, end; // query rows
  if (local) {
    p = place_of(a, block, (int)a.row_tiles, key_heads);
    t = tile_of(a, p.tile, ROWS);
    if (t.first >= t.end) return;
    first = seeing_local(a, t.first).lo;
    end = seeing_local(a, t.end - 1).hi + 1;
  } else {
    p.tile = (int)(block % a.key_tiles), block /= a.key_tiles; // the first tile is seen by the most rows
    split = (int)(block % a.splits), block /= a.splits;
    p.head = (int)(block % key_heads), p.batch = (int)(block / key_heads);
    t.first = p.tile * ROWS;
    t.end = min(t.first + ROWS, (int)((a.lk + a.stride - 1) / a.stride));
    const int begin = seeing_slot(a, t.first).lo;
    first = max(begin, (int)(split * a.split_rows));
    end = (int)min(a.lq, (split + 1) * a.split_rows);
    if (first >= end) return;
  }
  const u32 own_k = shared_at(memory), own_v = own_k + OWN, stages = own_v + OWN;
  float *stats = reinterpret_cast<float *>(memory + 2 * OWN + 2 * STAGES * OTHER); // [STAGES][lse, delta][KEYS]
  const float scale2 = scale_of(a) * LOG2_E;
  const i64 apart = local ? 1 : a.stride;
  load_rows<ROWS, PITCH, THREADS>(own_k, k + head_at(a.k, p, p.head), walk_of(a, a.k, apart), t.first, t.end, a.d, a.vector);
  load_rows<ROWS, PITCH, THREADS>(own_v, v + head_at(a.v, p, p.head), walk_of(a, a.v, apart), t.first, t.end, a.d, a.vector);
  const int head = p.head * (int)a.group, per_head = (end - first + KEYS - 1) / KEYS, steps = per_head * (int)a.group;
  const auto load = [&](int step) {
    const int h = head + step / per_head, start = first + step % per_head * KEYS;
    const u32 to = stages + (step & 1) * 2 * OTHER, to_stats = shared_at(stats + (step & 1) * 2 * KEYS);
    load_rows<KEYS, PITCH, THREADS>(to, q + head_at(a.q, p, h), walk_of(a, a.q, 1), start, end, a.d, a.vector);
    load_rows<KEYS, PITCH, THREADS>(to + OTHER, dy + head_at(a.dy, p, h), walk_of(a, a.dy, 1), start, end, a.d, a.vector);
    load_stats<KEYS>(to_stats, lse, a, p, h, start, end);
    load_stats<KEYS>(to_stats + KEYS * 4, delta, a, p, h, start, end);
    copies_issued();
  };
  load(0);
  const Seen seen = keys_seen(a, t, local);
  const Lying my_k(own_k + warp * 16 * MT * ROW_BYTES), my_v(own_v + warp * 16 * MT * ROW_BYTES);
  float acc_k[MT][COLUMNS / 8][4], acc_v[MT][COLUMNS / 8][4];
  clear(acc_k);
  clear(acc_v);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      load(step + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    const u32 at = stages + (step & 1) * 2 * OTHER;
    const float *here = stats + (step & 1) * 2 * KEYS;
    key_steps(acc_k, acc_v, my_k, my_v, at, at + OTHER, here, here + KEYS, seen, first + step % per_head * KEYS, KEYS, scale2,
              part * COLUMNS * 2);
    __syncthreads();
  }
  if (!seen.any) return;
  if (a.splits > 1 && !local) {
    const int slots = (int)((a.lk + a.stride - 1) / a.stride), lane = threadIdx.x & 31;
    const i64 all = a.batch * slots * key_heads * a.d;
    partial += split * all;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int j = t.first + warp * 16 * MT + m * 16 + h * 8 + (lane >> 2);
        if (j >= t.end) continue;
        float *to = partial + ((p.batch * (i64)slots + j) * key_heads + p.head) * a.d;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
          const int x = part * COLUMNS + n * 8 + (lane & 3) * 2;
          if (x < a.d) { // splits are for even d only
            *reinterpret_cast<float2 *>(to + x) = make_float2(acc_k[m][n][2 * h] * scale_of(a), acc_k[m][n][2 * h + 1] * scale_of(a));
            *reinterpret_cast<float2 *>(to + a.splits * all + x) = make_float2(acc_v[m][n][2 * h], acc_v[m][n][2 * h + 1]);
          }
        }
      }
    return;
  }
  const auto to = [&](int r) {
    const int j = t.first + r;
    return j < t.end && !(local && opens_block(a, j)) ? out_at(a, p, j * (int)apart, a.lk, p.head, key_heads) : -1;
  };
  float factor[MT][2];
  fill(factor, scale_of(a));
  store_rows(dk, acc_k, factor, part * COLUMNS, (int)a.d, a.vector_out, to);
  fill(factor, 1.0f);
  store_rows(dv, acc_v, factor, part * COLUMNS, (int)a.d, a.vector_out, to);
}
