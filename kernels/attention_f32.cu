// Attention under a structured mask in exact f32 arithmetic, forward and backward: the formulas, passes, arguments and
// memory of attention.cu and attention_backward.cu; masks and tiles are explained in attention.cuh.
//
// A block is 16 x 16 threads over a tile of TILE own rows and one of TILE other rows that streams past. Thread (y, x) owns
// rows y + 16 i; of scores it holds columns x + 16 j, of results W neighbours every 16 W columns. A row's 16 threads are
// one half of a warp.
// Launch: as the 16-bit kernels, with ROWS = KEYS = TILE, THREADS 256, PARTS 1, one stage (STAGES). Shared, in floats:
// forward 3 TILE PITCH, backward 4 TILE PITCH (and 2 TILE for the pass over keys), and TILE (TILE + 4) for P.
#include "attention.cuh"

constexpr int THREADS = 256;
constexpr int TILE = D <= 128 ? 64 : 32;
constexpr int PITCH = D + 4, P_PITCH = TILE + 4;
constexpr int R = TILE / 16;                                  // rows of a thread
constexpr int W = D % 64 == 0 ? 4 : D % 32 == 0 ? 2 : 1;      // neighbouring columns
constexpr int E = D / 16;                                     // columns of a thread
constexpr int OWN = TILE * PITCH;

struct Thread {
  int x, y;
  DEVICE Thread() : x(threadIdx.x & 15), y(threadIdx.x >> 4) {}
  DEVICE int row(int i) const { return y + 16 * i; }
  DEVICE int column(int e) const { return x * W + e / W * 16 * W + e % W; }
};

// s = own other^T.
DEVICE void scores(float (&s)[R][R], const float *own, const float *other) {
  const Thread t;
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < R; j++) s[i][j] = 0.0f;
#pragma unroll 4
  for (int k = 0; k < D; k += 4) {
    Pack<float> a[R], b[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
      a[i] = load_pack(own + t.row(i) * PITCH + k);
      b[i] = load_pack(other + (t.x + 16 * i) * PITCH + k);
    }
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[i][j] = fmaf(a[i].x[e], b[j].x[e], s[i][j]);
  }
}
// acc += p other, p through shared memory: a half warp writes and reads its own rows only.
DEVICE void mix(float (&acc)[R][E], const float (&p)[R][R], float *through, const float *other) {
  const Thread t;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < R; j++) through[t.row(i) * P_PITCH + t.x + 16 * j] = p[i][j];
  __syncwarp();
