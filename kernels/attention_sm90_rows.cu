// Attention backward on Hopper: the pass over query rows (wgmma, tensor copies). The pass over keys, after it, is
// attention_sm90_keys.cu; masks and tiles are explained in attention.cuh, tensor maps in attention_sm90.cuh.
//
//   P = exp(scale q k^T - lse)     delta = sum(dy y)     dS = P (dy v^T - delta)
//   dq = scale dS k                and of local keys: dv = P^T dy     dk = scale dS^T q
//
// A block takes a tile of ROWS = 128 query rows of one head, 64 a warpgroup: q and dy stay in shared memory, k and v stream
// past, 64 keys a step, local keys first. With `local_keys` (one query head a key head, whole blocks in a tile) only these
// rows see the tile's local keys: dk and dv of 64 of them a warpgroup come before dq, out of k q^T and v dy^T, 32 rows at a
// time. Writes delta [B, H, Lq], f32, and dq, dk, dv, which lie as [B, L, heads, d]; reads y as [B, Lq, H, d], lse as
// [B, H, Lq]. P and dS are rounded to T before their products. d is a multiple of 8.
//
// Launch: row_tiles * H * B blocks (B is 1 under JOINED) of 256 threads; dynamic shared memory 102,016 bytes with D = 64,
// 200,320 with D = 128.
//
// What bounds it: bytes, for C >= 16 (q, k, v, y, dy in, dq, dk, dv out: 7,100 clocks a tile at D = 64; products take 4,700,
// powers 2,900), then products; instructions issued are close behind, so what a row sees is found out once, by one thread.
// Two blocks share a multiprocessor at D = 64, so that one's loads and powers hide behind the other's products; that leaves
// 128 registers to a thread only if none are spent on a warp that copies, and 64 x 64 pieces of two products and dq need 96.
// So a thread of the last warpgroup, which sees most, copies: at the start all that has a place, which is all there is for
// most tiles of C >= 16, and later what a place released a step ago may take.
#include "attention_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int PLACES = 4;                       // of k and v of 64 keys, in shared memory
constexpr u32 PLACE = 2 * TILE, OWN_TILE = WARPGROUPS * TILE;
constexpr u32 ROW_WORDS = 2 * OWN_TILE + PLACES * PLACE, BARRIERS = ROW_WORDS + 7 * ROWS * 4; // and 128 bytes
constexpr int COMPUTING = 32 * WARPS;                // threads

// Piece `i`, 32 lines, of a tile of more than one box's lines.
DEVICE u32 piece_at(u32 tile, int i) { return tile + i / 2 * TILE + i % 2 * HALF; }

// What a block works on, as place_of, tile_of and visit_of have it, with the fewest divisions: they are dear.
struct Work {
  Place p;
  Tile t;
  int local, local_steps; // they come first, from key `local` on
};
DEVICE Work work_of(const Attention &a) {
  const u32 block = blockIdx.x, heads = (u32)a.heads, tiles = (u32)a.row_tiles;
  Work w;
  const u32 outer = block / (a.mask == JOINED ? heads : tiles), inner = block - outer * (a.mask == JOINED ? heads : tiles);
  if (a.mask == JOINED) w.p = {(int)outer, (int)inner, 0};
  else w.p = {(int)(tiles - 1 - inner), (int)(outer % heads), (int)(outer / heads)};
  const u32 span = a.tiles == 1 ? w.p.tile : w.p.tile / (u32)a.tiles;
  const int start = (int)(span * (u32)a.span), first = start + (w.p.tile - (int)(span * (u32)a.tiles)) * ROWS;
  w.t = {first, min(min(first + ROWS, start + (int)a.span), rows_of(a))};
  w.local = start; // a span of a mask that has locals opens with a block
  w.local_steps = has_locals(a) ? (w.t.end - start + GROUP - 1) / GROUP : 0;
  return w;
}

