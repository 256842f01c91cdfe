// Attention of new rows to a cache's: y = softmax(scale q k^T) v over the run of cache rows that each new row sees.
//
//   q [batch, H, n, d] by its strides, rows dense; row r = b n + i sees cache rows seen[0, r] .. seen[1, r] - 1 (int64
//   [2, batch n]). k and v [Hkv, T, d] by their strides, rows dense: of T or, in the modules for 8-bit caches, of int8 and times
//   an f32 scale a row, k_scales and v_scales [Hkv, T] dense. y lies as [batch, n, H, d], overwritten.
//
// Reading keys and values once is all the cost, so loads are all that the kernel is built for: 16 bytes a lane (8 of int8), a
// row of d elements across LANES lanes, GROUPS rows in a load of a warp, UNROLL loads of k and as many of v on their way at once.
//
// A row's result depends on nothing but its query and its keys, in any bit, whatever the launch. So the order of its sums
// is fixed by its own run, and threads are dealt out after it:
// - the run is cut into chunks of CHUNK keys, and a chunk into steps of STEP keys, dealt to TEAMS teams in turn;
// - a team has GROUPS online softmaxes in f32, one a group of lanes, each over the keys that it meets;
// - joined are first teams t, t + 4, t + 8, t + 12, then the groups, then t = 0 .. 3, then the chunks, one after the other.
//
// - cached_attention_one, _two, _four (R): 128 threads, ceil(group / R) * Hkv * batch n blocks: a block reads a whole run for R
//   query heads that share its keys. Its four warps play four teams each.
// - cached_attention_wide: 512 threads, H * batch n by `chunks` blocks, for few rows: a warp is a team, and a block reads one
//   chunk. Blocks past a run's end leave at once, so `chunks` may be anything that no run passes. If it is 1, y is done, else
//   f32 partial [batch n, H, chunks, d + 2] is what is left: the sum of v in units of the largest score's, that score, the sum
//   of powers.
// - cached_attention_join: y from it. Launch: for_each(batch n * H * d).
//
// CASE: 6 * int8 + 2 * width + packed; heads are at most 64 << width wide, and packed ones of q, k and v begin and end on 16
// bytes, int8 ones on 8.
#include "cached_attention.cuh"

// 64-bit fields only (`forward` in ops/cuda/cached_attention.rs).
struct Cached {
  i64 rows, n, heads, group, d, q_batch, q_head, q_row, k_head, k_row, v_head, v_row, chunks, scale_bits;
  const float *k_scales, *v_scales;   // of int8
  i64 scales_head;
};
constexpr int Q = P < Pack<T>::N ? P : Pack<T>::N;   // of a query at a time

// Rows of a key head.
struct Rows {
  const S *x;
  i64 stride;
  const float *scales;
};
DEVICE Rows rows_from(const Rows &rows, i64 first) { return {rows.x + first * rows.stride, rows.stride, rows.scales + first}; }

// A team's keys of a chunk, for R queries. k and v begin at the chunk's first row.
template <int R>
DEVICE void play(Softmax (&s)[R], const float (&query)[R][E], const Rows &k, const Rows &v, int team, int keys, int x, int d) {
  const int group = (threadIdx.x & 31) / LANES;
#pragma unroll 1
  for (int at = team * STEP; at < keys; at += TEAMS * STEP) {
    Loaded l;
    fetch(l, k.x, v.x, k.stride, v.stride, at + group, keys, x, d);
#if INT8
    fetch_scales(l, k.scales, v.scales, at + group, keys);
#endif
#pragma unroll
    for (int r = 0; r < R; r++) absorb(s[r], query[r], l, at + group, keys);
  }
}

