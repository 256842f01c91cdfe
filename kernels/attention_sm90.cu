// Attention under a structured mask for 16-bit T on Hopper: forward. attention.cu says what is computed and is used elsewhere;
// masks and tiles are explained in attention.cuh, boxes and products in attention_sm90.cuh.
//
//   y = softmax(scale q k^T, masked) v        lse = log sum_j exp(scale q k_j)
//
// q [B, H, Lq, d], k and v [B, Hkv, Lk, d] as tensor maps. y lies as [B, Lq, H, d], lse (f32, natural) as [B, H, Lq]; both are
// overwritten. Online softmax in f32 with powers of 2; P is rounded to T before it meets v.
//
// What bounds it: a step of 64 keys takes a warpgroup 256 cycles of the tensor cores, as many of the special function units, and
// some 200 issue slots, the scarcest of the three. So whatever is not the softmax is somebody else's work: one warp walks the
// tiles, divides, finds ranges and copies q, k and v ahead across tiles, since a CAT of C 16 has only four steps or five in a
// tile. Of a tile's steps those come first that nothing is masked in; they run in a loop of their own with nothing but waits,
// products and powers. Then come slots at the edge and locals, half as wide where half is enough. acc is seldom multiplied when
// a larger score comes: P may grow to 2^SLACK first, which costs nothing in floating point. Four warpgroups, in two blocks,
// share a multiprocessor at d 64, so that some take powers while others multiply. q is read from shared memory for the sake
// of registers: 128 * (2 * MANY + FEW) of a block are all that two blocks can have.
//
// Launch: attention_forward_sm90, min(row_tiles * H * B (B is 1 under JOINED), BLOCKS * multiprocessors) blocks of
// 128 * (WARPGROUPS + 1) threads; the last four warps are there for their registers, one of them copies.
// Shared: (4 + 2 * RING) * TILE + 256 bytes: 114,944 at D 64, 229,632 at D 128.
#include "attention_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr float SLACK = 8.0f;                    // how far scores, in powers of 2, may pass base
constexpr int RING = 5;                          // places for a step's k and v
constexpr int FEW = D == 64 ? 32 : 40, MANY = D == 64 ? 104 : 232; // registers of who copies and who computes
constexpr u32 OWN_ROWS = WARPGROUPS * TILE, STAGE = 2 * TILE;
constexpr u32 RING_AT = 2 * OWN_ROWS, BARRIERS_AT = RING_AT + RING * STAGE, WORKS_AT = BARRIERS_AT + 128;

// A row tile. Row `first` + r sees slots up to `slot` + n and locals of the block that opens at `local` + n * stride, where
// n = r * blocks / 65,536, see `blocks_of`.
struct alignas(16) Work {
  int first, rows, slot, local, slot_steps, steps; // steps < 0: there are no more tiles
  int whole[WARPGROUPS];                           // so many steps come first whose slots all rows of a warpgroup see
  i64 y, lse;                                      // where the first row's begin
};
static_assert(sizeof(Work) <= 64 && WARPGROUPS == 2, "128 bytes for two");

// Shared memory: q of even and of odd tiles, the ring, barriers (of each place that it has landed and that it is free, of q
// likewise), works of even and of odd tiles.
struct Memory {
  u8 *at;
  u32 base;
  DEVICE explicit Memory(u8 *memory) : at(memory), base(shared_address(memory)) {}
  DEVICE u32 q(u32 odd) const { return base + odd * OWN_ROWS; }
  DEVICE u32 stage(u32 place) const { return base + RING_AT + place * STAGE; }
  DEVICE u32 full(u32 place) const { return base + BARRIERS_AT + place * 8; }
  DEVICE u32 empty(u32 place) const { return full(RING + place); }
  DEVICE u32 q_full(u32 odd) const { return full(2 * RING + odd); }
  DEVICE u32 q_empty(u32 odd) const { return full(2 * RING + 2 + odd); }
  DEVICE Work &work(u32 odd) const { return reinterpret_cast<Work *>(at + WORKS_AT)[odd]; }
};
struct Maps { const TensorMap &q, &k, &v, &k_slots, &v_slots; };
// Where the ring stands: a place, and which time round.
struct Turn {
  u32 place, parity;
  DEVICE void next() {
    if (++place == RING) place = 0, parity ^= 1;
  }
};

