// A step of decoding from the fused projection on, in one pass: QK-norm and RoPE (qk_norm_rope.cu), the new key and value into
// the cache (write_rows.cu), and attention to what each row sees of it (cached_attention.cu).
//
//   of row r:  q_h, k_g: heads of joint normed, turned by the row's angles, and rounded to T; v_g as it is
//              k, v[g, seen[1, r] - 1] = k_g, v_g;   y[r, h] = softmax(scale q_h k^T) v over the cache rows
//              seen[0, r] .. seen[1, r] - 1 of head g = h / group
//
//   joint [R, H + 2 Hkv heads of d], rows by their stride, dense inside; weights wq, wk [d], or null: no norms; row r's angles
//   are row index[r] of `table` [positions, n], f32: n/2 cosines, then n/2 sines. k and v [Hkv, T, d], contiguous.
//   seen int64 [2, R]. y [R, H, d], overwritten. d is 64 << width. Rows of all begin on 16 bytes, and n/2 is a
//   multiple of 16 bytes' elements. No row sees another's new row: each takes its own from registers, and whoever writes it into the cache.
//
// The order of sums is that of cached_attention.cu, so that its bits come out. WARPS warps have a query head of a row:
// - cached_step_one: one, which plays all teams by turns and meets no barrier. 128 threads, R by ceil(H / 4) blocks
// - cached_step_four: four, for fewer rows. 128 threads, R by H blocks
// - cached_step_wide: sixteen, a team each, for few rows and runs of up to CHUNK keys. 512 threads, R by H blocks
// Warps and groups without keys do nothing: to join an empty softmax is to add 0 (`join_nothing`).
//
// What bounds it: the keys and values read, of many rows; of few the way from one load to the next. So the first step's keys are
// on their way while heads are normed, the query's and the key's by different lanes at once where a warp has room for both.
//
// CASE as in cached_attention.cuh, packed ones.
#include "cached_attention.cuh"

// 64-bit fields only (ops/cuda/cached_step.rs). key_head: T d. scale and eps are the bits of f32.
struct Step {
  i64 rows, heads, group, n, joint_row, key_head, scale, eps;
};

DEVICE float real(i64 bits) { return __uint_as_float((u32)bits); }

DEVICE float reciprocal_root(float x) {
  float y = rsqrtf(x);
  if constexpr (EXACT) {   // to within rounding; of 0 and infinity there is nothing to mend
    const float off = fmaf(-x * y, y, 1.0f);
    if (off == off) y = fmaf(0.5f * y, off, y);
  }
  return y;
}

// The angles of a lane's columns, and the lane that has the other halves of its pairs. y = z c + other s.
struct Turn {
  Floats<T> c, s;
  int other;
};
DEVICE Turn turn_of(const float *angles, int x, int n) {
  const int half = n / 2, lane = threadIdx.x & 31;
  const bool first = x < half;
  Turn t;
#pragma unroll
  for (int j = 0; j < P; j++) t.c.x[j] = 1.0f, t.s.x[j] = 0.0f;
  t.other = lane;
  if (x >= n) return t;
  t.other = first ? lane + half / P : lane - half / P;
  const float *cosines = angles + (first ? x : x - half), *sines = cosines + half;
#pragma unroll
  for (int j = 0; j < P; j += 4) {
    const Floats<float> c = unpacked<float>(load_words(cosines, j, P)), s = unpacked<float>(load_words(sines, j, P));
#pragma unroll
    for (int i = 0; i < 4; i++) t.c.x[j + i] = c.x[i], t.s.x[j + i] = first ? -s.x[i] : s.x[i];
  }
  return t;
}

// A head, LANES lanes of it, normed, turned and rounded.
DEVICE Words turned(const Words &head, const Words &weight, bool normed, const Turn &t, const Step &a) {
  Floats<T> z = unpacked<T>(head);
  float rstd = 1.0f;
  if (normed) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < P; j++) sum = fmaf(z.x[j], z.x[j], sum);
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    rstd = reciprocal_root(fmaf(sum, 1.0f / D, real(a.eps)));
    const Floats<T> w = unpacked<T>(weight);
#pragma unroll
    for (int j = 0; j < P; j++) z.x[j] *= w.x[j];
  }
  Floats<T> y;
#pragma unroll
  for (int j = 0; j < P; j++) y.x[j] = fmaf(z.x[j], t.c.x[j], __shfl_sync(0xffffffffu, z.x[j], t.other) * t.s.x[j]) * rstd;
  return packed<T>(y);
}
DEVICE Words from_lane(const Words &v, int lane) {
  Words y;
#pragma unroll
  for (int j = 0; j < 4; j++) y.w[j] = __shfl_sync(0xffffffffu, v.w[j], lane);
  return y;
}