// The run of row `r` for R query heads from `head` on, or its chunk of that number (chunk < 0: all of them).
template <int R, int WARPS>
DEVICE void attend(T *y, const T *q, const S *k, const S *v, const i64 *seen, float *partial, const Cached &a, int r, int head,
                   int chunk) {
  constexpr int THREADS = 32 * WARPS, PLAYED = TEAMS / JOINED, WAITING = WARPS > JOINED ? WARPS - JOINED : 1;
  __shared__ float waiting[WAITING][E + 2][32];              // of warps whose teams others join
  __shared__ float tops[JOINED][R], sums[JOINED][R], parts[JOINED][R][D];
  __shared__ float all_top[R][D], all_sum[R][D], all[R][D];  // chunks so far; each column knows its own
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, x = lane % LANES * P, d = (int)a.d;
  const i64 start = seen[r] + (chunk > 0 ? (i64)chunk * CHUNK : 0), end = seen[a.rows + r];
  if (start >= end) return;
  const int heads = (int)a.heads, group = (int)a.group, spare = group - head % group;   // heads that share the keys from here on
  const float scale = __uint_as_float((u32)a.scale_bits) * UNIT;
  float query[R][E];
#pragma unroll
  for (int i = 0; i < R; i++) {
    const T *from = q + (u32)r / (u32)a.n * a.q_batch + (head + min(i, spare - 1)) * a.q_head + (u32)r % (u32)a.n * a.q_row;
#pragma unroll
    for (int p = 0; p < E / Q; p++) {
      const Floats<T> some = unpacked<T>(load_words(from, column(x, p * Q), d));
#pragma unroll
      for (int e = 0; e < Q; e++) query[i][p * Q + e] = __fmul_rn(some.x[e], scale);
    }
  }
  const i64 key_head = (u32)head / (u32)group;
  const Rows all_k = {k + key_head * a.k_head, a.k_row, a.k_scales + key_head * a.scales_head};
  const Rows all_v = {v + key_head * a.v_head, a.v_row, a.v_scales + key_head * a.scales_head};

#pragma unroll 1
  for (i64 first = start; first < end; first += CHUNK) {
    const int keys = end - first < CHUNK ? (int)(end - first) : CHUNK;
    const bool last = chunk >= 0 || end - first <= CHUNK;
    const Rows own_k = rows_from(all_k, first), own_v = rows_from(all_v, first);
    Softmax s[R];
    if constexpr (WARPS == JOINED) {
#pragma unroll 1
      for (int n = 0; n == 0 || n < PLAYED && (warp + n * JOINED) * STEP < keys; n++) {
        Softmax more[R];
#pragma unroll
        for (int i = 0; i < R; i++) clear(more[i]);
        play<R>(more, query, own_k, own_v, warp + n * JOINED, keys, x, d);
#pragma unroll
        for (int i = 0; i < R; i++) {
          if (n == 0) s[i] = more[i];
          else join(s[i], more[i]);
        }
      }
    } else {
      static_assert(R == 1 && WARPS == TEAMS);
      clear(s[0]);
      play<R>(s, query, own_k, own_v, warp, keys, x, d);
      if (warp >= JOINED) {
        float(&to)[E + 2][32] = waiting[warp - JOINED];
        to[E][lane] = s[0].top, to[E + 1][lane] = s[0].sum;
#pragma unroll
        for (int e = 0; e < E; e++) to[e][lane] = s[0].x[e];
      }
      __syncthreads();
      if (warp < JOINED) {
#pragma unroll 1
        for (int n = 1; n < PLAYED && (warp + n * JOINED) * STEP < keys; n++) {
          const float(&from)[E + 2][32] = waiting[warp + (n - 1) * JOINED];
          Softmax more = {from[E][lane], from[E + 1][lane]};
#pragma unroll
          for (int e = 0; e < E; e++) more.x[e] = from[e][lane];
          join(s[0], more);
        }
      }
    }
    if (warp < JOINED) {
#pragma unroll
      for (int i = 0; i < R; i++) {
        join_groups(s[i]);
        if (lane == 0) tops[warp][i] = s[i].top, sums[warp][i] = s[i].sum;
        if (lane < LANES) {
#pragma unroll
          for (int e = 0; e < E; e++) parts[warp][i][column(x, e)] = s[i].x[e];
        }
      }
    }
    __syncthreads();
    for (int n = threadIdx.x; n < R * D; n += THREADS) {
      const int i = n / D, c = n % D;
      if (i >= spare || c >= d) continue;
      float top = tops[0][i], sum = sums[0][i], value = parts[0][i][c];   // warp 0 has a key
#pragma unroll
      for (int w = 1; w < JOINED; w++) {
        const Shares f = joined(top, tops[w][i]);
        sum = mixed(sum, sums[w][i], f);
        value = mixed(value, parts[w][i][c], f);
      }
      const i64 pair = (i64)r * heads + head + i;
      if (chunk >= 0 && a.chunks > 1) {
        float *to = partial + (pair * a.chunks + chunk) * (d + 2);
        to[c] = value;
        if (c == 0) to[d] = top, to[d + 1] = sum;
        continue;
      }
      if (first > start) {
        float before = all_top[i][c];
        const Shares f = joined(before, top);
        top = before;
        sum = mixed(all_sum[i][c], sum, f);
        value = mixed(all[i][c], value, f);
      }
      if (last) y[pair * d + c] = from_f32<T>(value / sum);
      else all_top[i][c] = top, all_sum[i][c] = sum, all[i][c] = value;
    }
    if (last) return;
    __syncthreads();   // the parts are read before the next chunk's come
  }
}