// What each row of a tile sees, and what sees it as a local key, in shared memory: a thread a row finds out once. Rows past
// the end see what the last one does.
struct Sights {
  int *slots_hi, *local_lo, *local_hi, *key_lo, *key_hi;
  DEVICE explicit Sights(int *at)
      : slots_hi(at), local_lo(at + ROWS), local_hi(at + 2 * ROWS), key_lo(at + 3 * ROWS), key_hi(at + 4 * ROWS) {}
  // Row i, r of its tile, of a block that opens at `start` (0 where there are no locals).
  DEVICE void put(const Attention &a, const Tile &t, int r, int i, int block, int start) {
    const bool cat = a.mask == CAT;
    slots_hi[r] = cat ? block : slots_of(a, i).hi;
    local_lo[r] = cat ? start + 1 : start;
    local_hi[r] = cat ? i : start + (int)a.stride - 1;
    key_lo[r] = cat ? i : start;
    key_hi[r] = min(start + (int)a.stride, t.end) - 1;
  }
  DEVICE bool opens(int r) const { return local_lo[r] > local_hi[r]; } // a block: a slot, under CAT
};
// The same of a lane's two rows, of its warp's 16 and of its warpgroup's 64: products are of whole warpgroups, so a warpgroup
// skips, or does without masks, as one.
struct Sight {
  int first[2];  // a row's, less the first column that a lane holds of a piece
  u32 count[2];
  Range warp, group;
  int all_from, all_to; // every row of the warpgroup sees these
  DEVICE bool any(int start, int count) const { return start <= group.hi && start + count > group.lo; }
  DEVICE bool all(int start, int count) const { return start >= all_from && start + count - 1 <= all_to; }
  DEVICE Sight(const int *lo, const int *hi, int group_of) { // both rise from row to row; no lo: 0
    const int w = (threadIdx.x >> 5) * 16, r = w + (threadIdx.x & 31) / 4, g = group_of * GROUP;
    const auto from = [&](int r) { return lo ? lo[r] : 0; };
#pragma unroll
    for (int h = 0; h < 2; h++) {
      first[h] = from(r + h * 8) - (threadIdx.x & 3) * 2;
      count[h] = max(hi[r + h * 8] - from(r + h * 8) + 1, 0);
    }
    warp = {from(w), hi[w + 15]}, group = {from(g), hi[g + GROUP - 1]};
    all_from = from(g + GROUP - 1), all_to = hi[g];
  }
};

// P of 8 NT columns from `start` on, out of products; lse2(e) of a sum's element e of pieces n.
template <int NT, typename Lse> DEVICE void powers(float (&s)[NT][4], const Sight &sight, int start, float scale2, Lse lse2) {
  if (sight.all(start, 8 * NT)) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = power2(s[n][e] * scale2 - lse2(n, e));
    return;
  }
#pragma unroll
  for (int n = 0; n < NT; n++) {
    if (start + n * 8 <= sight.warp.hi && start + n * 8 + 7 >= sight.warp.lo) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float p = power2(s[n][e] * scale2 - lse2(n, e));
        s[n][e] = (u32)(start - sight.first[e >> 1] + n * 8 + (e & 1)) < sight.count[e >> 1] ? p : 0.0f;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = 0.0f;
    }
  }
}

// dq += dS k for a warpgroup's rows and 64 keys. (A step of 32 beside it, for edges, takes more registers than there are.)
DEVICE void row_step(float (&dq)[D / 8][4], u32 q, u32 dy, u32 k, u32 v, const float *lse2, const float *delta,
                     const Sight &sight, int start, float scale2) {
  constexpr int NT = 8;
  float s[NT][4], ds[NT][4];
  wgmma_fence();
  tile_scores(s, q, k);
  wgmma_commit();
  tile_scores(ds, dy, v);
  wgmma_commit();
  wgmma_wait<1>();
  const float l[2] = {lse2[0], lse2[8]}; // not held from step to step: registers are short
  powers(s, sight, start, scale2, [&](int, int e) { return l[e >> 1]; });
  wgmma_wait<0>();
  const float d[2] = {delta[0], delta[8]};
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) ds[n][e] = s[n][e] * (ds[n][e] - d[e >> 1]);
  u32 held[NT / 2][4];
  hold(held, ds);
  wgmma_fence();
  tile_mix(dq, held, k);
  wgmma_commit();
  wgmma_wait<0>();
}

// dk += dS^T q, dv += P^T dy for a warpgroup's keys and 32 query rows.
DEVICE void key_step(float (&dk)[D / 8][4], float (&dv)[D / 8][4], u32 k, u32 v, u32 q, u32 dy, const float *lse2,
                     const float *delta, const Sight &sight, int start, float scale2) {
  constexpr int NT = 4;
  float s[NT][4], ds[NT][4];
  wgmma_fence();
  tile_scores(s, k, q);
  wgmma_commit();
  tile_scores(ds, v, dy);
  wgmma_commit();
  const int t = (threadIdx.x & 3) * 2;
  wgmma_wait<1>();
  powers(s, sight, start, scale2, [&](int n, int e) { return lse2[n * 8 + t + (e & 1)]; });
  wgmma_wait<0>();
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) ds[n][e] = s[n][e] * (ds[n][e] - delta[n * 8 + t + (e & 1)]);
  u32 held_p[NT / 2][4], held_ds[NT / 2][4];
  hold(held_p, s);
  hold(held_ds, ds);
  wgmma_fence();
  tile_mix(dv, held_p, dy);
  tile_mix(dk, held_ds, q);
  wgmma_commit();
  wgmma_wait<0>();
}