// How many blocks of the mask begin in a row, times 65,536, rounded up: r * that / 65,536 is exact for 128 rows. Blocks longer
// than a tile do not begin in it.
DEVICE int blocks_of(const Attention &a) {
  if (a.mask == CAUSAL) return 65536;
  return a.mask == FULL || a.stride > ROWS ? 0 : (int)((65535 + (u32)a.stride) / (u32)a.stride);
}

// ---- the copying warp: one lane of it ----

DEVICE void copy(const Maps &maps, const Attention &a, const Memory &memory) {
  const u32 tiles = (u32)a.row_tiles, heads = (u32)a.heads, all_heads = heads * (a.mask == JOINED ? 1 : (u32)a.batch);
  const u32 units = tiles * all_heads;
  const int blocks = blocks_of(a);
  Turn turn = {0, 1}; // a place never used counts as released
  u32 count = 0;      // tiles
  bool back = false;  // there and back, so that no block gets the long tiles of every head
  const auto publish = [&](const Work &w) {
    barrier_wait(memory.q_empty(count & 1), (count >> 1 & 1) ^ 1);
    memory.work(count & 1) = w;
  };
  for (u32 round = 0; round < units; round += gridDim.x, back = !back) {
    const u32 unit = round + (back ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (unit >= units) continue;
    Place p; // and tile_of, visit_of in 32 bits: a 64-bit division takes longer than a step
    if (a.mask == JOINED) p.tile = unit / heads, p.head = unit - p.tile * heads, p.batch = 0;
    else { // a head's tiles are neighbours, so that its keys stay in L2; the longest first
      const u32 at = unit / tiles;
      p.tile = tiles - 1 - (unit - at * tiles), p.batch = at / heads, p.head = at - p.batch * heads;
    }
    const Tile t = tile_of(a, p.tile, ROWS);
    if (t.first >= t.end) continue;
    const Visit v = visit_of(a, t, GROUP);
    Work w = {t.first, t.end - t.first, slots_of(a, t.first).hi, v.local, v.slot_steps, v.steps};
#pragma unroll
    for (int g = 0; g < WARPGROUPS; g++)
      w.whole[g] = g * GROUP < w.rows ? (w.slot + (g * GROUP * blocks >> 16) + 1) / GROUP : 0;
    w.y = out_at(a, p, t.first, a.lq, p.head, a.heads);
    w.lse = a.mask == JOINED ? p.head : stat_at(a, p, p.head, t.first);
    publish(w);
    const u32 q_full = memory.q_full(count & 1), to_q = memory.q(count & 1);
    barrier_expect(q_full, OWN_ROWS);
#pragma unroll
    for (int g = 0; g < WARPGROUPS; g++) copy_tile(to_q + g * TILE, &maps.q, q_full, t.first + g * GROUP, p.head, p.batch);
    count++;
    const int head = (int)((u32)p.head / (u32)a.group);
    const auto send = [&](const TensorMap *k, const TensorMap *v, int line) {
      const u32 to = memory.stage(turn.place), full = memory.full(turn.place);
      barrier_wait(memory.empty(turn.place), turn.parity);
      barrier_expect(full, STAGE);
      copy_tile(to, k, full, line, head, p.batch);
      copy_tile(to + TILE, v, full, line, head, p.batch);
      turn.next();
    };
    for (int step = 0; step < v.slot_steps; step++) send(&maps.k_slots, &maps.v_slots, step * GROUP);
    for (int step = v.slot_steps; step < v.steps; step++) send(&maps.k, &maps.v, v.local + (step - v.slot_steps) * GROUP);
  }
  Work w;
  w.steps = -1;
  publish(w);
  barrier_arrive(memory.q_full(count & 1));
}

// ---- computing warpgroups ----

// Of q at hand keeps the bits of `keep` and turns those of `flip`. For a negative scale, or none: seldom.
DEVICE void turn_rows(u32 *q, u32 keep, u32 flip) {
  const int group = threadIdx.x / 128;
  q += group * TILE / 4;
  for (int i = threadIdx.x % 128; i < (int)TILE / 4; i += 128) q[i] = (q[i] & keep) ^ flip;
  stores_visible();
  meet(1 + group, 128);
}

// Of the lane's two rows: P = 2^(s factor - base) for products s, the lane's part of its sum, and the s that base must follow.
struct Softmax { float base[2], sum[2], limit[2]; };
struct Factor { float of, slack; }; // s factor is a score in powers of 2, slack an s

// Products s of 8 N keys to P, and acc to the same base. At an EDGE a lane's rows see keys sees[h] of them (counted from the
// first) and the warp's rows sees[2].
template <bool EDGE, int N>
DEVICE void soften(u32 (&p)[N / 2][4], float (&s)[N][4], float (&acc)[D / 8][4], Softmax &x, const Range (&sees)[3],
                   const Factor &factor) {
  const int column = (threadIdx.x & 3) * 2;
  const auto skipped = [&](int n) { return EDGE && (n * 8 + 15 < sees[2].lo || n * 8 > sees[2].hi); }; // 16 columns from 8 n on
  float top[2][2] = {{-infinity(), -infinity()}, {-infinity(), -infinity()}}; // of even and odd columns: shorter chains
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    if (skipped(n)) continue;
#pragma unroll
    for (int m = n; m < n + 2; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (EDGE && (m * 8 + (e & 1) < sees[e / 2].lo - column || m * 8 + (e & 1) > sees[e / 2].hi - column)) s[m][e] = -infinity();
        top[e / 2][e & 1] = fmaxf(top[e / 2][e & 1], s[m][e]);
      }
  }
  float most[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    most[h] = fmaxf(top[h][0], top[h][1]);
    most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
    most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
  }
  if (__any_sync(0xffffffffu, most[0] > x.limit[0] || most[1] > x.limit[1])) {
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const bool grows = most[h] > x.limit[h];
      const float base = grows ? most[h] * factor.of : x.base[h];
      shrink[h] = x.limit[h] == -infinity() ? 0.0f : power2(x.base[h] - base); // nothing seen before, nothing to keep
      x.base[h] = base;
      x.sum[h] *= shrink[h];
      if (grows) x.limit[h] = most[h] + factor.slack;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[n][e] *= shrink[e / 2];
  }
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    if (skipped(n)) {
#pragma unroll
      for (int e = 0; e < 4; e++) p[n / 2][e] = 0;
      continue;
    }
#pragma unroll
    for (int m = n; m < n + 2; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float y = power2(s[m][2 * h] * factor.of - x.base[h]), z = power2(s[m][2 * h + 1] * factor.of - x.base[h]);
        x.sum[h] += y;
        x.sum[h] += z;
        p[n / 2][(m - n) * 2 + h] = pack2<T>(y, z);
      }
  }
}

