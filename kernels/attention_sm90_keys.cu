// Attention backward on Hopper for 16-bit T, the pass over slots: dk and dv of the keys 0, S, 2S, ... that rows see from afar,
// under CAT, CAUSAL and FULL. Masks and tiles are explained in attention.cuh, copies and products in attention_sm90.cuh; what
// it computes is what attention_backward.cu's key pass does with local = 0.
//
//   P = exp(scale q k^T - lse)     dS = P (dy v^T - delta)     dv = P^T dy     dk = scale dS^T q
//
// A warpgroup owns 64 slots and computes all of it turned: S^T = k q^T and (dy v^T)^T = v dy^T, 64 slots x 64 rows each, so
// that P^T and dS^T, rounded to T, lie in registers as the left sides of dv += P^T dy and dk += dS^T q need them. Tiles of 64
// query rows (q, dy, lse and delta), of all query heads of the group, stream past through a ring that the copying warp fills.
//
// What bounds it: four products of 64 x 64 x 64 are 512 clocks of the tensor cores at d 64, the 4,096 powers between them 256
// clocks of the special function units and some 250 issue slots. So a warpgroup issues dv and dk of one row tile and the two
// products S^T and v dy^T of the next together, and while those 512 clocks run the other warpgroup takes its powers. Its own k
// and v lie in registers too: read from shared memory they would take as much of its bandwidth as q and dy. That fills the
// registers with one block a multiprocessor. At d 128 the sums leave no room for either, and the powers weigh half as much.
// Row tiles that come before a warpgroup's first slot are released unread; only those at its own slots are masked.
//
// Launch: attention_backward_keys_sm90, key_tiles * splits * Hkv * B blocks of 128 * (WARPGROUPS + 1) threads (the last four
// warps are there for their registers; one of them copies), key_tiles in tiles of 64 * WARPGROUPS slots. Shared:
// (2*WARPGROUPS + 2*RING) * TILE + RING*512 + 128 bytes: 100,480 at d 64, 198,784 at d 128. With splits > 1 (even d only) sums
// go to `partial`, f32 [2, splits, B, slots, Hkv, d], for attention_sum.cu; else dk, dv [B, Lk, Hkv, d] are overwritten at
// the slots.
#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#include "attention_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int RING = 4;                          // row tiles under way
constexpr bool AHEAD = D == 64 && WARPGROUPS <= 2; // registers for the next row tile's products beside this one's
constexpr int FEW = WARPGROUPS == 3 ? 32 : 24, MANY = WARPGROUPS == 1 ? 232 : WARPGROUPS == 2 ? 240 : 160; // registers
constexpr u32 STAGE = 2 * TILE;                  // q, dy
constexpr u32 STAGES_AT = 2 * WARPGROUPS * TILE, STATS_AT = STAGES_AT + RING * STAGE;
constexpr u32 BARRIERS_AT = STATS_AT + RING * 2 * KEYS * 4;

// Shared memory: k and v of the slots, then stages of q and dy, then of lse and delta, then barriers: of each stage that it
// has landed, and that k and v have. That a stage is free again is barrier 1 + place of the block's own: all lanes of a warp
// have read its numbers then.
struct Memory {
  u8 *at;
  u32 base;
  DEVICE explicit Memory(u8 *memory) : at(memory), base(shared_address(memory)) {}
  DEVICE u32 stage(u32 place) const { return base + STAGES_AT + place * STAGE; }
  DEVICE float *stats(u32 place) const { return reinterpret_cast<float *>(at + STATS_AT) + place * 2 * KEYS; }
  DEVICE u32 full(u32 place) const { return base + BARRIERS_AT + place * 8; }
  DEVICE u32 own() const { return full(RING); }
};

