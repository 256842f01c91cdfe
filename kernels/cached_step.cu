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
//   multiple of 16 bytes' elements. No text sees another's new rows, and of cached_step_* no row another's: its own text's are
//   taken from where they were made, whoever writes them into the cache.
//
// The order of operations is that of the kernels that it stands for, so that their bits come out. WARPS warps have a query head
// of a row:
// - cached_step_one: one, which plays all teams by turns and meets no barrier. 128 threads, R by ceil(H / 4) blocks
// - cached_step_four: four, for fewer rows. 128 threads, R by H blocks
// - cached_step_wide: sixteen, a team each, for few rows and runs of up to CHUNK keys. 512 threads, R by H blocks
// Warps and groups without keys do nothing: to join an empty softmax is to add 0 (`join_nothing`).
//
// cached_pairs_*: the same where some texts have two rows, neighbours, of which the second sees what the first does and itself.
// Blocks are dealt to G texts, told by int64 [G, 4] (`Text`) instead of `seen`. Keys are fetched once for both rows, each of
// which has sums of its own: it is, in every bit, as if it were alone.
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

// The angles of a lane's columns, and the lane that has the other halves of its pairs. y = (z c + other s) rstd, with the norm's
// weights in the angles: what qk_norm_rope.cu does, in every bit.
struct Turn {
  Floats<float> c[P / 4], s[P / 4];
  int other;
  bool turns;
};
DEVICE Turn turn_of(const float *angles, int x, int n) {
  const int half = n / 2, lane = threadIdx.x & 31;
  const bool first = x < half;
  Turn t;
#pragma unroll
  for (int j = 0; j < P; j++) t.c[j / 4].x[j % 4] = 1.0f, t.s[j / 4].x[j % 4] = 0.0f;
  t.other = lane, t.turns = x < n;
  if (!t.turns) return t;
  t.other = first ? lane + half / P : lane - half / P;
  const float *cosines = angles + (first ? x : x - half), *sines = cosines + half;
#pragma unroll
  for (int j = 0; j < P; j += 4) {
    t.c[j / 4] = unpacked<float>(load_words(cosines, j, P)), t.s[j / 4] = unpacked<float>(load_words(sines, j, P));
#pragma unroll
    for (int i = 0; i < 4; i++) t.s[j / 4].x[i] = first ? -t.s[j / 4].x[i] : t.s[j / 4].x[i];
  }
  return t;
}
// Zeros where a lane has no pairs.
DEVICE Words others(const Words &v, const Turn &t) {
  Words o;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    o.w[j] = __shfl_sync(0xffffffffu, v.w[j], t.other);
    if (!t.turns) o.w[j] = 0;
  }
  return o;
}

// A head, LANES lanes of it, normed, turned and rounded.
DEVICE Words turned(const Words &head, const Words &weight, bool normed, const Turn &t, const Step &a) {
  const Floats<T> z = unpacked<T>(head), o = unpacked<T>(others(head, t));
  Floats<T> y;
  if (normed) {
    const Floats<T> w = unpacked<T>(weight), v = unpacked<T>(others(weight, t));
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < P; j++) sum = fmaf(z.x[j], z.x[j], sum);
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    const float rstd = reciprocal_root(fmaf(sum, 1.0f / D, real(a.eps)));
#pragma unroll
    for (int j = 0; j < P; j++) {
      const float c = __fmul_rn(t.c[j / 4].x[j % 4], w.x[j]), s = __fmul_rn(t.s[j / 4].x[j % 4], v.x[j]);
      y.x[j] = __fmul_rn(fmaf(z.x[j], c, __fmul_rn(o.x[j], s)), rstd);
    }
  } else {
#pragma unroll
    for (int j = 0; j < P; j++) y.x[j] = fmaf(z.x[j], t.c[j / 4].x[j % 4], __fmul_rn(o.x[j], t.s[j / 4].x[j % 4]));
  }
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

// A text's rows: the first, how many they are, and what the first sees.
struct alignas(16) Text { i64 row, rows, start, end; };

