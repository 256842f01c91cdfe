// Tensor-core products on tiles in shared memory, for 16-bit T: what the 16-bit attention kernels are made of.
//
// A block is WARPS warps; each owns 16*MT rows of a tile (queries in the row passes, keys in the key pass), and what streams
// past is the *other* side. Accumulators are fragments of m16n8k16: lane 4g + t holds columns 2t, 2t+1 of rows g
// (elements 0, 1) and g + 8 (elements 2, 3) of each 16 x 8 piece. Tile rows are padded by 16 bytes, so that the 8 rows of
// an ldmatrix fall into different banks.
#pragma once
#include "attention.cuh"

// Blocks that share a multiprocessor, at least. With head width 64, 8 warps of 16 rows in 128 registers beat 4 warps of 32
// rows in 255 on an H100: a CAT forward pass at C 16 takes 0.27 ms, not 0.42.
#ifdef WARPGROUPS // attention_sm90.cuh: warps that compute, one warp more that copies
constexpr int WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS + 32;
#else
constexpr int WARPS = D <= 64 ? 8 : 4, BLOCKS = D <= 128 ? 2 : 1;
constexpr int THREADS = 32 * WARPS;
#endif
constexpr int MT = 1;                      // 16-row pieces of a warp
constexpr int ROWS = 16 * MT * WARPS;      // rows of an own tile
constexpr int KEYS = D <= 128 ? 64 : 32;   // rows of a streamed tile
constexpr int STAGES = 2;                  // streamed tiles under way
constexpr int PITCH = D + 8;
constexpr u32 ROW_BYTES = PITCH * 2;
constexpr u32 OWN = ROWS * ROW_BYTES, OTHER = KEYS * ROW_BYTES;

