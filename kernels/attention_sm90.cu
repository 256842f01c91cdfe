// Attention under a structured mask for 16-bit T on Hopper: forward. attention.cu says what is computed and is used elsewhere;
// masks and tiles are explained in attention.cuh, boxes and products in attention_sm90.cuh.
//
//   y = softmax(scale q k^T, masked) v        lse = log sum_j exp(scale q k_j)
//
// q [B, H, Lq, d], k and v [B, Hkv, Lk, d] as tensor maps. y lies as [B, Lq, H, d], lse (f32, natural) as [B, H, Lq]; both are
// overwritten. Online softmax in f32 with powers of 2; P is rounded to T before it meets v.
//
// What bounds it: a tile of a CAT of C 16 visits few keys, about 2.6 steps of 64 slots and 2 of locals, so that memory is the
// floor (q, k, v and y once), and the wait for a tile's first bytes would double it. Hence blocks stay on their multiprocessor,
// walk the tiles and copy ahead, into a ring of places that the next tile's keys follow in. Two blocks share a multiprocessor at
// d 64: while one warpgroup takes powers, others multiply. Products, powers and issue slots of a step take about as long each
// (256 cycles a warpgroup), so q is held in registers: from shared memory, a product of 64 columns would use all of its
// bandwidth. That is 128 registers a thread, which leaves no room for a warp that only copies: thread 0 does, while its
// products are under way. Steps that only half a tile of keys is needed of are half as wide.
//
// Launch: attention_forward_sm90, min(row_tiles * H * B (B is 1 under JOINED), BLOCKS * multiprocessors) blocks of 256 threads.
// Shared: (2 + 2 * RING) * TILE + 256 bytes: 114,944 at D 64, 229,632 at D 128.
#include "attention_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#ifndef FORWARD_RING
#define FORWARD_RING 6
#endif
constexpr int RING = FORWARD_RING; // places for a step's k and v

// A row tile. Row `first` + r sees slots up to `slot` + n and locals of the block that opens at `local` + n * stride, where
// n = r * blocks / 65,536, see `blocks_of`.
struct alignas(16) Work { int first, end, slot, local, slot_steps, steps, head, batch; };

// How many blocks of the mask begin in a row, times 65,536, rounded up: r * that / 65,536 is exact for 128 rows. Blocks longer
// than a tile do not begin in it.
DEVICE int blocks_of(const Attention &a) {
  if (a.mask == CAUSAL) return 65536;
  return a.mask == FULL || a.stride > ROWS ? 0 : (int)((65535 + a.stride) / a.stride);
}
// place_of, tile_of and visit_of in 32 bits: a 64-bit division takes longer than a step.
DEVICE Work work_of(const Attention &a, u32 unit) {
  const u32 tiles = (u32)a.row_tiles, heads = (u32)a.heads;
  Place p;
  if (a.mask == JOINED) p.tile = unit / heads, p.head = unit - p.tile * heads, p.batch = 0;
  else {
    const u32 rest = unit / tiles;
    p.tile = tiles - 1 - (unit - rest * tiles), p.batch = rest / heads, p.head = rest - p.batch * heads;
  }
  const Tile t = tile_of(a, p.tile, ROWS);
  const Visit v = visit_of(a, t, GROUP);
  return {t.first, t.end, slots_of(a, t.first).hi, v.local, v.slot_steps, t.first < t.end ? v.steps : -1, p.head, p.batch};
}

// ---- copies ----

// What thread 0 has copied, in shared memory: registers are short.
struct Cursor {
  u32 round;             // first unit of the round of units that is next
  int back;              // there and back, so that no block gets the long tiles of every head
  int sent, step, steps; // steps copied, the next one of the tile and how many it has
  int tiles;             // whose q was copied
  u32 place, parity;     // a place never used counts as released
};
struct Shared {
  u32 q, ring, full, empty, q_full, q_empty;
  Work *work;            // of even and of odd tiles
  Cursor *cursor;
};
struct Maps { const TensorMap &q, &k, &v, &k_slots, &v_slots; };