#pragma unroll 2
  for (int n = 0; n < TILE; n += 4) {
    Pack<float> a[R];
#pragma unroll
    for (int i = 0; i < R; i++) a[i] = load_pack(through + t.row(i) * P_PITCH + n);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float b[E];
#pragma unroll
      for (int e = 0; e < E; e += W) {
        const float *from = other + (n + k) * PITCH + t.column(e);
        if constexpr (W == 4) {
          const float4 v = *reinterpret_cast<const float4 *>(from);
          b[e] = v.x, b[e + 1] = v.y, b[e + 2] = v.z, b[e + 3] = v.w;
        } else if constexpr (W == 2) {
          const float2 v = *reinterpret_cast<const float2 *>(from);
          b[e] = v.x, b[e + 1] = v.y;
        } else {
          b[e] = *from;
        }
      }
#pragma unroll
      for (int i = 0; i < R; i++)
#pragma unroll
        for (int e = 0; e < E; e++) acc[i][e] = fmaf(a[i].x[k], b[e], acc[i][e]);
    }
  }
}
DEVICE void clear(float (&acc)[R][E]) {
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int e = 0; e < E; e++) acc[i][e] = 0.0f;
}
template <typename At> DEVICE void store_rows(float *out, const float (&acc)[R][E], const float (&factor)[R], int d, At at) {
  const Thread t;
#pragma unroll
  for (int i = 0; i < R; i++) {
    const i64 to = at(t.row(i));
    if (to < 0) continue;
#pragma unroll
    for (int e = 0; e < E; e++)
      if (t.column(e) < d) out[to + t.column(e)] = acc[i][e] * factor[i];
  }
}
DEVICE float half_warp_sum(float x) {
#pragma unroll
  for (int o = 8; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// The range of what each of the thread's own rows sees; rows past the end see what the last one does.
template <typename Of> DEVICE void ranges(Range (&seen)[R], const Tile &t, Of of) {
#pragma unroll
  for (int i = 0; i < R; i++) seen[i] = of(min(t.first + Thread().row(i), t.end - 1));
}
DEVICE bool sees(const Range &r, int i) { return i >= r.lo && i <= r.hi; }

// A step's keys and values, into the tile at k and the one behind it.
DEVICE void load_keys(float *to, const float *k, const float *v, const Attention &a, const Tile &t, const Visit &visit, int step) {
  const bool local = step >= visit.slot_steps;
  const int start = local ? visit.local + (step - visit.slot_steps) * TILE : step * TILE, end = local ? t.end : visit.slots;
  const i64 apart = local ? 1 : a.stride;
  load_rows<TILE, PITCH, THREADS>(shared_at(to), k, walk_of(a, a.k, apart), start, end, a.d, a.vector);
  load_rows<TILE, PITCH, THREADS>(shared_at(to + OWN), v, walk_of(a, a.v, apart), start, end, a.d, a.vector);
  copies_issued();
}

KERNEL __launch_bounds__(THREADS) attention_forward(const float *q, const float *k, const float *v, float *y, float *lse, Attention a) {
  extern __shared__ __align__(16) u8 memory[];
  const Place p = place_of(a, blockIdx.x, (int)a.row_tiles, (int)a.heads);
  const Tile t = tile_of(a, p.tile, TILE);
  if (t.first >= t.end) return;
  float *own = reinterpret_cast<float *>(memory), *keys = own + OWN, *through = keys + 2 * OWN;
  const int key_head = p.head / (int)a.group;
  const float scale = scale_of(a);
  k += head_at(a.k, p, key_head);
  v += head_at(a.v, p, key_head);
  load_rows<TILE, PITCH, THREADS>(shared_at(own), q + head_at(a.q, p, p.head), walk_of(a, a.q, 1), t.first, t.end, a.d, a.vector);
  const Visit visit = visit_of(a, t, TILE);
  float acc[R][E], top[R], sum[R];
  clear(acc);
#pragma unroll
  for (int i = 0; i < R; i++) top[i] = -infinity(), sum[i] = 0.0f;
  Range seen[R];
  for (int step = 0; step < visit.steps; step++) {
    const bool local = step >= visit.slot_steps;
    if (step == 0 || step == visit.slot_steps) ranges(seen, t, [&](int i) { return local ? locals_of(a, i) : slots_of(a, i); });
    load_keys(keys, k, v, a, t, visit, step);
    copies_wait<0>();
    __syncthreads();
    const int start = (local ? visit.local + (step - visit.slot_steps) * TILE : step * TILE) + Thread().x;
    float s[R][R];
    scores(s, own, keys);
#pragma unroll
    for (int i = 0; i < R; i++) {
      float most = top[i];
#pragma unroll
      for (int j = 0; j < R; j++) {
        s[i][j] = sees(seen[i], start + 16 * j) ? s[i][j] * scale : -infinity();
        most = fmaxf(most, s[i][j]);
      }
#pragma unroll
      for (int o = 8; o > 0; o >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
      const float base = most == -infinity() ? 0.0f : most; // nothing seen yet: all exponentials are 0
      const float shrink = expf(top[i] - base);
      top[i] = most;
      sum[i] *= shrink;
#pragma unroll
      for (int j = 0; j < R; j++) {
        s[i][j] = expf(s[i][j] - base);
        sum[i] += s[i][j];
      }
#pragma unroll
      for (int e = 0; e < E; e++) acc[i][e] *= shrink;
    }
    mix(acc, s, through, keys + OWN);
    __syncthreads();
  }
  float factor[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    sum[i] = half_warp_sum(sum[i]);
    factor[i] = 1.0f / sum[i];
    const int row = t.first + Thread().row(i);
    if (Thread().x == 0 && row < t.end) lse[stat_at(a, p, p.head, row)] = top[i] + logf(sum[i]);
  }
  store_rows(y, acc, factor, (int)a.d,
             [&](int r) { return t.first + r < t.end ? out_at(a, p, t.first + r, a.lq, p.head, a.heads) : -1; });
}

KERNEL __launch_bounds__(THREADS)
attention_backward_rows(const float *q, const float *k, const float *v, const float *y, const float *dy, const float *lse,
                        float *delta, float *dq, float *, float *, Attention a) {
  extern __shared__ __align__(16) u8 memory[];
  const Place p = place_of(a, blockIdx.x, (int)a.row_tiles, (int)a.heads);
  const Tile t = tile_of(a, p.tile, TILE);
  if (t.first >= t.end) return;
  float *own_q = reinterpret_cast<float *>(memory), *own_dy = own_q + OWN, *keys = own_dy + OWN, *through = keys + 2 * OWN;
  const int key_head = p.head / (int)a.group;
  const float scale = scale_of(a);
  k += head_at(a.k, p, key_head);
  v += head_at(a.v, p, key_head);
  load_rows<TILE, PITCH, THREADS>(shared_at(own_q), q + head_at(a.q, p, p.head), walk_of(a, a.q, 1), t.first, t.end, a.d, a.vector);
  load_rows<TILE, PITCH, THREADS>(shared_at(own_dy), dy + head_at(a.dy, p, p.head), walk_of(a, a.dy, 1), t.first, t.end, a.d, a.vector);
  copies_issued();
  copies_wait<0>();
  __syncthreads();
  const Visit visit = visit_of(a, t, TILE);
  float acc[R][E], my_lse[R], my_delta[R];
  clear(acc);
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int r = Thread().row(i), row = t.first + r;
    float sum = 0.0f;
    my_lse[i] = infinity(); // rows past the end: their P is 0
    if (row < t.end) {
      const float *from = y + out_at(a, p, row, a.lq, p.head, a.heads);
      for (int x = Thread().x; x < a.d; x += 16) sum = fmaf(own_dy[r * PITCH + x], from[x], sum);
      my_lse[i] = lse[stat_at(a, p, p.head, row)];
    }
    my_delta[i] = half_warp_sum(sum);
    if (Thread().x == 0 && row < t.end) delta[stat_at(a, p, p.head, row)] = my_delta[i];
  }
  Range seen[R];
  for (int step = 0; step < visit.steps; step++) {
    const bool local = step >= visit.slot_steps;
    if (step == 0 || step == visit.slot_steps) ranges(seen, t, [&](int i) { return local ? locals_of(a, i) : slots_of(a, i); });
    load_keys(keys, k, v, a, t, visit, step);
    copies_wait<0>();
    __syncthreads();
    const int start = (local ? visit.local + (step - visit.slot_steps) * TILE : step * TILE) + Thread().x;
    float s[R][R], ds[R][R];
    scores(s, own_q, keys);
    scores(ds, own_dy, keys + OWN);
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
      for (int j = 0; j < R; j++)
        ds[i][j] = sees(seen[i], start + 16 * j) ? expf(s[i][j] * scale - my_lse[i]) * (ds[i][j] - my_delta[i]) : 0.0f;
    mix(acc, ds, through, keys);
    __syncthreads();
  }
  float factor[R];
#pragma unroll
  for (int i = 0; i < R; i++) factor[i] = scale;
  store_rows(dq, acc, factor, (int)a.d,
             [&](int r) { return t.first + r < t.end ? out_at(a, p, t.first + r, a.lq, p.head, a.heads) : -1; });
}

KERNEL __launch_bounds__(THREADS)
attention_backward_keys(const float *q, const float *k, const float *v, const float *dy, const float *lse, const float *delta,
                        float *dk, float *dv, float *partial, Attention a, int local) {
  extern __shared__ __align__(16) u8 memory[];
  const int key_heads = (int)(a.heads / a.group);
  i64 block = blockIdx.x;
  Place p;
  Tile t; // of keys: slots, or local keys
  int split = 0, first, end; // query rows
  if (local) {
    p = place_of(a, block, (int)a.row_tiles, key_heads);
    t = tile_of(a, p.tile, TILE);
    if (t.first >= t.end) return;
    first = seeing_local(a, t.first).lo;
    end = seeing_local(a, t.end - 1).hi + 1;
  } else {
    p.tile = (int)(block % a.key_tiles), block /= a.key_tiles;
    split = (int)(block % a.splits), block /= a.splits;
    p.head = (int)(block % key_heads), p.batch = (int)(block / key_heads);
    t.first = p.tile * TILE;
    t.end = min(t.first + TILE, (int)((a.lk + a.stride - 1) / a.stride));
    first = max(seeing_slot(a, t.first).lo, (int)(split * a.split_rows));
    end = (int)min(a.lq, (split + 1) * a.split_rows);
    if (first >= end) return;
  }
  float *own_k = reinterpret_cast<float *>(memory), *own_v = own_k + OWN, *rows = own_v + OWN, *through = rows + 2 * OWN;
  float *stats = through + TILE * P_PITCH; // [lse, delta][TILE]
  const float scale = scale_of(a);
  const i64 apart = local ? 1 : a.stride;
  load_rows<TILE, PITCH, THREADS>(shared_at(own_k), k + head_at(a.k, p, p.head), walk_of(a, a.k, apart), t.first, t.end, a.d, a.vector);
  load_rows<TILE, PITCH, THREADS>(shared_at(own_v), v + head_at(a.v, p, p.head), walk_of(a, a.v, apart), t.first, t.end, a.d, a.vector);
  Range seen[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int j = t.first + Thread().row(i);
    const bool none = j >= t.end || (local && opens_block(a, j));
    seen[i] = none ? Range{0, -1} : local ? seeing_local(a, j) : seeing_slot(a, j);
  }
  float acc_k[R][E], acc_v[R][E];
  clear(acc_k);
  clear(acc_v);
  for (int h = p.head * (int)a.group; h < (p.head + 1) * (int)a.group; h++)
    for (int start = first; start < end; start += TILE) {
      load_rows<TILE, PITCH, THREADS>(shared_at(rows), q + head_at(a.q, p, h), walk_of(a, a.q, 1), start, end, a.d, a.vector);
      load_rows<TILE, PITCH, THREADS>(shared_at(rows + OWN), dy + head_at(a.dy, p, h), walk_of(a, a.dy, 1), start, end, a.d, a.vector);
      load_stats<TILE>(shared_at(stats), lse, a, p, h, start, end);
      load_stats<TILE>(shared_at(stats + TILE), delta, a, p, h, start, end);
      copies_issued();
      copies_wait<0>();
      __syncthreads();
      float s[R][R], ds[R][R];
      scores(s, own_k, rows);
      scores(ds, own_v, rows + OWN);
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int c = Thread().x + 16 * j;
        const float my_lse = stats[c], my_delta = stats[TILE + c];
#pragma unroll
        for (int i = 0; i < R; i++) {
          s[i][j] = start + c < end && sees(seen[i], start + c) ? expf(s[i][j] * scale - my_lse) : 0.0f;
          ds[i][j] = s[i][j] * (ds[i][j] - my_delta);
        }
      }
      mix(acc_v, s, through, rows + OWN);
      mix(acc_k, ds, through, rows);
      __syncthreads();
    }
  const bool split_up = a.splits > 1 && !local;
  const int slots = (int)((a.lk + a.stride - 1) / a.stride);
  const i64 all = a.batch * slots * key_heads * a.d;
  const auto to = [&](int r) -> i64 {
    const int j = t.first + r;
    if (j >= t.end || (local && opens_block(a, j))) return -1;
    return split_up ? ((p.batch * (i64)slots + j) * key_heads + p.head) * a.d : out_at(a, p, j * (int)apart, a.lk, p.head, key_heads);
  };
  float factor[R];
#pragma unroll
  for (int i = 0; i < R; i++) factor[i] = scale;
  store_rows(split_up ? partial + split * all : dk, acc_k, factor, (int)a.d, to);
#pragma unroll
  for (int i = 0; i < R; i++) factor[i] = 1.0f;
  store_rows(split_up ? partial + (a.splits + split) * all : dv, acc_v, factor, (int)a.d, to);
}
