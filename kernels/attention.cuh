// What the attention kernels share: arguments, masks as ranges of indices, tiles of rows and of keys.
//
// Every mask is two pieces. Row i (numbered among the queries) sees
// - *slots*, key rows 0, S, 2S, ... with S the stride: slots j in the range `slots_of(i)`;
// - *locals*, key rows of its own block of S rows: keys in the range `locals_of(i)`.
//   CAUSAL   S 1, slots 0..=i + Lk - Lq, no locals
//   FULL     S 1, all slots, no locals (bidirectional)
//   CAT      slots 0..=i/S, locals i/S*S + 1..=i
//   JOINED   bidirectional inside short sequences: no slots; all batches are one long run of rows, row b*L + i, cut into
//            blocks of S = L rows, and a row sees its block
// A tile visits the slots that its last row sees, then the local keys from its first row's block on: only what the mask
// allows, but for the edges.
#pragma once
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
constexpr int D = HEAD_DIM; // the head width that memory holds, d, is at most this; the rest reads as zeros

constexpr float LOG2_E = 1.4426950408889634f;

enum : int { CAUSAL = 0, FULL = 1, CAT = 2, JOINED = 3 };

// Element strides of a [batch, heads, L, d] view with dense rows.
struct Strides { i64 batch, head, row; };

// `Plan::words` in src/ops/cuda/attention.rs: 64-bit fields only.
struct Attention {
  Strides q, k, v, dy;       // dy: the result's gradient
  i64 batch, heads, group;   // group: query heads that share a key head
  i64 lq, lk, d;             // under JOINED, lq = lk = S
  i64 mask, stride;
  // Rows are cut into spans, and a span into `tiles` tiles of at most ROWS rows. Under CAT and JOINED a span is as many
  // whole blocks as fit a tile, or one block in several tiles; else it is everything.
  i64 span, tiles, row_tiles;
  i64 key_tiles;             // tiles of ROWS slots
  i64 splits, split_rows;    // backward over keys: rows that a block takes of those that see its slots
  i64 vector, vector_out;    // rows may be read (q, k, v, dy), written (and y read) 16 bytes at a time
  i64 local_keys;            // the row pass yields dk and dv of local keys too
  i64 scale_bits;            // f32
};
DEVICE float scale_of(const Attention &a) { return __uint_as_float((u32)a.scale_bits); }

// ---- ranges ----

struct Range { int lo, hi; }; // both inside

DEVICE Range slots_of(const Attention &a, int i) {
  if (a.mask == CAT) return {0, i / (int)a.stride};
  if (a.mask == CAUSAL) return {0, i + (int)(a.lk - a.lq)};
  return {0, a.mask == FULL ? (int)a.lk - 1 : -1};
}
DEVICE bool has_locals(const Attention &a) { return a.mask >= CAT; }
DEVICE Range locals_of(const Attention &a, int i) {
  const int start = i / (int)a.stride * (int)a.stride;
  if (a.mask == CAT) return {start + 1, i};
  if (a.mask == JOINED) return {start, start + (int)a.stride - 1};
  return {0, -1};
}
DEVICE int rows_of(const Attention &a) { return a.mask == JOINED ? (int)(a.batch * a.lq) : (int)a.lq; }
// The same seen from the keys: the rows that see slot j, or local key j.
DEVICE Range seeing_slot(const Attention &a, int j) {
  const int last = (int)a.lq - 1;
  if (a.mask == CAT) return {j * (int)a.stride, last};
  if (a.mask == CAUSAL) return {max(0, j - (int)(a.lk - a.lq)), last};
  return {0, last};
}
DEVICE Range seeing_local(const Attention &a, int j) {
  const int start = j / (int)a.stride * (int)a.stride;
  return {a.mask == CAT ? j : start, min(start + (int)a.stride, rows_of(a)) - 1};
}
// Keys at which a block opens are slots under CAT, and not local.
DEVICE bool opens_block(const Attention &a, int j) { return a.mask == CAT && j % (int)a.stride == 0; }

// ---- tiles ----

