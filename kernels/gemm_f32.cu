// Matrix product of f32 elements in exact f32: one FMA a term, in the order of k, no TF32.
//
//   D = A B (+ C) (+ bias): A [m, k], B [k, n], C and D [m, n], bias [n]; gemm.cuh holds arguments and epilogue.
//   As a linear layer: y = x W^T; backward dx = dy W, dW += dy^T x. Nothing is saved.
//
// A block of 256 threads makes a BM x BN tile of D, BK = 16 of k at a time. Each warp makes BM / 4 x BN / 2, each of its
// 4 x 8 threads R x 8 in groups of four neighbours. Tiles lie in shared memory as [k][m] and [k][n], two deep: the next one
// travels through registers while this one multiplies.
//
// Launch: grid (tiles, splits, batches), block 256, no dynamic shared memory.
//   gemm_128x128   large products
//   gemm_64x64     small ones
//   gemm_any       operands of any alignment, element by element, in 128 x 128 tiles
//   gemm_sum       adds up the parts of a split product: any grid (x, 1, batches)
// All but gemm_any need A and B at multiples of 16 bytes: pointers, ld and batch strides.
#include "gemm.cuh"

constexpr int BK = 16;
constexpr int THREADS = 256;

// Brings tiles of an operand, ROWS of m (or n) by BK, to registers and from there to shared memory as [BK][LD].
template <int ROWS, bool K_MAJOR, bool VECTOR> struct Copier {
  static constexpr int LD = ROWS + 4;
  static constexpr int ACROSS = (K_MAJOR ? BK : ROWS) / 4;   // groups of four elements along a line of memory
  static constexpr int STEP = THREADS / ACROSS;              // lines between a thread's groups
  static constexpr int LINES = K_MAJOR ? ROWS : BK, COPIES = LINES / STEP;
  static_assert(COPIES > 0 && LINES % STEP == 0, "every thread copies");

  const float *at;
  i64 ld;
  int lines, across;   // how many lines and elements are left from there
  float held[COPIES][4];

  DEVICE Copier(const float *base, i64 ld, i64 first, i64 rows, i64 k_begin, i64 k_end) : ld(ld) {
    const int line = threadIdx.x / ACROSS, chunk = threadIdx.x % ACROSS * 4;
    const int left = (int)min(rows - first, (i64)ROWS), depth = (int)(k_end - k_begin);
    at = base + (K_MAJOR ? (first + line) * ld + k_begin + chunk : (k_begin + line) * ld + first + chunk);
    lines = (K_MAJOR ? left : depth) - line;
    across = (K_MAJOR ? depth : left) - chunk;
  }
  DEVICE void load() {
#pragma unroll
    for (int j = 0; j < COPIES; j++) {
      const float *from = at + j * STEP * ld;
      const int count = j * STEP < lines ? across : 0;
      if (VECTOR && count >= 4) {
        const float4 v = *reinterpret_cast<const float4 *>(from);
        held[j][0] = v.x, held[j][1] = v.y, held[j][2] = v.z, held[j][3] = v.w;
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++) held[j][e] = e < count ? from[e] : 0.0f;
      }
    }
    at += K_MAJOR ? BK : BK * ld;
    (K_MAJOR ? across : lines) -= BK;
  }
  DEVICE void store(float *tile) const {
    const int line = threadIdx.x / ACROSS, chunk = threadIdx.x % ACROSS * 4;
#pragma unroll
    for (int j = 0; j < COPIES; j++) {
      if (K_MAJOR) {
#pragma unroll
        for (int e = 0; e < 4; e++) tile[(chunk + e) * LD + line + j * STEP] = held[j][e];
      } else {
        *reinterpret_cast<float4 *>(tile + (line + j * STEP) * LD + chunk) = make_float4(held[j][0], held[j][1], held[j][2], held[j][3]);
      }
    }
  }
};

// N = 4 or 8 neighbours in groups of four, `APART` from one group to the next.
template <int N, int APART> DEVICE void read_groups(float (&x)[N], const float *from) {
#pragma unroll
  for (int g = 0; g < N / 4; g++) {
    const float4 v = *reinterpret_cast<const float4 *>(from + g * APART);
    x[g * 4] = v.x, x[g * 4 + 1] = v.y, x[g * 4 + 2] = v.z, x[g * 4 + 3] = v.w;
  }
}

template <int BM, int BN, bool VECTOR> DEVICE void multiply(const Product &p) {
  constexpr int WM = BM / 4, WN = BN / 2, R = WM / 4, C = WN / 8;   // of a warp, of a thread
  using CopyA = Copier<BM, A_K, VECTOR>;
  using CopyB = Copier<BN, B_K, VECTOR>;
  __shared__ __align__(16) float tiles_a[2][BK * CopyA::LD], tiles_b[2][BK * CopyB::LD];
  const Place at = place<BM, BN, 16>(p, blockIdx.x, blockIdx.y, blockIdx.z);
  CopyA copy_a(p.a + at.batch * p.batch_a, p.lda, at.row, p.m, at.k_begin, at.k_end);
  CopyB copy_b(p.b + at.batch * p.batch_b, p.ldb, at.column, p.n, at.k_begin, at.k_end);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / 2 * WM + lane / 8 * 4, column = warp % 2 * WN + lane % 8 * 4;
  const int tiles = (int)((at.k_end - at.k_begin + BK - 1) / BK);

  float acc[R][C] = {};
  copy_a.load();
  copy_b.load();
  copy_a.store(tiles_a[0]);
  copy_b.store(tiles_b[0]);
  __syncthreads();
  for (int t = 0; t < tiles; t++) {
    const bool more = t + 1 < tiles;
    if (more) {
      copy_a.load();
      copy_b.load();
    }
    const float *a = tiles_a[t & 1] + row, *b = tiles_b[t & 1] + column;
#pragma unroll
    for (int k = 0; k < BK; k++) {
      float x[R], y[C];
      read_groups<R, 16>(x, a + k * CopyA::LD);
      read_groups<C, 32>(y, b + k * CopyB::LD);
#pragma unroll
      for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < C; j++) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
    }
    if (more) {   // into the tile that all finished before the last barrier
      copy_a.store(tiles_a[(t + 1) & 1]);
      copy_b.store(tiles_b[(t + 1) & 1]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < R; i += 4)
#pragma unroll
    for (int j = 0; j < C; j += 4) {
      float z[4][4];
#pragma unroll
      for (int e = 0; e < 16; e++) z[e / 4][e % 4] = acc[i + e / 4][j + e % 4];
      emit(p, at, at.row + row + i * 4, 1, at.column + column + j * 8, z);
    }
}

KERNEL __launch_bounds__(THREADS, 2) gemm_128x128(const Product p) { multiply<128, 128, true>(p); }
KERNEL __launch_bounds__(THREADS, 2) gemm_64x64(const Product p) { multiply<64, 64, true>(p); }
KERNEL __launch_bounds__(THREADS, 2) gemm_any(const Product p) { multiply<128, 128, false>(p); }
KERNEL gemm_sum(const Product p) { sum_parts(p); }