DEVICE void release(u32 barrier) {
  if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
}
// A step of the N keys at k, which have landed; `empty` says that they were read.
template <bool EDGE, int N>
DEVICE void forward_step(float (&acc)[D / 8][4], Softmax &x, u32 q, u32 k, const Range (&sees)[3], const Factor &factor,
                         u32 empty) {
  float s[N / 8][4];
  u32 p[N / 16][4];
  wgmma_fence();
  tile_scores(s, q, k);
  wgmma_commit();
  wgmma_wait<0>();
  soften<EDGE>(p, s, acc, x, sees, factor);
  wgmma_fence();
  tile_mix(acc, p, k + TILE);
  wgmma_commit();
  wgmma_wait<0>();
  release(empty);
}

DEVICE void store_tile(T *y, float *lse, const Attention &a, const Work &w, const float (&acc)[1][D / 8][4], const Softmax &x) {
  const int last = w.rows - 1;
  float one_over[1][2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float sum = x.sum[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    one_over[0][h] = __fdividef(1.0f, sum); // sum is 1 at least; a division proper is a call
    const int r = (threadIdx.x >> 5) * 16 + h * 8 + (threadIdx.x & 31) / 4;
    if ((threadIdx.x & 3) == 0 && r <= last) {
      const i64 to = a.mask == JOINED ? stat_at(a, {}, (int)w.lse, w.first + r) : w.lse + r;
      lse[to] = (x.base[h] + log2f(sum)) / LOG2_E;
    }
  }
  const u32 row = (u32)(a.heads * a.d);
  store_rows(y + w.y, acc, one_over, 0, (int)a.d, true, [&](int r) -> i64 { return r <= last ? (i64)((u64)(u32)r * row) : -1; });
}

DEVICE void compute(T *y, float *lse, const Attention &a, const Memory &memory) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = __shfl_sync(0xffffffffu, warp / 4, 0);
  // The largest score is the largest product if the factor is positive: a sign goes to q, and for 0, q is 0.
  const float scale2 = scale_of(a) * LOG2_E, positive = scale2 == 0.0f ? 1.0f : fabsf(scale2);
  const Factor factor = {positive, SLACK / positive};
  const int blocks = blocks_of(a);
  float acc[1][D / 8][4];
  Softmax x;
  Turn turn = {0, 0};
  for (u32 tiles = 0;; tiles++) {
    const u32 odd = tiles & 1;
    barrier_wait(memory.q_full(odd), tiles >> 1 & 1);
    const Work &w = memory.work(odd);
    if (w.steps < 0) return;
    if (!(scale2 > 0.0f))
      turn_rows(reinterpret_cast<u32 *>(memory.at + odd * OWN_ROWS), scale2 < 0.0f ? ~0u : 0, scale2 < 0.0f ? 0x80008000u : 0);
    const u32 q = memory.q(odd) + group * TILE;
    clear(acc);
    x = {{0.0f, 0.0f}, {0.0f, 0.0f}, {-infinity(), -infinity()}};
    int done = w.whole[group];
    for (int left = done; left > 0; left--, turn.next()) {
      barrier_wait(memory.full(turn.place), turn.parity);
      forward_step<false, 64>(acc[0], x, q, memory.stage(turn.place), {}, factor, memory.empty(turn.place));
    }
    for (int local = 0; local < 2; local++) { // slots at the edge, then locals
      const int end = local ? w.steps : w.slot_steps;
      if (done == end) continue;
      const auto range = [&](int r) -> Range {
        r = min(r, w.rows - 1);
        const int n = r * blocks >> 16, opens = w.local + n * (int)a.stride;
        if (!local) return {0, w.slot + n};
        return {opens + (int)(a.mask == CAT), a.mask == CAT ? w.first + r : opens + (int)a.stride - 1};
      };
      int from = local ? w.local : done * GROUP;
      const Range rows[2] = {range(warp * 16 + lane / 4), range(warp * 16 + lane / 4 + 8)};
      const int first = range(group * GROUP).lo;
      const int last = group * GROUP < w.rows ? range(group * GROUP + GROUP - 1).hi : -1; // -1: no rows
      for (; done < end; done++, from += GROUP, turn.next()) {
        const u32 empty = memory.empty(turn.place);
        barrier_wait(memory.full(turn.place), turn.parity);
        const bool lower = first < from + 32 && last >= from, upper = first < from + 64 && last >= from + 32;
        if (!lower && !upper) {
          __syncwarp(); // all lanes have seen the place full before it is filled again
          release(empty);
          continue;
        }
        const int skip = lower ? 0 : 32, base = from + skip;
        const u32 k = memory.stage(turn.place) + skip * 128;
        const Range sees[3] = {{rows[0].lo - base, rows[0].hi - base}, {rows[1].lo - base, rows[1].hi - base},
                               {__shfl_sync(0xffffffffu, rows[0].lo, 0) - base, __shfl_sync(0xffffffffu, rows[1].hi, 31) - base}};
        if (lower && upper) forward_step<true, 64>(acc[0], x, q, k, sees, factor, empty);
        else forward_step<true, 32>(acc[0], x, q, k, sees, factor, empty);
      }
    }
    store_tile(y, lse, a, w, acc, x);
    barrier_arrive(memory.q_empty(odd)); // every thread has read q and the tile's numbers
  }
}