// Which slots and rows a block takes. Blocks of a head share row tiles in L2 if they run at the same time, and the longest
// should start first: blocks of as many heads as a few waves hold are neighbours, those of the first slots before the others.
// Numbers fit 32 bits, and division of 64 takes a hundred instructions.
DEVICE int slots_in(const Attention &a) { return (int)(((u32)a.lk + (u32)a.stride - 1) / (u32)a.stride); }
DEVICE int key_heads_in(const Attention &a) { return (int)((u32)a.heads / (u32)a.group); }
struct Work {
  Place at;        // tile of slots, key head, batch
  int split;
  Tile slots;
  int first, end;  // query rows, from a multiple of 64 on
};
DEVICE Work work_of(const Attention &a, u32 block) {
  const u32 key_heads = (u32)key_heads_in(a), heads = (u32)a.batch * key_heads, pieces = (u32)(a.key_tiles * a.splits);
  const u32 bundle = max(512 / pieces, 16u), start = block / (bundle * pieces) * bundle, within = block - start * pieces;
  const u32 width = min(bundle, heads - start), piece = within / width, head = start + within % width;
  Work w;
  w.at = {(int)(piece / (u32)a.splits), (int)(head % key_heads), (int)(head / key_heads)};
  w.split = (int)(piece % (u32)a.splits);
  w.slots.first = w.at.tile * ROWS;
  w.slots.end = min(w.slots.first + ROWS, slots_in(a));
  w.first = max(seeing_slot(a, w.slots.first).lo / KEYS * KEYS, (int)(w.split * a.split_rows));
  w.end = (int)min(a.lq, (w.split + 1) * a.split_rows);
  return w;
}

// Where the ring stands: a place, and which time round.
struct Turn {
  u32 place, parity;
  DEVICE void next() {
    if (++place == RING) place = 0, parity ^= 1;
  }
};

// The copying warp: slots first, then row tiles for as long as places come free. lse goes in powers of 2, and is infinite past
// the last row, so that P is 0 there.
DEVICE void copy(const TensorMap &q, const TensorMap &dy, const TensorMap &k, const TensorMap &v, const float *lse,
                 const float *delta, const Attention &a, const Work &w, int groups, const Memory &memory) {
  const int lane = threadIdx.x & 31, per_head = (w.end - w.first + KEYS - 1) / KEYS;
  const u32 base = memory.base, own = memory.own();
  if (lane == 0) {
    barrier_expect(own, groups * 2 * TILE);
    for (int g = 0; g < groups; g++) {
      copy_tile(base + g * TILE, &k, own, w.slots.first + g * GROUP, w.at.head, w.at.batch);
      copy_tile(base + (WARPGROUPS + g) * TILE, &v, own, w.slots.first + g * GROUP, w.at.head, w.at.batch);
    }
  }
  int h = w.at.head * (int)a.group, row = w.first;
  float stats[2][2]; // of rows lane and lane + 32, read a tile ahead
  const auto read = [&] {
    const i64 at = stat_at(a, w.at, h, row);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = lane + 32 * i;
      const bool in = row + r < (int)a.lq;
      stats[i][0] = in ? lse[at + r] * LOG2_E : infinity();
      stats[i][1] = in ? delta[at + r] : 0.0f;
    }
  };
  read();
  Turn turn = {0, 0};
  const int steps = per_head * (int)a.group;
  for (int step = 0; step < steps; step++, turn.next()) {
    const u32 here = memory.full(turn.place), to = memory.stage(turn.place);
    if (step >= RING) meet(1 + turn.place, groups * 128 + 32);
    if (lane == 0) {
      barrier_expect(here, STAGE);
      copy_tile(to, &q, here, row, h, w.at.batch);
      copy_tile(to + TILE, &dy, here, row, h, w.at.batch);
    }
    float *to_stats = memory.stats(turn.place);
#pragma unroll
    for (int i = 0; i < 2; i++) to_stats[lane + 32 * i] = stats[i][0], to_stats[KEYS + lane + 32 * i] = stats[i][1];
    barrier_arrive(here);
    row += KEYS;
    if (row >= w.end) row = w.first, h++;
    if (step + 1 < steps) read();
  }
}

// A warp's rows of a tile as left sides of products, in registers.
DEVICE void hold_tile(u32 (&x)[D / 16][4], u32 tile) {
  const u32 r = (threadIdx.x >> 5) % 4 * 16 + (threadIdx.x & 15), half = threadIdx.x >> 4 & 1;
#pragma unroll
  for (u32 k = 0; k < D / 16; k++) ldmatrix(x[k], tile + k / 4 * BOX + r * 128 + ((k % 4 * 2 + half ^ r & 7) << 4));
}

