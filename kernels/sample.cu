// The next token of every row of logits [rows, limit] (dense rows, `stride` apart), by temperature, top-k, min-p, top-p and a
// number u in [0, 1), each row by its own; NaN counts as minus infinity. Nothing is differentiated, nothing saved; ids [rows]
// int64 are written.
//
// Candidates are ordered as IEEE's total order has it, the likeliest first, of equals the lowest id: by `order_key`, unsigned
// integers in the order of the floats, then by id. A candidate weighs e^((x - max) / temperature), taken in f64 and rounded to
// a multiple of 1 / scale, scale = 2^(62 - ceil log2 limit): weights are integers, so their sums are exact, in any order,
// and no cumulative weight depends on how it was added. (A sum of floats in one order crosses a bound elsewhere only where it
// comes within rounding of it.) Weights below half of 1 / scale (about 2^-46 of the largest, for 50k tokens) count as 0.
//
//   greedy    temperature 0, top_k 1, or a maximum that is not finite: the first of the largest
//   top-k     the first k candidates: the key of the k-th, and the last id among those that tie with it
//   min-p     of these, those that weigh at least min_p, the largest weighing 1
//   top-p     the fewest first candidates that weigh at least p of all; then the first whose cumulative weight, in that order,
//             exceeds u times theirs. Without top-p the order is that of ids
//
// The n-th candidate of an order (by count or weight) is found without sorting: `select` finds its key two bits a pass, by
// sums over the keys at or above three thresholds; `first_reaching` finds its id among equals, cutting the row in as many
// pieces as there are warps, again and again.
//
// penalize: before that, logits of tokens that occurred already are divided by the penalty where positive and multiplied where
// not, in place, and rounded to T.
// log_probs: log_softmax of a row at its id, and the `top` largest of it with their ids, of equals the lowest id first; the sum
// is of integers as above.
//
// Launch: a block of 1024 threads a row. weights [rows, limit] is scratch. sample_greedy: for rows that are all greedy.
//
// A greedy row is bound by the reading of it: threads keep no more than the largest of what they meet and where the 16 bytes
// begin that hold it, and look into those only where they win.
#include "rows.cuh"

constexpr int BITS = 8 * sizeof(T);
constexpr int WARPS = 32;

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE u32 bits_of(bf16 x) { return x.bits; }
DEVICE u32 bits_of(f16 x) { return x.bits; }

DEVICE float clean(T x) {
  const float f = to_f32(x);
  return f != f ? -infinity() : f;
}
DEVICE u32 order_key(T x) {
  constexpr u32 SIGN = 1u << (BITS - 1), ALL = SIGN | (SIGN - 1);
  const float f = to_f32(x);
  const u32 b = bits_of(f != f ? from_f32<T>(-infinity()) : x);
  return b & SIGN ? ~b & ALL : b | SIGN;
}

// The larger of two elements each; of a NaN and a number the number.
DEVICE u32 larger2(u32 a, u32 b) {
  u32 y;
  if constexpr (Same<T, bf16>::value) asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
// The largest of 16 bytes' elements: a NaN if they all are.
DEVICE float most_of(const Words &v) {
  if constexpr (Same<T, float>::value) {
    const Floats<float> f = unpacked<float>(v);
    return fmaxf(fmaxf(f.x[0], f.x[1]), fmaxf(f.x[2], f.x[3]));
  } else {
    const u32 both = larger2(larger2(v.w[0], v.w[1]), larger2(v.w[2], v.w[3]));
    return fmaxf(to_f32(T{(u16)both}), to_f32(T{(u16)(both >> 16)}));
  }
}

// The largest element of a row and its place, for every thread of the block: of equals the first. Rows may begin anywhere, and
// have fewer than 2^32 elements. `shared` is not to be used again before the block's next barrier.
DEVICE Largest largest_of(const T *row, u32 limit, u32 (&shared)[2][WARPS]) {
  constexpr int N = Pack<T>::N, UNROLL = 4;
  const u32 me = threadIdx.x, lane = me & 31, warp = me >> 5;
  const u32 head = min((u32)(16 - ((u64)row & 15)) % 16 / (u32)sizeof(T), limit);   // elements before the first whole 16 bytes
  const int packs = (int)((limit - head) / N);
  const u32 tail = head + packs * N;
  // from the end on, so that of equals the first is met last
  float best = me < limit - tail ? to_f32(row[tail + me]) : -infinity();
  u32 at = tail + me;
  if (best != best) best = -infinity();
  const Words *from = reinterpret_cast<const Words *>(row + head);
#pragma unroll 1
  for (int p = packs - 1 - (int)me; p >= 0; p -= UNROLL * 32 * WARPS) {
    Words v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) v[u] = from[max(p - u * 32 * WARPS, 0)];   // the first again: that changes nothing
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const float most = most_of(v[u]);
      if (most >= best) best = most, at = head + max(p - u * 32 * WARPS, 0) * N;
    }
  }
  if (me < head) {
    const float most = to_f32(row[me]);
    if (most >= best) best = most, at = me;
  }
  // unsigned integers in the order of the floats; adding 0 makes one of both zeros
  const u32 bits = __float_as_uint(best + 0.0f);
  u32 key = bits >> 31 ? ~bits : bits | 1u << 31;