// Publishes the block's next tile and copies its q; after the last, one of no steps.
DEVICE void next_tile(const Maps &maps, const Attention &a, const Shared &at, Cursor &c) {
  const u32 units = (u32)(a.row_tiles * a.heads * (a.mask == JOINED ? 1 : a.batch));
  Work w;
  w.steps = -1;
  while (c.round < units && w.steps < 0) {
    const u32 unit = c.round + (c.back ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    c.round += gridDim.x, c.back ^= 1;
    if (unit < units) w = work_of(a, unit);
  }
  barrier_wait(at.q_empty, (c.tiles & 1) ^ 1);
  at.work[c.tiles & 1] = w;
  c.tiles++, c.step = 0, c.steps = w.steps;
  if (w.steps < 0) {
    barrier_arrive(at.q_full);
    return;
  }
  barrier_expect(at.q_full, WARPGROUPS * TILE);
#pragma unroll
  for (int g = 0; g < WARPGROUPS; g++) copy_tile(at.q + g * TILE, &maps.q, at.q_full, w.first + g * GROUP, w.head, w.batch);
}
// Thread 0 copies what there is room for. Its warp has done `done` steps and has read q of `tiles` tiles; it may wait for the
// other warps to have come nearly as far.
DEVICE void copy_ahead(const Maps &maps, const Attention &a, const Shared &at, int done, int tiles) {
  Cursor &c = *at.cursor;
  while (c.sent < done + RING - 1) {
    if (c.step == c.steps) {
      if (c.tiles > tiles) return;
      next_tile(maps, a, at, c);
    }
    if (c.steps < 0) return;
    const Work &w = at.work[c.tiles & 1 ^ 1];
    const bool local = c.step >= w.slot_steps;
    const int line = local ? w.local + (c.step - w.slot_steps) * GROUP : c.step * GROUP, head = w.head / (int)a.group;
    const u32 to = at.ring + c.place * 2 * TILE, full = at.full + c.place * 8;
    barrier_wait(at.empty + c.place * 8, c.parity);
    barrier_expect(full, 2 * TILE);
    copy_tile(to, local ? &maps.k : &maps.k_slots, full, line, head, w.batch);
    copy_tile(to + TILE, local ? &maps.v : &maps.v_slots, full, line, head, w.batch);
    c.step++, c.sent++;
    if (++c.place == RING) c.place = 0, c.parity ^= 1;
  }
}

// ---- sums ----

// The warp's 16 rows of q as left sides of products: bits of `keep` only, those of `flip` turned.
DEVICE void hold_rows(u32 (&q)[D / 16][4], u32 tile, u32 keep, u32 flip) {
  const u32 line = (threadIdx.x >> 5) % 4 * 16 + (threadIdx.x & 15), chunk = threadIdx.x >> 4 & 1;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    ldmatrix(q[k], tile + k / 4 * BOX + line * 128 + ((k % 4 * 2 + chunk) ^ (line & 7)) * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) q[k][i] = (q[k][i] & keep) ^ flip;
  }
}

struct Softmax {
  float top[2], sum[2]; // of the lane's two rows: largest product, the lane's part of the sum
};

// A step of 8 N keys. At an edge a lane's rows see keys sees[h] of them (counted from the first) and the warp's rows sees[2];
// at an UPPER edge all from the first key on.
enum : int { NO_EDGE = 0, UPPER = 1, EDGE = 2 };
template <int N, int KIND>
DEVICE void forward_step(float (&acc)[D / 8][4], Softmax &x, const u32 (&q)[D / 16][4], u32 k, u32 v, const Range (&sees)[3], float factor) {
  float s[N][4];
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < D / 16; i++) wgmma_held<ALONG>(s, q[i], describe(k + i / 4 * BOX + i % 4 * STEP_ALONG), i > 0);
  wgmma_commit();
  wgmma_wait<0>();
  const int column = (threadIdx.x & 3) * 2;
  const auto skipped = [&](int n) { return KIND && ((KIND == EDGE && n * 8 + 15 < sees[2].lo) || n * 8 > sees[2].hi); }; // 16 columns from n * 8 on
  float top[2] = {x.top[0], x.top[1]};
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    if (skipped(n)) continue;
#pragma unroll
    for (int m = n; m < n + 2; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int j = column + m * 8 + (e & 1);
        if (KIND && ((KIND == EDGE && j < sees[e / 2].lo) || j > sees[e / 2].hi)) s[m][e] = -infinity();
        top[e / 2] = fmaxf(top[e / 2], s[m][e]);
      }
  }
  float base[2], shrink[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
    top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
    base[h] = top[h] == -infinity() ? 0.0f : top[h] * factor; // nothing seen yet: all powers are 0
    shrink[h] = power2(x.top[h] * factor - base[h]);
    x.top[h] = top[h];
  }