DEVICE void held_scores(float (&s)[8][4], const u32 (&own)[D / 16][4], u32 other) {
  const u64 b = describe(other);
#pragma unroll
  for (int k = 0; k < D / 16; k++) wgmma_held<ALONG>(s, own[k], onward(b, k / 4 * BOX + k % 4 * STEP_ALONG), k > 0);
}

// P^T and dS^T of 64 slots and 64 rows out of the products, rounded to T. `before[h]`: so many of these rows do not see the
// lane's slot, unless ALL do.
template <bool ALL>
DEVICE void soften(u32 (&p)[4][4], u32 (&ds)[4][4], const float (&s)[8][4], const float (&dp)[8][4], const float *stats,
                   const int (&before)[2], float scale2) {
  const int t = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const float2 lse2 = *reinterpret_cast<const float2 *>(stats + n * 8 + t);
    const float2 delta = *reinterpret_cast<const float2 *>(stats + KEYS + n * 8 + t);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = power2(s[n][2 * h] * scale2 - lse2.x), y = power2(s[n][2 * h + 1] * scale2 - lse2.y);
      if (!ALL && n * 8 < before[h]) x = 0.0f;
      if (!ALL && n * 8 + 1 < before[h]) y = 0.0f;
      p[n / 2][n % 2 * 2 + h] = pack2<T>(x, y);
      ds[n / 2][n % 2 * 2 + h] = pack2<T>(x * (dp[n][2 * h] - delta.x), y * (dp[n][2 * h + 1] - delta.y));
    }
  }
}

// A computing warpgroup: dk and dv of its 64 slots. False where no row sees them: there are no sums then.
DEVICE bool sum_slots(float (&dk)[D / 8][4], float (&dv)[D / 8][4], const Attention &a, const Work &w, int groups,
                      const Memory &memory) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp / 4, last = w.slots.end - 1;
  const float scale2 = scale_of(a) * LOG2_E;
  const int per_head = (w.end - w.first + KEYS - 1) / KEYS;
  const int mine = max(seeing_slot(a, w.slots.first + group * GROUP).lo - w.first, 0) / KEYS; // a head's first row tile that sees
  const int slot = w.slots.first + warp * 16;
  const int all_from = seeing_slot(a, min(slot + 15, last)).lo;
  const int lo[2] = {seeing_slot(a, min(slot + lane / 4, last)).lo, seeing_slot(a, min(slot + lane / 4 + 8, last)).lo};
  const u32 k = memory.base + group * TILE, v = k + WARPGROUPS * TILE;
  barrier_wait(memory.own(), 0);
  u32 held_k[D / 16][4], held_v[D / 16][4];
  if constexpr (AHEAD) hold_tile(held_k, k), hold_tile(held_v, v);

  Turn turn = {0, 0};
  int tile = 0, left = per_head * (int)a.group;
  const auto release = [&](u32 place, int then) { // of a step when `then` were left: if its place is filled again
    if (then > RING) arrive(1 + place, groups * 128 + 32);
  };
  const auto advance = [&] {
    turn.next();
    left--;
    if (++tile == per_head) tile = 0;
  };
  const auto find = [&] { // the next row tile to compute, landed; false after the last
    while (left > 0) {
      barrier_wait(memory.full(turn.place), turn.parity);
      if (tile >= mine) return true;
      release(turn.place, left);
      advance();
    }
    return false;
  };
  float s[8][4], dp[8][4];
  const auto issue = [&](u32 q) {
    wgmma_fence();
    if constexpr (AHEAD) {
      held_scores(s, held_k, q);
      held_scores(dp, held_v, q + TILE);
    } else {
      tile_scores(s, k, q);
      tile_scores(dp, v, q + TILE);
    }
    wgmma_commit();
  };
  if (!find()) return false;
  u32 before = RING; // the place that the products under way read last
  int before_left = 0;
  if (AHEAD) issue(memory.stage(turn.place));
  while (true) {
    const u32 q = memory.stage(turn.place);
    if (!AHEAD) issue(q);
    wgmma_wait<0>();
    if (before < RING) release(before, before_left);
    const int start = w.first + tile * KEYS, column = start + (lane & 3) * 2;
    const int blind[2] = {lo[0] - column, lo[1] - column};
    u32 p[4][4], ds[4][4];
    if (start >= all_from) soften<true>(p, ds, s, dp, memory.stats(turn.place), blind, scale2);
    else soften<false>(p, ds, s, dp, memory.stats(turn.place), blind, scale2);
    wgmma_fence();
    tile_mix(dv, p, q + TILE, before < RING);
    tile_mix(dk, ds, q, before < RING);
    before = turn.place, before_left = left;
    wgmma_commit();
    if (!AHEAD) wgmma_wait<0>();
    advance();
    if (!find()) break;
    if (AHEAD) issue(memory.stage(turn.place));
  }
  wgmma_wait<0>();
  return true;
}