// ROWS: of a text, at most.
template <int WARPS, int ROWS>
DEVICE void step(T *y, const T *joint, const T *wq, const T *wk, const float *table, const i64 *index, T *k, T *v,
                 const i64 *seen, const Step &a) {
  constexpr bool BOTH = GROUPS > 1, ALL = ROWS == 2 && GROUPS > 3;   // lanes for a query head and a key head; for two of each
  constexpr int PLAYED = WARPS == TEAMS ? 1 : TEAMS / JOINED;
  constexpr int HEADS = WARPS == 1 ? 4 : 1;   // of a block
  __shared__ Waiting waiting[WARPS == TEAMS ? TEAMS - JOINED : 1][ROWS];   // of warps whose teams others join
  __shared__ Part parts[JOINED][ROWS];
  __shared__ Words newest[HEADS][ROWS][2][LANES];                          // key and value, of the warp that meets them
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, x = lane % LANES * P, group = lane / LANES;
  const int me = WARPS == 1 ? 0 : warp, place = WARPS == 1 ? warp : 0;
  const u32 heads = (u32)a.heads, shared_by = (u32)a.group, head = WARPS == 1 ? blockIdx.y * 4 + warp : blockIdx.y;
  const u32 own = min(head, heads - 1), key_head = shared_by == 1 ? own : own / shared_by;
  const bool normed = wq;
  launch_dependents();
  const bool is_key = BOTH && (group & 1);
  Words weight = {};
  if (normed) weight = load_words(is_key ? wk : wq, x, D);
  await_kernel_before();
  if (head >= heads) return;

  Text text;
  if constexpr (ROWS == 1) text = {(i64)blockIdx.x, 1, seen[blockIdx.x], seen[a.rows + blockIdx.x]};
  else text = reinterpret_cast<const Text *>(seen)[blockIdx.x];
  const u32 key_heads = shared_by == 1 ? heads : heads / shared_by;
  // where a text has one row, that is taken twice and its second result dropped
  const auto row = [&](int i) { return ROWS == 1 ? text.row : text.row + min(i, (int)text.rows - 1); };
  if constexpr (ROWS == 1) joint += text.row * a.joint_row;
  const T *const new_k = joint + (heads + key_head) * D;
  const auto new_key = [&](int i) { return ROWS == 1 ? new_k : new_k + row(i) * a.joint_row; };
  constexpr int TURNS = ALL ? 1 : ROWS;
  Words raw[TURNS], new_v[ROWS];
  Turn turn[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int of = ALL ? group / 2 : i;
    raw[i] = load_words(is_key ? new_key(of) : joint + (ROWS == 1 ? 0 : row(of) * a.joint_row) + own * D, x, D);
    turn[i] = turn_of(table + index[row(of)] * a.n, x, (int)a.n);
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) new_v[i] = load_words(new_key(i) + key_heads * D, x, D);
  k += key_head * a.key_head, v += key_head * a.key_head;

  // The step of the first chunk's keys that this warp begins with is on its way while heads are normed. The new keys are not in
  // the cache yet.
  Loaded l;
  float query[ROWS][E];
  Words normal;
  fetch(l, k + text.start * D, v + text.start * D, D, D, me * STEP + group, (int)min(text.end - text.start - 1, (i64)CHUNK), x, D);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    if (i < TURNS) normal = turned(raw[i], weight, normed, turn[i], a);
    Words q = normal, key;
    if constexpr (BOTH) {
      const int from = (ALL ? 2 * i * LANES : 0) + lane % LANES;
      q = from_lane(normal, from), key = from_lane(normal, LANES + from);
    } else {
      key = turned(load_words(new_key(i), x, D), normed ? load_words(wk, x, D) : weight, normed, turn[i], a);
    }
    const Floats<T> f = unpacked<T>(q);
#pragma unroll
    for (int e = 0; e < E; e++) query[i][e] = __fmul_rn(f.x[e], real(a.scale) * UNIT);
    if (lane < LANES && i < text.rows) {
      const i64 at = text.end - 1 + i;
      if ((u32)(at - text.start) / STEP % WARPS == me) newest[place][i][0][lane] = key, newest[place][i][1][lane] = new_v[i];
      if (me == 0 && head == key_head * shared_by) {
        // indexed by packs: where the compiler adds up elements itself it loses their alignment, and stores word by word
        reinterpret_cast<Words *>(k + at * D)[(u32)(x / P)] = key;
        reinterpret_cast<Words *>(v + at * D)[(u32)(x / P)] = new_v[i];
      }
    }
  }
  __syncwarp();

  constexpr int MINE = WARPS == 1 ? ROWS : 1;   // rows whose parts a warp joins: all, or that of its number
  Columns total[MINE];
  bool fetched = true;
  const i64 end = text.end + text.rows - 1;
