// Matrix product of 16-bit elements on tensor cores, for sm_80 and later (mma.sync m16n8k16, f32 accumulators).
//
//   D = A B (+ C) (+ bias): A [m, k], B [k, n], C and D [m, n], bias [n]; gemm.cuh holds arguments and epilogue.
//   As a linear layer: y = x W^T; backward dx = dy W, dW += dy^T x. Nothing is saved.
//
// A block makes a BM x BN tile of D: BK = 64 of k at a time, cp.async brings the operands' tiles to shared memory, STAGES
// deep; ldmatrix feeds the warps, each WM x WN of the tile. Finished sums pass through shared memory so that rows of D are
// read and written 16 bytes a thread.
//
// Launch: grid (tiles, splits, batches), block and dynamic shared memory as here:
//   entry          tile        threads  shared    for
//   gemm_128x256   128 x 256   256      196,608   large products
//   gemm_128x128   128 x 128   128       98,304   products that leave fewer tiles
//   gemm_64x64      64 x  64   128       65,536   small ones
//   gemm_any       128 x 128   128       98,304   operands of any alignment, element by element
//   gemm_sum       any grid (x, 1, batches)       adds up the parts of a split product
// All but gemm_any need A and B at multiples of 16 bytes: pointers, ld and batch strides.
#include "gemm.cuh"

constexpr int BK = 64;
constexpr int LINE = 128;   // bytes of a line of shared memory: 64 elements