DEVICE void store(const float (&dk)[MT][D / 8][4], const float (&dv)[MT][D / 8][4], T *to_k, T *to_v, float *partial,
                  const Attention &a, const Work &w) {
  const int key_heads = key_heads_in(a);
  if (a.splits == 1) {
    const auto to = [&](int r) {
      const int j = w.slots.first + r;
      return j < w.slots.end ? out_at(a, w.at, j * (int)a.stride, a.lk, w.at.head, key_heads) : -1;
    };
    const float scale[MT][2] = {{scale_of(a), scale_of(a)}}, one[MT][2] = {{1.0f, 1.0f}};
    store_rows(to_k, dk, scale, 0, (int)a.d, a.vector_out, to);
    store_rows(to_v, dv, one, 0, (int)a.d, a.vector_out, to);
    return;
  }
  const int slots = slots_in(a), lane = threadIdx.x & 31;
  const i64 all = a.batch * slots * key_heads * a.d;
  partial += w.split * all;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int j = w.slots.first + (threadIdx.x >> 5) * 16 + h * 8 + (lane >> 2);
    if (j >= w.slots.end) continue;
    float *to = partial + ((w.at.batch * (i64)slots + j) * key_heads + w.at.head) * a.d;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const int x = n * 8 + (lane & 3) * 2;
      if (x < a.d) { // splits are for even d only
        *reinterpret_cast<float2 *>(to + x) = make_float2(dk[0][n][2 * h] * scale_of(a), dk[0][n][2 * h + 1] * scale_of(a));
        *reinterpret_cast<float2 *>(to + a.splits * all + x) = make_float2(dv[0][n][2 * h], dv[0][n][2 * h + 1]);
      }
    }
  }
}

DEVICE void backward_keys(const TensorMap &q, const TensorMap &dy, const TensorMap &k_slots, const TensorMap &v_slots,
                          const float *lse, const float *delta, T *dk, T *dv, float *partial, const Attention &a) {
  extern __shared__ __align__(1024) u8 shared[];
  const Memory memory(shared);
  const Work w = work_of(a, blockIdx.x);
  if (w.first >= w.end) return;
  const int groups = (w.slots.end - w.slots.first + GROUP - 1) / GROUP, warp = threadIdx.x >> 5; // warpgroups that have slots
  if (threadIdx.x == 32 * WARPS) {
    for (int i = 0; i < RING; i++) barrier_init(memory.full(i), 33); // the copies, and each lane's numbers beside them
    barrier_init(memory.own(), 1);
    barrier_init_done();
  }
  __syncthreads();
  if (warp >= WARPS) {
    fewer_registers<FEW>();
    if (warp == WARPS) copy(q, dy, k_slots, v_slots, lse, delta, a, w, groups, memory);
  } else {
    more_registers<MANY>();
    if (warp / 4 >= groups) return;
    float sum_k[MT][D / 8][4], sum_v[MT][D / 8][4];
    if (!sum_slots(sum_k[0], sum_v[0], a, w, groups, memory)) clear(sum_k), clear(sum_v);
    store(sum_k, sum_v, dk, dv, partial, a, w);
  }
}

#define ENTER backward_keys(q, dy, k_slots, v_slots, lse, delta, dk, dv, partial, a)
#else // no Hopper: an entry point that does nothing, so that a module is a module everywhere
#define ENTER
#endif

KERNEL __launch_bounds__(128 * (WARPGROUPS + 1), WARPGROUPS == 1 && D == 64 ? 2 : 1)
attention_backward_keys_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap dy,
                             const __grid_constant__ TensorMap k_slots, const __grid_constant__ TensorMap v_slots, const float *lse,
                             const float *delta, T *dk, T *dv, float *partial, const __grid_constant__ Attention a) { ENTER; }