// A warp's softmax in shared memory, of all lanes.
typedef float Waiting[E + 2][32];
DEVICE void put(Waiting &to, int lane, const Softmax &s) {
  to[E][lane] = s.top, to[E + 1][lane] = s.sum;
#pragma unroll
  for (int e = 0; e < E; e++) to[e][lane] = s.x[e];
}
DEVICE void join_waiting(Softmax &s, const Waiting &from, int lane) {
  Softmax other = {from[E][lane], from[E + 1][lane]};
#pragma unroll
  for (int e = 0; e < E; e++) other.x[e] = from[e][lane];
  join(s, other);
}

// Softmaxes of whole warps are joined by columns, C a lane.
constexpr int C = D / 32;
struct alignas(C % 4 ? 8 : 16) Some { float x[C]; };
struct alignas(16) Part { float x[D], top, sum; };
struct Columns { float top, sum; Some of; };
DEVICE void put(Part &to, int x, const Softmax &s) {
#pragma unroll
  for (int e = 0; e < E; e += 4) {
    const Floats<float> f = {s.x[e], s.x[e + 1], s.x[e + 2], s.x[e + 3]};
    *reinterpret_cast<Words *>(to.x + x + e) = packed<float>(f);
  }
  to.top = s.top, to.sum = s.sum;
}
DEVICE Columns take(const Part &from, int lane) {
  return {from.top, from.sum, *reinterpret_cast<const Some *>(from.x + C * lane)};
}
DEVICE void join(Columns &s, const Columns &o) {
  const Shares f = joined(s.top, o.top);
  s.sum = mixed(s.sum, o.sum, f);
#pragma unroll
  for (int c = 0; c < C; c++) s.of.x[c] = mixed(s.of.x[c], o.of.x[c], f);
}
// What joining softmaxes of no keys does: it makes zeros positive.
DEVICE void join_nothing(Columns &s) {
  s.sum = __fadd_rn(s.sum, 0.0f);
#pragma unroll
  for (int c = 0; c < C; c++) s.of.x[c] = __fadd_rn(s.of.x[c], 0.0f);
}
struct alignas(C * sizeof(T) < 16 ? C * sizeof(T) : 16) Rounded { T x[C]; };