#pragma unroll
  for (int round = 0; round < 2; round++) {
    const u32 most = __reduce_max_sync(0xffffffffu, key);
    at = __reduce_min_sync(0xffffffffu, key == most ? at : 0xffffffffu);
    key = most;
    if (round == 1) break;
    if (lane == 0) shared[0][warp] = key, shared[1][warp] = at;
    __syncthreads();
    key = shared[0][lane], at = shared[1][lane];
  }
  const float most = __uint_as_float(key >> 31 ? key ^ 1u << 31 : ~key);
  if (most == -infinity()) return {most, 0};
  const float x = lane < N && at + lane < limit ? to_f32(row[at + lane]) : -infinity();
  const int first_of = __ffs(__ballot_sync(0xffffffffu, x == most)) - 1;
  return {__shfl_sync(0xffffffffu, x, first_of), (i64)at + first_of};   // of both zeros the one that is there
}

DEVICE u64 warp_total(u64 x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
// Sums over the block, for every thread.
template <int K> DEVICE void block_totals(u64 (&x)[K], u64 *shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int k = 0; k < K; k++) {
    x[k] = warp_total(x[k]);
    if (lane == 0) shared[k * WARPS + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; k++) x[k] = warp_total(shared[k * WARPS + lane]);
  __syncthreads();
}

// With W(key) the weight of all tokens whose key is at least `key`: the largest key with W(key) >= wanted, and above =
// W(key + 1) < wanted. Needs 0 < wanted <= W(0).
struct Threshold {
  u32 key;
  u64 above;
};
template <typename F> DEVICE Threshold select(const T *row, i64 n, u64 wanted, F weight, u64 *shared) {
  u32 key = 0;
  u64 above = 0;   // W(key + 4 << bit)
  for (int bit = BITS - 2; bit >= 0; bit -= 2) {
    u64 sums[3] = {};   // of digits 1 and up, 2 and up, 3
#pragma unroll 4
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
      const u32 k = order_key(row[i]);
      const u32 digit = (k - key) >> bit;
      if (k < key || digit == 0 || digit > 3) continue;
      const u64 w = weight(i);
      sums[0] += w;
      if (digit > 1) sums[1] += w;
      if (digit > 2) sums[2] += w;
    }
    block_totals(sums, shared);
    if (above + sums[2] >= wanted) {
      key += 3u << bit;
    } else if (above + sums[1] >= wanted) {
      key += 2u << bit;
      above += sums[2];
    } else if (above + sums[0] >= wanted) {
      key += 1u << bit;
      above += sums[1];
    } else {
      above += sums[0];
    }
  }
  return {key, above};
}

// The lowest i with value(0) + .. + value(i) >= wanted. Needs 0 < wanted <= the sum of all n.
template <typename F> DEVICE i64 first_reaching(i64 n, u64 wanted, F value, u64 *shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  i64 begin = 0, end = n;
  while (end - begin > 1) {
    const i64 size = (end - begin + WARPS - 1) / WARPS;
    const i64 from = begin + warp * size, to = from + size < end ? from + size : end;
    u64 sum = 0;
    for (i64 i = from + lane; i < to; i += 32) sum += value(i);
    sum = warp_total(sum);
    if (lane == 0) shared[warp] = sum;
    __syncthreads();
    int piece = 0;
    for (; piece + 1 < WARPS && shared[piece] < wanted; piece++) wanted -= shared[piece];
    __syncthreads();
    begin += piece * size;
    end = begin + size < end ? begin + size : end;
  }
  return begin < n ? begin : n - 1;
}

// What a row is drawn by.
struct How {
  double temperature, top_p, min_p, uniform;
  i64 top_k;
};

// One block of the f32 form has a multiprocessor: two would not have registers enough.
KERNEL __launch_bounds__(32 * WARPS, Same<T, float>::value ? 1 : 2)
sample_greedy(i64 *ids, const T *logits, i64 stride, i64 limit) {
  __shared__ u32 largest[2][WARPS];
  begin_early();
  const Largest best = largest_of(logits + blockIdx.x * stride, (u32)limit, largest);
  if (threadIdx.x == 0) ids[blockIdx.x] = best.at;
}