template <int R>
DEVICE void attend_whole(T *y, const T *q, const S *k, const S *v, const i64 *seen, const Cached &a) {
  begin_early();
  const u32 group = (u32)a.group, shares = (group + R - 1) / R, key_heads = (u32)a.heads / group;   // of a key head: blocks
  const u32 block = blockIdx.x / shares, r = block / key_heads, head = block % key_heads * group + blockIdx.x % shares * R;
  attend<R, JOINED>(y, q, k, v, seen, nullptr, a, (int)r, (int)head, -1);
}

#define PARAMETERS \
  T *y, const T *q, const S *k, const S *v, const i64 *seen

KERNEL __launch_bounds__(128, PACKED ? 6 : 4) cached_attention_one(PARAMETERS, Cached a) { attend_whole<1>(y, q, k, v, seen, a); }
KERNEL __launch_bounds__(128, 3) cached_attention_two(PARAMETERS, Cached a) { attend_whole<2>(y, q, k, v, seen, a); }
KERNEL __launch_bounds__(128, 2) cached_attention_four(PARAMETERS, Cached a) { attend_whole<4>(y, q, k, v, seen, a); }

KERNEL __launch_bounds__(512, 1) cached_attention_wide(PARAMETERS, float *partial, Cached a) {
  begin_early();
  const u32 heads = (u32)a.heads;
  attend<1, TEAMS>(y, q, k, v, seen, partial, a, (int)(blockIdx.x / heads), (int)(blockIdx.x % heads), (int)blockIdx.y);
}

KERNEL cached_attention_join(T *y, const float *partial, const i64 *seen, i64 rows, i64 heads, i64 d, i64 chunks) {
  begin_early();
  for (i64 e = thread_index(); e < rows * heads * d; e += thread_count()) {
    const i64 pair = (u64)e / (u32)d, c = e - pair * d, r = (u64)pair / (u32)heads;
    const float *from = partial + pair * chunks * (d + 2);
    const i64 last = (seen[rows + r] - seen[r] - 1) / CHUNK;
    float top = from[d], sum = from[d + 1], value = from[c];
#pragma unroll 4
    for (i64 n = 1; n <= last; n++) {
      from += d + 2;
      const Shares f = joined(top, from[d]);
      sum = mixed(sum, from[d + 1], f);
      value = mixed(value, from[c], f);
    }
    y[e] = from_f32<T>(value / sum);
  }
}