#pragma unroll 1
  for (i64 first = text.start; first < end; first += CHUNK) {
    const bool last = end - first <= CHUNK, newer = ROWS == 1 ? last : text.end - first <= CHUNK;
    int keys[ROWS];   // that a row sees of the chunk; in the cache are all of the first's, but for its own (`newer`)
    keys[0] = newer ? (int)(text.end - first) : CHUNK;
    if constexpr (ROWS == 2) keys[1] = text.rows == 1 ? 0 : last ? (int)(end - first) : CHUNK;
    const int most = ROWS == 1 ? keys[0] : max(keys[0], keys[ROWS - 1]), live = min((most + STEP - 1) / STEP, JOINED);
    const int own_keys = me == 0 ? keys[0] : me == ROWS - 1 ? keys[ROWS - 1] : 0;
    const T *own_k = k + first * D, *own_v = v + first * D;
    // teams t, t + 4, ..
    const auto played = [&](Softmax (&s)[ROWS], int t) {
#pragma unroll 1
      for (int n = 0; n < PLAYED && (t + n * JOINED) * STEP < most; n++) {
        Softmax more[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) clear(more[i]);
#pragma unroll 1
        for (int at = (t + n * JOINED) * STEP; at < most; at += TEAMS * STEP) {
          if (!fetched) fetch(l, own_k, own_v, D, D, at + group, keys[0] - newer, x, D);
          fetched = false;
          // A row's key comes in when the row before is done with the step, which gets zeros there, as where it is alone.
#pragma unroll
          for (int i = 0; i < ROWS; i++) {
            if (ROWS > 1 && at >= keys[i]) continue;
            if (newer && at + STEP >= keys[0] + i) {
#pragma unroll
              for (int u = 0; u < UNROLL; u++)
                if (at + group + u * GROUPS == keys[0] - 1 + i)
                  l.k[u][0] = newest[place][i][0][lane % LANES], l.v[u][0] = newest[place][i][1][lane % LANES];
            }
            absorb(more[i], query[i], l, at + group, keys[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          if (n == 0) s[i] = more[i];
          else if (ROWS == 1 || (t + n * JOINED) * STEP < keys[i]) join(s[i], more[i]);
        }
      }
    };
    Columns joint_part[MINE];
    const auto meet = [&](Columns &to, int t, const Part &part) {
      const Columns c = take(part, lane);
      if (t == 0) to = c;
      else join(to, c);
    };
    if constexpr (WARPS == 1) {
#pragma unroll 1
      for (int t = 0; t < live; t++) {
        Softmax s[ROWS];
        played(s, t);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          join_groups(s[i]);
          if (lane < LANES) put(parts[warp][i], x, s[i]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROWS; i++)
          if (ROWS == 1 || t * STEP < keys[i]) meet(joint_part[i], t, parts[warp][i]);
        __syncwarp();
      }
    } else {
      Softmax s[ROWS];
      played(s, me);
      if constexpr (WARPS == TEAMS) {
        if (most > JOINED * STEP) {
#pragma unroll
          for (int i = 0; i < ROWS; i++)
            if (me >= JOINED) put(waiting[me - JOINED][i], lane, s[i]);
          __syncthreads();
          if (me < JOINED) {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll 1
              for (int n = 1; n < TEAMS / JOINED && (me + n * JOINED) * STEP < keys[i]; n++)
                join_waiting(s[i], waiting[me + (n - 1) * JOINED][i], lane);
          }
        }
      }
      if (me < live) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          join_groups(s[i]);
          if (lane < LANES) put(parts[me][i], x, s[i]);
        }
      }
      __syncthreads();
      if (me < ROWS) {
#pragma unroll 1
        for (int t = 0; t < JOINED && t * STEP < own_keys; t++) meet(joint_part[0], t, parts[t][me]);
      }
      if (!last) __syncthreads();   // the parts are read before the next chunk's come
    }
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const int seen_here = WARPS == 1 ? keys[i] : own_keys;
      if (ROWS > 1 && seen_here == 0) continue;
      if (seen_here <= (JOINED - 1) * STEP) join_nothing(joint_part[i]);
      if (first == text.start) total[i] = joint_part[i];
      else join(total[i], joint_part[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const int at = WARPS == 1 ? i : me;
    if (at >= text.rows) return;
    Rounded to;
#pragma unroll
    for (int c = 0; c < C; c++) to.x[c] = from_f32<T>(total[i].of.x[c] / total[i].sum);
    reinterpret_cast<Rounded *>(y)[((text.row + at) * heads + head) * (D / C) + lane] = to;
  }
}

// Nothing is `__restrict__`: it must not be read before the wait.
#define STEPPED                                                                                                          \
  (T * y, const T *joint, const T *wq, const T *wk, const float *table, const i64 *index, T *k, T *v, const i64 *seen,   \
   Step a)

KERNEL __launch_bounds__(128, D > 128 ? 5 : 6) cached_step_one STEPPED {
  if constexpr (PACKS == 1) step<1, 1>(y, joint, wq, wk, table, index, k, v, seen, a);
}
KERNEL __launch_bounds__(128, 5) cached_step_four STEPPED {
  if constexpr (PACKS == 1) step<4, 1>(y, joint, wq, wk, table, index, k, v, seen, a);
}
KERNEL __launch_bounds__(512, 1) cached_step_wide STEPPED {
  if constexpr (PACKS == 1) step<16, 1>(y, joint, wq, wk, table, index, k, v, seen, a);
}
KERNEL __launch_bounds__(128, D > 128 ? 3 : 4) cached_pairs_one STEPPED {
  if constexpr (PACKS == 1) step<1, 2>(y, joint, wq, wk, table, index, k, v, seen, a);
}
KERNEL __launch_bounds__(128, D > 128 ? 3 : 4) cached_pairs_four STEPPED {
  if constexpr (PACKS == 1) step<4, 2>(y, joint, wq, wk, table, index, k, v, seen, a);
}
KERNEL __launch_bounds__(512, 1) cached_pairs_wide STEPPED {
  if constexpr (PACKS == 1) step<16, 2>(y, joint, wq, wk, table, index, k, v, seen, a);
}