// A warp's rows of y, 16 bytes a lane and round, asked for long before they are needed.
constexpr int LANES = D / 8, ROUNDS = 16 * LANES / 32;
struct Outputs {
  Pack<T> y[ROUNDS];
  int row, x; // of the first round
  DEVICE Outputs(const T *from, const Attention &a, const Place &p, const Tile &t) {
    row = (threadIdx.x >> 5) * 16 + (threadIdx.x & 31) / LANES, x = (threadIdx.x & 31) % LANES * 8;
    from += out_at(a, p, t.first + row, a.lq, p.head, a.heads) + x;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int r = i * (32 / LANES);
      y[i] = Pack<T>{};
      if (t.first + row + r < t.end && x < a.d) y[i] = load_pack(from + r * a.heads * a.d);
    }
  }
  // sum(dy y)
  DEVICE void sums(const u8 *dy, float *delta) const {
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int r = row + i * (32 / LANES);
      const u32 at = r / GROUP * TILE + x / 64 * BOX + r % GROUP * 128 + (x / 8 ^ r) % 8 * 16; // swizzled
      const Pack<T> g = load_pack(reinterpret_cast<const T *>(dy + at));
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; e++) sum += to_f32(g.x[e]) * to_f32(y[i].x[e]);
#pragma unroll
      for (int o = 1; o < LANES; o <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
      if (x == 0) delta[r] = sum;
    }
  }
};