#ifdef FORWARD_LAZY
  if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f))
#endif
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[n][e] *= shrink[e / 2];
  u32 p[N / 2][4];
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
      for (int e = 0; e < 4; e++) {
        s[m][e] = power2(s[m][e] * factor - base[e / 2]);
        sum[e / 2] += s[m][e];
      }
    p[n / 2][0] = pack2<T>(s[n][0], s[n][1]);
    p[n / 2][1] = pack2<T>(s[n][2], s[n][3]);
    p[n / 2][2] = pack2<T>(s[n + 1][0], s[n + 1][1]);
    p[n / 2][3] = pack2<T>(s[n + 1][2], s[n + 1][3]);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) x.sum[h] = x.sum[h] * shrink[h] + sum[h];
  wgmma_fence();
  tile_mix(acc, p, v);
  wgmma_commit();
  wgmma_wait<0>();
}

DEVICE void store_tile(T *y, float *lse, const Attention &a, const Work &w, const float (&acc)[1][D / 8][4], const Softmax &x, float factor) {
  const int last = w.end - w.first - 1, head = w.head;
  const Place p = {0, head, w.batch};
  float one_over[1][2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float sum = x.sum[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    one_over[0][h] = 1.0f / sum;
    const int r = (threadIdx.x >> 5) * 16 + h * 8 + (threadIdx.x & 31) / 4;
    if ((threadIdx.x & 3) == 0 && r <= last)
      lse[stat_at(a, p, head, w.first + r)] = (x.top[h] * factor + log2f(sum)) / LOG2_E;
  }
  store_rows(y, acc, one_over, 0, (int)a.d, a.vector_out,
             [&](int r) { return r <= last ? out_at(a, p, w.first + r, a.lq, head, a.heads) : -1; });
}

DEVICE void forward_tiles(const Maps &maps, T *y, float *lse, const Attention &a, const Shared &at) {
  const int warp = threadIdx.x >> 5, group = warp / 4, lane = threadIdx.x & 31;
  // The largest score is the largest product if the factor is positive: a sign goes to q, and for 0, q is 0.
  const float scale2 = scale_of(a) * LOG2_E, factor = scale2 == 0.0f ? 1.0f : fabsf(scale2);
  const u32 keep = scale2 == 0.0f ? 0 : ~0u, flip = scale2 < 0.0f ? 0x80008000u : 0;
  const int blocks = blocks_of(a);
  u32 place = 0, parity = 0;
  int tiles = 0, step = 0;
  float acc[1][D / 8][4];
  u32 q[D / 16][4];
  Softmax x;
  Range first, end; // what the warpgroup's first and last row see
  for (int done = 0;; done++) { // steps
    if (threadIdx.x == 0) copy_ahead(maps, a, at, done, tiles);
    __syncwarp();
    if (step == 0) {
      barrier_wait(at.q_full, tiles & 1);
      if (at.work[tiles & 1].steps < 0) return;
      hold_rows(q, at.q + group * TILE, keep, flip);
      __syncwarp();
      if (lane == 0) barrier_arrive(at.q_empty);
      tiles++;
      clear(acc);
      x = {{-infinity(), -infinity()}, {0.0f, 0.0f}};
    }
    const Work &w = at.work[tiles & 1 ^ 1];
    const bool local = step >= w.slot_steps;
    const auto range = [&](int r) -> Range {
      r = min(r, w.end - w.first - 1);
      const int n = r * blocks >> 16, opens = w.local + n * (int)a.stride;
      if (!local) return {0, w.slot + n};
      return {opens + (int)(a.mask == CAT), a.mask == CAT ? w.first + r : opens + (int)a.stride - 1};
    };
    if (step == 0 || step == w.slot_steps) {
      first = range(group * GROUP);
      end = range(group * GROUP + GROUP - 1);
      if (w.first + group * GROUP >= w.end) end.hi = -1; // no rows
    }
    const int start = local ? w.local + (step - w.slot_steps) * GROUP : step * GROUP;
    const u32 k = at.ring + place * 2 * TILE;
    barrier_wait(at.full + place * 8, parity);
    if (first.lo < start + GROUP && end.hi >= start) {
      if (start >= end.lo && start + GROUP - 1 <= first.hi) {
        forward_step<8, NO_EDGE>(acc[0], x, q, k, k + TILE, {}, factor);
      } else {
        const bool lower = first.lo < start + 32, upper = end.hi >= start + 32;
        const int from = lower ? start : start + 32;
        const u32 skip = lower ? 0 : 32 * 128;
        const auto seen = [&](int lo, int hi) -> Range { return {range(lo).lo - from, range(hi).hi - from}; };
        const int r = warp * 16, g = r + lane / 4;
        const Range sees[3] = {seen(g, g), seen(g + 8, g + 8), seen(r, r + 15)};
#ifdef FORWARD_UPPER
        if (!local) {
          if (upper) forward_step<8, UPPER>(acc[0], x, q, k, k + TILE, sees, factor);
          else forward_step<4, UPPER>(acc[0], x, q, k, k + TILE, sees, factor);
        } else
#endif
        if (lower && upper) forward_step<8, EDGE>(acc[0], x, q, k, k + TILE, sees, factor);
        else forward_step<4, EDGE>(acc[0], x, q, k + skip, k + TILE + skip, sees, factor);
      }
    }
    if (lane == 0) barrier_arrive(at.empty + place * 8);
    if (++place == RING) place = 0, parity ^= 1;
    if (++step == w.steps) {
      store_tile(y, lse, a, w, acc, x, factor);
      step = 0;
    }
  }
}

DEVICE void forward(const Maps &maps, T *y, float *lse, const Attention &a) {
  extern __shared__ __align__(1024) u8 memory[];
  constexpr u32 END = (WARPGROUPS + 2 * RING) * TILE;
  const u32 base = shared_address(memory), barriers = base + END;
  const Shared at = {base, base + WARPGROUPS * TILE, barriers, barriers + RING * 8, barriers + RING * 16, barriers + RING * 16 + 8,
                     reinterpret_cast<Work *>(memory + END + 128), reinterpret_cast<Cursor *>(memory + END + 192)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < RING; i++) {
      barrier_init(at.full + i * 8, 1);
      barrier_init(at.empty + i * 8, WARPS);
    }
    barrier_init(at.q_full, 1);
    barrier_init(at.q_empty, WARPS);
    barrier_init_done();
    *at.cursor = {0, 0, 0, 0, 0, 0, 0, 1};
  }
  __syncthreads();
  forward_tiles(maps, y, lse, a, at);
}
#define ENTER forward({q, k, v, k_slots, v_slots}, y, lse, a)
constexpr int BLOCKS = D <= 64 ? 2 : 1; // of a multiprocessor
#else   // no Hopper: an entry point that does nothing, so that a module is a module everywhere
#define ENTER
constexpr int BLOCKS = 1;
#endif

KERNEL __launch_bounds__(32 * WARPS, BLOCKS)
attention_forward_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                       const __grid_constant__ TensorMap k_slots, const __grid_constant__ TensorMap v_slots, T *y, float *lse,
                       const __grid_constant__ Attention a) { ENTER; }