DEVICE void ldmatrix(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEVICE void ldmatrix_transposed(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
// c += a b
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (Same<T, bf16>::value)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE float power2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// Where a lane's ldmatrix row lies in a tile: `ALONG` for own rows (the left side of `scores`) and for other rows that
// are summed over (`mix`), `ACROSS` for other rows that become columns (the right side of `scores`).
DEVICE u32 lane_along() { return (threadIdx.x & 15) * ROW_BYTES + (threadIdx.x >> 4 & 1) * 16; }
DEVICE u32 lane_across() { return ((threadIdx.x >> 4 & 1) * 8 + (threadIdx.x & 7)) * ROW_BYTES + (threadIdx.x >> 3 & 1) * 16; }

// A warp's own rows as the left side of `scores`: read where they lie, or held in registers.
struct Lying {
  u32 at;
  DEVICE explicit Lying(u32 own) : at(own + lane_along()) {}
  DEVICE void get(u32 (&a)[4], int m, int k) const { ldmatrix(a, at + m * 16 * ROW_BYTES + k * 32); }
};
struct Held {
  u32 x[D / 16][MT][4];
  DEVICE explicit Held(u32 own) {
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
      for (int m = 0; m < MT; m++) ldmatrix(x[k][m], own + lane_along() + m * 16 * ROW_BYTES + k * 32);
  }
  DEVICE void get(u32 (&a)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = x[k][m][i];
  }
};

// 8-wide pieces first..end-1 of what streams past are needed; all of them where nothing is masked.
struct Need { int first, end; };

// s = own other^T: the warp's rows, 8*NT rows at `other`, D wide. Pieces that are not needed stay 0.
template <int NT, bool ALL, typename Own> DEVICE void scores(float (&s)[MT][NT][4], const Own &own, u32 other, Need need) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
  other += lane_across();
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) own.get(a[m], m, k);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      if (!ALL && (n + 1 < need.first || n >= need.end)) continue;
      u32 b[4];
      ldmatrix(b, other + n * 8 * ROW_BYTES + k * 32);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(s[m][n], a[m], b[0], b[1]);
        mma(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += p other: p is rounded to T; 8*NT rows at `other`, 8*ND columns of them.
template <int NT, int ND, bool ALL> DEVICE void mix(float (&acc)[MT][ND][4], const float (&p)[MT][NT][4], u32 other, Need need) {
  other += lane_along();
#pragma unroll
  for (int k = 0; k < NT / 2; k++) {
    if (!ALL && (2 * k + 1 < need.first || 2 * k >= need.end)) continue;
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      a[m][0] = pack2<T>(p[m][2 * k][0], p[m][2 * k][1]);
      a[m][1] = pack2<T>(p[m][2 * k][2], p[m][2 * k][3]);
      a[m][2] = pack2<T>(p[m][2 * k + 1][0], p[m][2 * k + 1][1]);
      a[m][3] = pack2<T>(p[m][2 * k + 1][2], p[m][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < ND; n += 2) {
      u32 b[4];
      ldmatrix_transposed(b, other + k * 16 * ROW_BYTES + n * 16);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(acc[m][n], a[m], b[0], b[1]);
        mma(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}
template <int ND> DEVICE void clear(float (&acc)[MT][ND][4]) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < ND; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][n][e] = 0.0f;
}

// What a warp's own rows see of what streams past, as ranges of its indices: of each row that a lane holds, and of the
// warp's first and last row (ranges rise from row to row).
struct Seen {
  Range of[MT][2];
  Range first, last;
  bool any;
  // Of other rows start..start+count-1, which 8-wide pieces are needed?
  DEVICE Need need(int start, int count) const {
    if (!any) return {0, 0};
    const int lo = max(first.lo - start, 0), hi = min(last.hi - start, count - 1);
    return hi < lo ? Need{0, 0} : Need{lo / 8, hi / 8 + 1};
  }
  DEVICE bool all(int start, int count) const {
    return any && start >= last.lo && start + count - 1 <= first.hi;
  }
};

// The warp's query rows: which slots or which local keys they see. Rows past the tile's end see what its last row does.
DEVICE Seen rows_see(const Attention &a, const Tile &t, bool local) {
  const int row = t.first + (threadIdx.x >> 5) * 16 * MT, last = t.end - 1, g = (threadIdx.x & 31) >> 2;
  const auto range = [&](int i) { return local ? locals_of(a, min(i, last)) : slots_of(a, min(i, last)); };
  Seen s;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) s.of[m][h] = range(row + m * 16 + h * 8 + g);
  s.first = range(row);
  s.last = range(row + 16 * MT - 1);
  s.any = row <= last;
  return s;
}
// The warp's keys first..end-1 (slots, or local keys): which rows see them.
DEVICE Seen keys_seen(const Attention &a, const Tile &t, bool local) {
  const int key = t.first + (threadIdx.x >> 5) * 16 * MT, last = t.end - 1, g = (threadIdx.x & 31) >> 2;
  const auto range = [&](int j) { return local ? seeing_local(a, j) : seeing_slot(a, j); };
  Seen s;
  bool holes = key + 16 * MT - 1 > last;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int j = key + m * 16 + h * 8 + g;
      s.of[m][h] = range(min(j, last));
      if (j > last || (local && opens_block(a, j))) s.of[m][h] = {0, -1};
    }
  s.first = range(min(key, last));
  s.last = range(min(key + 16 * MT - 1, last));
  if (holes || (local && a.mask == CAT)) s.first.hi = -1; // not all rows may see all keys: `all` answers no
  s.any = key <= last;
  return s;
}

// Four words of each of the four lanes of a quad, transposed: lane t ends with what lanes 0..3 held at t, in order.
DEVICE void transpose_quad(u32 (&w)[4]) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 2; i++) { // halves: exchange with the lane two further
    const u32 got = __shfl_xor_sync(0xffffffffu, t & 2 ? w[i] : w[i + 2], 2);
    if (t & 2) w[i] = got; else w[i + 2] = got;
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) { // neighbours
    const u32 got = __shfl_xor_sync(0xffffffffu, t & 1 ? w[i] : w[i + 1], 1);
    if (t & 1) w[i] = got; else w[i + 1] = got;
  }
}

// The warp's rows of an accumulator, 8*ND columns from `column` on, each row times its factor: row r (of the tile) to
// `out + at(r)`, where at(r) < 0 leaves it out.
template <int ND, typename At>
DEVICE void store_rows(T *out, const float (&acc)[MT][ND][4], const float (&factor)[MT][2], int column, int d, bool vector, At at) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const i64 to = at((threadIdx.x >> 5) * 16 * MT + m * 16 + h * 8 + g);
      const float f = factor[m][h];
      if (ND % 4 == 0 && vector) {
#pragma unroll
        for (int n = 0; n + 3 < ND; n += 4) {
          u32 w[4];
#pragma unroll
          for (int j = 0; j < 4; j++) w[j] = pack2<T>(acc[m][n + j][2 * h] * f, acc[m][n + j][2 * h + 1] * f);
          transpose_quad(w);
          const int x = column + (n + t) * 8;
          if (to >= 0 && x < d) *reinterpret_cast<Pack<u32> *>(out + to + x) = Pack<u32>{{w[0], w[1], w[2], w[3]}};
        }
      } else if (to >= 0) {
#pragma unroll
        for (int n = 0; n < ND; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int x = column + n * 8 + t * 2 + e;
            if (x < d) out[to + x] = from_f32<T>(acc[m][n][2 * h + e] * f);
          }
      }
    }
}