DEVICE void backward_rows(const TensorMap *q, const TensorMap *k, const TensorMap *v, const TensorMap *k_slots,
                          const TensorMap *v_slots, const TensorMap *dy, const T *y, const float *lse, float *delta, T *dq,
                          T *dk, T *dv, const Attention &a) {
  extern __shared__ __align__(1024) u8 memory[];
  const bool copies = threadIdx.x == COMPUTING - 128;
  const u32 own_q = shared_address(memory), own_dy = own_q + OWN_TILE, ring = own_dy + OWN_TILE;
  const u32 owned = own_q + BARRIERS, full = owned + 8, empty = full + PLACES * 8;
  if (copies) {
    barrier_init(owned, 1);
    for (int i = 0; i < PLACES; i++) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, WARPS);
    }
    barrier_init_done();
  }
  const Work work = work_of(a);
  const Place &p = work.p;
  const Tile &t = work.t;
  if (t.first >= t.end) return;
  if (copies) {
    barrier_expect(owned, 2 * OWN_TILE);
#pragma unroll
    for (int i = 0; i < 2 * WARPGROUPS; i++)
      copy_tile(own_q + i * TILE, i < WARPGROUPS ? q : dy, owned, t.first + i % WARPGROUPS * GROUP, p.head, p.batch);
  }
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), key_head = a.group == 1 ? p.head : p.head / (int)a.group;
  const int steps = work.local_steps + (slots_of(a, t.end - 1).hi + GROUP) / GROUP;
  float *lse_here = reinterpret_cast<float *>(memory + ROW_WORDS), *delta_here = lse_here + ROWS; // lse in powers of 2
  Sights sights(reinterpret_cast<int *>(delta_here + ROWS));
  const float scale2 = scale_of(a) * LOG2_E;
  const auto copy = [&](int step) {
    const u32 to = ring + step % PLACES * PLACE, here = full + step % PLACES * 8;
    const bool local = step < work.local_steps;
    const int line = local ? work.local + step * GROUP : (step - work.local_steps) * GROUP;
    barrier_expect(here, PLACE);
    copy_tile(to, local ? k : k_slots, here, line, key_head, p.batch);
    copy_tile(to + TILE, local ? v : v_slots, here, line, key_head, p.batch);
  };
  if (copies)
    for (int step = 0; step < min(PLACES, steps); step++) copy(step);
  {
    const Outputs mine(y, a, p, t);
    const int r = threadIdx.x, i = min(t.first + r, t.end - 1);
    const bool in = r < t.end - t.first;
    i64 at = p.batch * a.heads + p.head;
    if (r < ROWS) {
      const int block = has_locals(a) ? i / (int)a.stride : 0, start = block * (int)a.stride;
      at = a.mask == JOINED ? (block * a.heads + p.head) * a.lq + (i - start) : at * a.lq + i; // stat_at
      sights.put(a, t, r, i, block, start);
      lse_here[r] = in ? lse[at] * LOG2_E : infinity(); // rows past the end: their P is 0
    }
    __syncthreads(); // barriers are there
    barrier_wait(owned, 0);
    mine.sums(memory + OWN_TILE, delta_here);
    __syncthreads();
    if (in) delta[at] = delta_here[r];
  }
  const u32 my_q = own_q + group * TILE, my_dy = own_dy + group * TILE;

  if (a.local_keys && t.first + group * GROUP < t.end) { // the warpgroup's rows as local keys: those of step `group`
    float acc_k[MT][D / 8][4], acc_v[MT][D / 8][4];
    clear(acc_k);
    clear(acc_v);
    Sight sight(sights.key_lo, sights.key_hi, group);
    if (a.mask == CAT || t.first + (group + 1) * GROUP > t.end) sight.all_to = -1; // not all keys are local
    const int r = (threadIdx.x >> 5) * 16 + (threadIdx.x & 31) / 4;
    const auto local = [&](int r) { return t.first + r < t.end && !sights.opens(r); };
    if (!local(r)) sight.count[0] = 0;
    if (!local(r + 8)) sight.count[1] = 0;
    barrier_wait(full + group * 8, 0);
    const u32 my_k = ring + group * PLACE, my_v = my_k + TILE;
#pragma unroll 1
    for (int i = 0; i < ROWS / 32; i++) {
      if (sight.any(t.first + i * 32, 32))
        key_step(acc_k[0], acc_v[0], my_k, my_v, piece_at(own_q, i), piece_at(own_dy, i), lse_here + i * 32,
                 delta_here + i * 32, sight, t.first + i * 32, scale2);
    }
    const i64 base = out_at(a, p, t.first, a.lk, key_head, a.heads);
    const u32 apart = (u32)(a.heads * a.d);
    const auto to = [&](int row) { return local(row) ? base + (i64)((u64)(u32)row * apart) : -1; };
    const float by_scale[MT][2] = {{scale_of(a), scale_of(a)}}, by_one[MT][2] = {{1.0f, 1.0f}};
    store_rows(dk, acc_k, by_scale, 0, (int)a.d, true, to);
    store_rows(dv, acc_v, by_one, 0, (int)a.d, true, to);
  }

  float acc[MT][D / 8][4];
  clear(acc);
  const int r = (threadIdx.x >> 5) * 16 + (threadIdx.x & 31) / 4;
  Sight sight(work.local_steps ? sights.local_lo : nullptr, work.local_steps ? sights.local_hi : sights.slots_hi, group);
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const bool local = step < work.local_steps;
    if (step > 0 && step == work.local_steps) sight = Sight(nullptr, sights.slots_hi, group);
    const int place = step % PLACES, start = local ? work.local + step * GROUP : (step - work.local_steps) * GROUP;
    const u32 k_here = ring + place * PLACE;
    barrier_wait(full + place * 8, step / PLACES & 1);
    if (sight.any(start, GROUP) && t.first + group * GROUP < t.end)
      row_step(acc[0], my_q, my_dy, k_here, k_here + TILE, lse_here + r, delta_here + r, sight, start, scale2);
    if (step + PLACES < steps && (threadIdx.x & 31) == 0) barrier_arrive(empty + place * 8);
    const int before = step - 1; // its place is free by now, or soon
    if (before >= 0 && before + PLACES < steps && copies) {
      barrier_wait(empty + before % PLACES * 8, before / PLACES & 1);
      copy(before + PLACES);
    }
    __syncwarp();
  }
  const float by_scale[MT][2] = {{scale_of(a), scale_of(a)}};
  const i64 base = out_at(a, p, t.first, a.lq, p.head, a.heads);
  const u32 apart = (u32)(a.heads * a.d);
  store_rows(dq, acc, by_scale, 0, (int)a.d, true,
             [&](int r) { return t.first + r < t.end ? base + (i64)((u64)(u32)r * apart) : -1; });
}
#endif

#define MAP const __grid_constant__ TensorMap
KERNEL __launch_bounds__(32 * WARPS, D <= 64 ? 2 : 1)
attention_backward_rows_sm90(MAP q, MAP k, MAP v, MAP k_slots, MAP v_slots, MAP dy, const T *y, const float *lse, float *delta,
                             T *dq, T *dk, T *dv, const __grid_constant__ Attention a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  backward_rows(&q, &k, &v, &k_slots, &v_slots, &dy, y, lse, delta, dq, dk, dv, a);
#endif
}