KERNEL __launch_bounds__(32 * WARPS, 1)
sample(i64 *ids, u64 *weights, const T *logits, i64 stride, i64 limit, const How *how,
       double scale) {
  __shared__ u32 largest[2][WARPS];
  __shared__ u64 shared[3 * WARPS];
  begin_early();
  const T *row = logits + blockIdx.x * stride;
  const auto [temperature, top_p, min_p, uniform, top_k] = how[blockIdx.x];
  weights += blockIdx.x * limit;

  const Largest best = largest_of(row, (u32)limit, largest);
  if (temperature == 0.0 || top_k == 1 || best.x == infinity() || best.x == -infinity()) {
    if (threadIdx.x == 0) ids[blockIdx.x] = best.at;
    return;
  }

  // candidates: keys above least, and at least up to the id last
  u32 least = 0;
  i64 last = limit - 1;
  if (top_k > 0 && top_k < limit) {
    const Threshold kth = select(row, limit, (u64)top_k, [](i64) { return (u64)1; }, shared);
    least = kth.key;
    last = first_reaching(limit, (u64)top_k - kth.above, [&](i64 i) { return (u64)(order_key(row[i]) == least); }, shared);
  }
  u64 total[1] = {};
  for (i64 i = threadIdx.x; i < limit; i += blockDim.x) {
    const u32 key = order_key(row[i]);
    u64 w = 0;
    if (key > least || (key == least && i <= last)) {
      const double x = exp(((double)clean(row[i]) - (double)best.x) / temperature);
      if (x >= min_p) w = __double2ull_rn(x * scale);
    }
    weights[i] = w;
    total[0] += w;
  }
  block_totals(total, shared);   // and every weight is visible to the block

  const auto weight = [&](i64 i) { return weights[i]; };
  // How many tokens of a threshold's key it takes to reach `wanted`, what each weighs, and which they are. All that are
  // candidates weigh the same, and they have the lowest ids.
  const auto is_tied = [&](const Threshold &t) { return [&row, key = t.key](i64 i) { return (u64)(order_key(row[i]) == key); }; };
  const auto tied_weight = [&](const Threshold &t) { return weights[first_reaching(limit, 1, is_tied(t), shared)]; };
  const auto tied_count = [](const Threshold &t, u64 wanted, u64 each) { return (wanted - t.above + each - 1) / each; };

  u64 kept = total[0];
  if (top_p < 1.0) {
    u64 wanted = (u64)ceil(top_p * (double)kept);
    wanted = wanted < 1 ? 1 : wanted > kept ? kept : wanted;
    const Threshold t = select(row, limit, wanted, weight, shared);
    const u64 each = tied_weight(t);
    kept = t.above + tied_count(t, wanted, each) * each;
  }
  u64 wanted = (u64)(uniform * (double)kept) + 1;
  wanted = wanted > kept ? kept : wanted;
  i64 id;
  if (top_p < 1.0) {
    const Threshold t = select(row, limit, wanted, weight, shared);
    id = first_reaching(limit, tied_count(t, wanted, tied_weight(t)), is_tied(t), shared);
  } else {
    id = first_reaching(limit, wanted, weight, shared);
  }
  if (threadIdx.x == 0) ids[blockIdx.x] = id;
}

// lists [gridDim.x, words]: the row, the penalty (f32 bits), and a bit for each id.
KERNEL penalize(T *logits, i64 stride, i64 limit, const u64 *__restrict__ lists, i64 words) {
  lists += blockIdx.x * words;
  T *row = logits + lists[0] * stride;
  const float penalty = __uint_as_float((u32)lists[1]);
  for (i64 i = threadIdx.x; i < limit; i += blockDim.x) {
    if (!(lists[2 + i / 64] >> (i % 64) & 1)) continue;
    const float x = to_f32(row[i]);
    row[i] = from_f32<T>(x > 0.0f ? x / penalty : x * penalty);
  }
}

// out [rows, 1 + 2 top], f64 but for the ids: the log-probability of ids[row], then (id, log-probability) of the likeliest.
KERNEL __launch_bounds__(32 * WARPS, 1)
log_probs(i64 *__restrict__ out, const T *__restrict__ logits, i64 stride, i64 limit, const i64 *__restrict__ ids, i64 top,
          double scale) {
  __shared__ Largest largest[WARPS];
  __shared__ u32 first[2][WARPS];
  __shared__ u64 shared[WARPS];
  const T *row = logits + blockIdx.x * stride;
  out += blockIdx.x * (1 + 2 * top);
  const Team block = {(i64)blockIdx.x, (int)threadIdx.x, (int)blockDim.x};
  Largest best = largest_of(row, (u32)limit, first);
  u64 total[1] = {};
  for (i64 i = threadIdx.x; i < limit; i += blockDim.x)
    total[0] += __double2ull_rn(exp((double)clean(row[i]) - (double)best.x) * scale);
  block_totals(total, shared);
  const double norm = (double)best.x + log((double)total[0] / scale);
  if (threadIdx.x == 0) out[0] = __double_as_longlong((double)clean(row[ids[blockIdx.x]]) - norm);
  for (i64 n = 0; n < top; n++) {
    if (threadIdx.x == 0) {
      out[1 + 2 * n] = best.at;
      out[2 + 2 * n] = __double_as_longlong((double)best.x - norm);
    }
    Largest next = NOTHING;
    for (i64 i = threadIdx.x; i < limit; i += blockDim.x) {
      const float x = clean(row[i]);
      if (x < best.x || (x == best.x && i > best.at)) next = larger(next, {x, i});
    }
    best = team_largest(block, next, largest);
  }
}