DEVICE void forward(const Maps &maps, T *y, float *lse, const Attention &a) {
  extern __shared__ __align__(1024) u8 shared[];
  const Memory memory(shared);
  if (threadIdx.x == 32 * WARPS) {
    for (int i = 0; i < RING; i++) {
      barrier_init(memory.full(i), 1);
      barrier_init(memory.empty(i), WARPS);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(memory.q_full(i), 1);
      barrier_init(memory.q_empty(i), 32 * WARPS);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x >= 32 * WARPS) {
    fewer_registers<FEW>();
    if (threadIdx.x == 32 * WARPS) copy(maps, a, memory);
  } else {
    more_registers<MANY>();
    compute(y, lse, a, memory);
  }
}
#define ENTER forward({q, k, v, k_slots, v_slots}, y, lse, a)
constexpr int BLOCKS = D <= 64 ? 2 : 1; // of a multiprocessor
#else   // no Hopper: an entry point that does nothing, so that a module is a module everywhere
#define ENTER
constexpr int BLOCKS = 1;
#endif

KERNEL __launch_bounds__(128 * (WARPGROUPS + 1), BLOCKS)
attention_forward_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                       const __grid_constant__ TensorMap k_slots, const __grid_constant__ TensorMap v_slots, T *y, float *lse,
                       const __grid_constant__ Attention a) { ENTER; }