// Rows first..end-1 of a tile; empty where the last span is short.
struct Tile { int first, end; };
DEVICE Tile tile_of(const Attention &a, int tile, int rows) {
  const int tiles = (int)a.tiles, span = (int)a.span, start = tile / tiles * span;
  const int first = start + tile % tiles * rows;
  return {first, min(min(first + rows, start + span), rows_of(a))};
}
// What row tile `t` visits, in steps of `keys` keys: `slots` slots, then local keys from `local` on.
struct Visit { int slots, slot_steps, local, steps; };
DEVICE Visit visit_of(const Attention &a, Tile t, int keys) {
  Visit v;
  v.slots = slots_of(a, t.end - 1).hi + 1;
  v.slot_steps = (v.slots + keys - 1) / keys;
  v.local = has_locals(a) ? t.first / (int)a.stride * (int)a.stride : t.end;
  v.steps = v.slot_steps + (t.end - v.local + keys - 1) / keys;
  return v;
}
// What a block of threads works on. Blocks of a head are neighbours, so that its keys stay in L2, the longest first;
// but heads are neighbours under JOINED, where they share nothing but their rows' memory pages.
struct Place { int tile, head, batch; };
DEVICE Place place_of(const Attention &a, i64 block, int tiles, int heads) {
  if (a.mask == JOINED) return {(int)(block / heads), (int)(block % heads), 0};
  const int tile = (int)(block % tiles), rest = (int)(block / tiles);
  return {tiles - 1 - tile, rest % heads, rest / heads};
}

// ---- where rows lie ----

// Rows (or every step-th row) of one head; under JOINED the batch is part of the row number.
struct Walk { i64 row, batch; int length; };
DEVICE Walk walk_of(const Attention &a, const Strides &s, i64 step) {
  return {s.row * step, s.batch, a.mask == JOINED ? (int)a.lq : 0};
}
DEVICE i64 row_at(const Walk &w, int i) {
  if (w.length == 0) return i * w.row;
  const int b = i / w.length;
  return b * w.batch + (i - b * w.length) * w.row;
}
DEVICE i64 head_at(const Strides &s, const Place &p, int head) { return p.batch * s.batch + head * s.head; }
// Results and gradients lie as [B, L, heads, d].
DEVICE i64 out_at(const Attention &a, const Place &p, int row, i64 length, int head, i64 heads) {
  return ((p.batch * length + row) * heads + head) * a.d;
}
// Log-sum-exp and delta lie as [B, H, Lq].
DEVICE i64 stat_at(const Attention &a, const Place &p, int head, int row) {
  const int b = a.mask == JOINED ? row / (int)a.lq : p.batch;
  return (b * a.heads + head) * a.lq + (a.mask == JOINED ? row - b * (int)a.lq : row);
}

// ---- copies into shared memory ----

DEVICE u32 shared_at(const void *p) { return (u32)__cvta_generic_to_shared(p); }
// 16 (or 4) bytes, zeros where `in` is false.
DEVICE void copy16(u32 to, const void *from, bool in) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(in ? 16 : 0) : "memory");
}
DEVICE void copy4(u32 to, const void *from, bool in) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(in ? 4 : 0) : "memory");
}
DEVICE void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N issued groups are under way.
template <int N> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
DEVICE void store16(u32 to, const Pack<T> &x) {
  const u32 *w = reinterpret_cast<const u32 *>(&x);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}

// N rows from `first` on into a tile with rows PITCH elements apart: zeros from row `end` and from column d on.
template <int N, int PITCH, int THREADS>
DEVICE void load_rows(u32 tile, const T *from, const Walk &w, int first, int end, int d, bool vector) {
  constexpr int P = Pack<T>::N, CHUNKS = D / P;
#pragma unroll
  for (int start = 0; start < N * CHUNKS; start += THREADS) {
    const int c = start + threadIdx.x;
    if (N * CHUNKS % THREADS != 0 && c >= N * CHUNKS) break;
    const int r = c / CHUNKS, x = c % CHUNKS * P;
    const bool in = first + r < end && x < d;
    const T *p = from + (in ? row_at(w, first + r) + x : 0);
    const u32 to = tile + (r * PITCH + x) * (u32)sizeof(T);
    if (vector) {
      copy16(to, p, in);
    } else {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < P; e++) pack.x[e] = in && x + e < d ? p[e] : from_f32<T>(0.0f);
      store16(to, pack);
    }
  }
}
// N floats from the log-sum-exp or delta of rows `first` on.
template <int N>
DEVICE void load_stats(u32 to, const float *from, const Attention &a, const Place &p, int head, int first, int end) {
  const int r = threadIdx.x;
  if (r < N) {
    const bool in = first + r < end;
    copy4(to + r * 4, from + (in ? stat_at(a, p, head, first + r) : 0), in);
  }
}