template <int WARPS>
DEVICE void step(T *y, const T *joint, const T *wq, const T *wk, const float *table, const i64 *index, T *k, T *v,
                 const i64 *seen, const Step &a) {
  constexpr bool BOTH = GROUPS > 1;   // lanes for a query head and a key head
  constexpr int PLAYED = WARPS == TEAMS ? 1 : TEAMS / JOINED;
  constexpr int HEADS = WARPS == 1 ? 4 : 1;   // of a block
  __shared__ Waiting waiting[WARPS == TEAMS ? TEAMS - JOINED : 1];   // of warps whose teams others join
  __shared__ Part parts[JOINED];
  __shared__ Words newest[HEADS * WARPS][2][LANES];                  // key and value
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, x = lane % LANES * P, group = lane / LANES;
  const int me = WARPS == 1 ? 0 : warp, r = blockIdx.x;
  const u32 heads = (u32)a.heads, shared_by = (u32)a.group, head = WARPS == 1 ? blockIdx.y * 4 + warp : blockIdx.y;
  const u32 own = min(head, heads - 1), key_head = shared_by == 1 ? own : own / shared_by;
  const bool normed = wq;
  launch_dependents();
  const bool is_key = BOTH && (group & 1);
  Words weight = {};
  if (normed) weight = load_words(is_key ? wk : wq, x, D);
  await_kernel_before();
  if (head >= heads) return;

  const i64 start = seen[r], end = seen[a.rows + r];
  const u32 key_heads = shared_by == 1 ? heads : heads / shared_by;
  joint += r * a.joint_row;
  const T *new_k = joint + (heads + key_head) * D;
  const Words raw = load_words(is_key ? new_k : joint + own * D, x, D), new_v = load_words(new_k + key_heads * D, x, D);
  const Turn turn = turn_of(table + index[r] * a.n, x, (int)a.n);
  k += key_head * a.key_head, v += key_head * a.key_head;

  // The step of the first chunk's keys that this warp begins with is on its way while heads are normed; the run's last key is not
  // in the cache yet.
  const int first_keys = end - start < CHUNK ? (int)(end - start) - 1 : CHUNK - (end - start == CHUNK);
  Loaded l;
  float query[E];
  fetch(l, k + start * D, v + start * D, D, D, me * STEP + group, first_keys, x, D);
  {
    Words q = turned(raw, weight, normed, turn, a), key;
    if constexpr (BOTH) {
      key = from_lane(q, LANES + lane % LANES);
      q = from_lane(q, lane % LANES);
    } else {
      key = turned(load_words(new_k, x, D), normed ? load_words(wk, x, D) : weight, normed, turn, a);
    }
    const Floats<T> f = unpacked<T>(q);
#pragma unroll
    for (int e = 0; e < E; e++) query[e] = __fmul_rn(f.x[e], real(a.scale) * UNIT);
    if (lane < LANES) {
      newest[warp][0][lane] = key, newest[warp][1][lane] = new_v;
      if (me == 0 && head == key_head * shared_by) {
        store_words(k + (end - 1) * D, x, D, key);
        store_words(v + (end - 1) * D, x, D, new_v);
      }
    }
    __syncwarp();
  }

  Columns total;
  bool fetched = true;
#pragma unroll 1
  for (i64 first = start; first < end; first += CHUNK) {
    const bool last = end - first <= CHUNK;
    const int keys = last ? (int)(end - first) : CHUNK, live = min((keys + STEP - 1) / STEP, JOINED);
    const T *own_k = k + first * D, *own_v = v + first * D;
    // teams t, t + 4, ..
    const auto played = [&](Softmax &s, int t) {
#pragma unroll 1
      for (int n = 0; n < PLAYED && (t + n * JOINED) * STEP < keys; n++) {
        Softmax more;
        clear(more);
#pragma unroll 1
        for (int at = (t + n * JOINED) * STEP; at < keys; at += TEAMS * STEP) {
          if (!fetched) fetch(l, own_k, own_v, D, D, at + group, keys - last, x, D);
          fetched = false;
          if (last && at + STEP >= keys) {
#pragma unroll
            for (int u = 0; u < UNROLL; u++)
              if (at + group + u * GROUPS == keys - 1) l.k[u][0] = newest[warp][0][lane % LANES], l.v[u][0] = newest[warp][1][lane % LANES];
          }
          absorb(more, query, l, at + group, keys);
        }
        if (n == 0) s = more;
        else join(s, more);
      }
    };
    Columns joint_part;
    const auto meet = [&](int t, const Part &part) {
      const Columns c = take(part, lane);
      if (t == 0) joint_part = c;
      else join(joint_part, c);
    };
    if constexpr (WARPS == 1) {
#pragma unroll 1
      for (int t = 0; t < live; t++) {
        Softmax s;
        played(s, t);
        join_groups(s);
        if (lane < LANES) put(parts[warp], x, s);
        __syncwarp();
        meet(t, parts[warp]);
        __syncwarp();
      }
    } else {
      Softmax s;
      played(s, me);
      if constexpr (WARPS == TEAMS) {
        if (keys > JOINED * STEP) {
          if (me >= JOINED) put(waiting[me - JOINED], lane, s);
          __syncthreads();
          if (me < JOINED) {
#pragma unroll 1
            for (int n = 1; n < TEAMS / JOINED && (me + n * JOINED) * STEP < keys; n++)
              join_waiting(s, waiting[me + (n - 1) * JOINED], lane);
          }
        }
      }
      if (me < live) {
        join_groups(s);
        if (lane < LANES) put(parts[me], x, s);
      }
      __syncthreads();
      if (me == 0) {
#pragma unroll 1
        for (int t = 0; t < live; t++) meet(t, parts[t]);
      }
      if (!last) __syncthreads();   // the parts are read before the next chunk's come
    }
    if (live < JOINED) join_nothing(joint_part);
    if (first == start) total = joint_part;
    else join(total, joint_part);
  }
  if (me != 0) return;
  Rounded to;
#pragma unroll
  for (int c = 0; c < C; c++) to.x[c] = from_f32<T>(total.of.x[c] / total.sum);
  *reinterpret_cast<Rounded *>(y + ((i64)r * heads + head) * D + C * lane) = to;
}

// Nothing is `__restrict__`: it must not be read before the wait.
#define STEPPED                                                                                                          \
  (T * y, const T *joint, const T *wq, const T *wk, const float *table, const i64 *index, T *k, T *v, const i64 *seen,   \
   Step a)

KERNEL __launch_bounds__(128, D > 128 ? 5 : 6) cached_step_one STEPPED {
  if constexpr (PACKS == 1) step<1>(y, joint, wq, wk, table, index, k, v, seen, a);
}
KERNEL __launch_bounds__(128, 5) cached_step_four STEPPED {
  if constexpr (PACKS == 1) step<4>(y, joint, wq, wk, table, index, k, v, seen, a);
}
KERNEL __launch_bounds__(512, 1) cached_step_wide STEPPED {
  if constexpr (PACKS == 1) step<16>(y, joint, wq, wk, table, index, k, v, seen, a);
}