// ---- instructions ----

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
// 16 bytes to shared memory, of which the first `bytes` are read and the rest are zeros.
DEVICE void copy_async(u32 to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
DEVICE void store_shared(u32 to, const Pack<T> &v) {
  const uint4 w = *reinterpret_cast<const uint4 *>(&v);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}
// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets elements (l / 4, 2 (l % 4) + {0, 1}).
DEVICE void load_matrices(u32 (&x)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
// The same, each matrix transposed.
DEVICE void load_transposed(u32 (&x)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
// acc[16, 8] += a[16, 16] b[16, 8]
template <typename E> DEVICE void multiply_add(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> DEVICE void multiply_add<bf16>(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> DEVICE void multiply_add<f16>(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- operands ----

// A tile of an operand in shared memory: panels of lines of 64 elements. Lines follow m (or n) where k lies along memory
// (one panel, ROWS lines), else k (ROWS / 64 panels of BK lines). The 16-byte chunks of line l are permuted by xor with
// l % 8, so that neither copies nor ldmatrix, which take eight lines at once, meet a bank twice.
template <int ROWS, bool K_MAJOR, int THREADS, bool VECTOR> struct Copier {
  static constexpr int LINES = K_MAJOR ? ROWS : BK;
  static constexpr int ACROSS = (K_MAJOR ? BK : ROWS) / 8;   // chunks
  static constexpr int STEP = THREADS / ACROSS;              // lines between a thread's copies
  static constexpr int COPIES = LINES / STEP;
  static_assert(STEP % 8 == 0 && LINES % STEP == 0, "a thread keeps its place in the permutation");
  static constexpr int BYTES = ROWS * BK * 2;

  const T *at;         // this thread's first chunk of the next tile
  i64 ld;
  int lines, across;   // how many lines and elements are left from there
  u32 to;              // its place in the tile

  DEVICE Copier(const T *base, i64 ld, i64 first, i64 rows, i64 k_begin, i64 k_end) : ld(ld) {
    const int line = threadIdx.x / ACROSS, chunk = threadIdx.x % ACROSS;
    const int left = (int)min(rows - first, (i64)ROWS), depth = (int)(k_end - k_begin);
    at = base + (K_MAJOR ? (first + line) * ld + k_begin + chunk * 8 : (k_begin + line) * ld + first + chunk * 8);
    lines = (K_MAJOR ? left : depth) - line;
    across = (K_MAJOR ? depth : left) - chunk * 8;
    to = (chunk / 8) * (LINES * LINE) + line * LINE + (((chunk ^ line) & 7) << 4);
  }
  // Copies the next tile of k to `tile`.
  DEVICE void next(u32 tile) {
    const int bytes = 2 * max(0, min(across, 8));
#pragma unroll(VECTOR ? COPIES : 2)
    for (int j = 0; j < COPIES; j++) {
      const bool inside = j * STEP < lines;
      const T *from = at + j * STEP * ld;
      if constexpr (VECTOR) {
        copy_async(tile + to + j * STEP * LINE, from, inside ? bytes : 0);
      } else {
        Pack<T> v;
#pragma unroll
        for (int e = 0; e < 8; e++) v.x[e] = inside && e < across ? from[e] : T{0};
        store_shared(tile + to + j * STEP * LINE, v);
      }
    }
    at += K_MAJOR ? BK : BK * ld;
    (K_MAJOR ? across : lines) -= BK;
  }
};

// What a warp reads of such a tile: 16 of m (or n) by 16 of k, as four 8 x 8 matrices. mma wants A's in the order of m
// first and B's in the order of k first: M_FIRST.
template <int ROWS, bool K_MAJOR, bool M_FIRST> struct Reader {
  u32 line, swizzle;
  DEVICE Reader(int origin) {   // origin: the warp's first m (or n) in the tile, a multiple of 32
    const int lane = threadIdx.x % 32, r = lane & 7, first = lane >> 3 & 1, second = lane >> 4;
    const int m8 = M_FIRST ? first : second, k8 = M_FIRST ? second : first;
    if (K_MAJOR) {
      line = (origin + m8 * 8 + r) * LINE;
      swizzle = k8 ^ r;
    } else {
      line = (origin / 64) * (BK * LINE) + (k8 * 8 + r) * LINE;
      swizzle = (origin / 8 & 7) ^ m8 ^ r;
    }
  }
  // Rows 16 i.., k from 16 step.
  DEVICE void read(u32 (&x)[4], u32 tile, int i, int step) const {
    if (K_MAJOR) {
      load_matrices(x, tile + line + i * 16 * LINE + ((swizzle ^ (step * 2)) << 4));
    } else {
      load_transposed(x, tile + line + (i / 4) * (BK * LINE) + step * 16 * LINE + ((swizzle ^ (i % 4 * 2)) << 4));
    }
  }
};

// ---- the product ----

template <int BM, int BN, int WM, int WN, int STAGES> struct Shape {
  static constexpr int THREADS = 32 * (BM / WM) * (BN / WN);
  static constexpr int STAGE = (BM + BN) * BK * 2;
  static constexpr int TILE_LD = BN + 8;   // floats of a row of sums in shared memory: a warp's stores meet no bank twice
  static constexpr int BYTES = STAGES * STAGE;
  static_assert(BM * TILE_LD * 4 <= BYTES, "the sums take the place of the operands");
};

template <int BM, int BN, int WM, int WN, int STAGES, bool VECTOR> DEVICE void multiply(const Product &p) {
  using S = Shape<BM, BN, WM, WN, STAGES>;
  constexpr int MT = WM / 16, NT = WN / 16, STEPS = BK / 16;
  extern __shared__ __align__(128) u8 shared[];
  const u32 stages = shared_address(shared);
  const Place at = place<BM, BN, 16>(p, blockIdx.x, blockIdx.y, blockIdx.z);
  Copier<BM, A_K, S::THREADS, VECTOR> copy_a(p.a + at.batch * p.batch_a, p.lda, at.row, p.m, at.k_begin, at.k_end);
  Copier<BN, B_K, S::THREADS, VECTOR> copy_b(p.b + at.batch * p.batch_b, p.ldb, at.column, p.n, at.k_begin, at.k_end);
  const int warp = threadIdx.x / 32, row = warp / (BN / WN) * WM, column = warp % (BN / WN) * WN;
  const Reader<BM, A_K, true> read_a(row);
  const Reader<BN, B_K, false> read_b(column);
  const int tiles = (int)((at.k_end - at.k_begin + BK - 1) / BK);

  float acc[MT][2 * NT][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < tiles) {
      copy_a.next(stages + s * S::STAGE);
      copy_b.next(stages + s * S::STAGE + BM * LINE);
    }
    copy_commit();
  }
  u32 now = stages, free = stages + (STAGES - 1) * S::STAGE;
  u32 a[2][MT][4], b[2][NT][4];
  for (int t = 0; t < tiles; t++) {
    copy_wait<STAGES - 2>();
    __syncthreads();   // tile t is there for all, and all are done with tile t - 1, whose place the next copy takes
    const u32 tile_a = now, tile_b = now + BM * LINE;
#pragma unroll
    for (int i = 0; i < MT; i++) read_a.read(a[0][i], tile_a, i, 0);
#pragma unroll
    for (int j = 0; j < NT; j++) read_b.read(b[0][j], tile_b, j, 0);
    if (t + STAGES - 1 < tiles) {
      copy_a.next(free);
      copy_b.next(free + BM * LINE);
    }
    copy_commit();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const int x = s & 1;
      if (s + 1 < STEPS) {   // the next step's operands travel while this one multiplies
#pragma unroll
        for (int i = 0; i < MT; i++) read_a.read(a[x ^ 1][i], tile_a, i, s + 1);
#pragma unroll
        for (int j = 0; j < NT; j++) read_b.read(b[x ^ 1][j], tile_b, j, s + 1);
      }
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 2 * NT; j++) multiply_add<T>(acc[i][j], a[x][i], b[x][j / 2][j % 2 * 2], b[x][j / 2][j % 2 * 2 + 1]);
    }
    free = now;
    now = now + S::STAGE == stages + S::BYTES ? stages : now + S::STAGE;
  }

  copy_wait<0>();
  __syncthreads();
  float *sums = reinterpret_cast<float *>(shared);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < 2 * NT; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float *to = sums + (row + i * 16 + h * 8 + lane / 4) * S::TILE_LD + column + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2 *>(to) = make_float2(acc[i][j][h * 2], acc[i][j][h * 2 + 1]);
      }
  __syncthreads();
  constexpr int STEP = S::THREADS / (BN / 8), M = 4;   // rows between a thread's eight columns
  const int r0 = threadIdx.x / (BN / 8), c = threadIdx.x % (BN / 8) * 8;
  for (int r = r0; r < BM; r += M * STEP) {
    float x[M][8];
#pragma unroll
    for (int i = 0; i < M; i++) load_row(x[i], sums + (r + i * STEP) * S::TILE_LD + c, 8);
    emit(p, at, at.row + r, STEP, at.column + c, x);
  }
}

KERNEL __launch_bounds__(256, 1) gemm_128x256(const Product p) { multiply<128, 256, 64, 64, 4, true>(p); }
KERNEL __launch_bounds__(128, 2) gemm_128x128(const Product p) { multiply<128, 128, 64, 64, 3, true>(p); }
KERNEL __launch_bounds__(128, 3) gemm_64x64(const Product p) { multiply<64, 64, 32, 32, 4, true>(p); }
KERNEL __launch_bounds__(128, 2) gemm_any(const Product p) { multiply<128, 128, 64, 64, 3, false>(p); }
KERNEL gemm_sum(const Product p) { sum_parts(p); }
