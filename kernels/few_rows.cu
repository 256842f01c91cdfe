// Products of a few rows, for which a weight matrix is read once: norm, product and what follows it in one launch.
//
//   n[r, k] = x[r, k], or with g:  x[r, k] rstd[r] g[k],  rstd[r] = 1 / sqrt(mean(x[r]^2) + eps), never rounded to T
//   few_rows:        y[r, c] = sum_k n[r, k] w[c, k]  + bias[c] + residual[r, c]   (bias, residual: null where there is none)
//   few_rows_gated:  y[r, c] = silu(sum_k n[r, k] w[c, k]) sum_k n[r, k] up[c, k],  silu as in swiglu.cu
//
// x [rows, k], w and up [columns, k], g [k], bias [columns], residual and y [rows, columns]: by the strides of their rows,
// rows dense, k > 0. y is overwritten and may lie where residual does: an element is read by the thread that writes it. Sums
// are in f32.
//
// Reading w (and up) once is all the cost, at the rate of memory, so a block is a stream of them: 8 loads of 16 bytes a thread
// are on their way at once, the first of them before anything else is looked at, and before the kernel ahead of this one has
// ended where the launch allows that. A block takes 8 columns at a time, its 8 warps lines of 128 bytes of them in turn: lane
// 4 i + t word t or t + 4 of column i. That is how tensor cores take B of an m16n8k16, if both sides agree that the 8 elements
// of a word are the numbers 2t, 2t + 1, 2t + 8, 2t + 9 of two products. A are the rows from shared memory: what T keeps of n
// in rows 0 to 7, and what it loses in rows 8 to 15, so that products see n with twice T's bits, at one cost for 1 row or 8.
// In f32 lanes multiply by themselves.
//
// A row's result depends on nothing but that row, in any bit: the order of its sums is fixed by k alone (lines in turn to 8
// warps, each warp's from first to last, even and odd products apart, then warp 0 to 7), whatever R, the grid and alignment.
//
// Launch: (blocks, ceil(rows / share)) blocks of 256 threads; block i has columns 8 i .. 8 i + 7 and every 8 blocks further.
// Shared memory: ((16-bit T with g ? 2 : 1) share + (g ? 1 : 0)) pitches of ceil(bytes of a row / 2048) 2048 + 64 bytes, an
// odd multiple of 64 so that neighbouring rows lie in other banks. share <= 8: rows that a block has.
#include "rows.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;   // as in ops/cuda/few_rows.rs, with ROWS, COLUMNS and the pitch
constexpr int ROWS = 8, COLUMNS = 8, LINE = 8;   // LINE: words in 128 bytes
constexpr int PAD = 128;                         // words: rows in shared memory end with zeros, so that all steps are whole
constexpr int LOADS = 8, TURNS = 2;              // of a thread at once; renewed in two turns
constexpr int E = 16 / sizeof(T);
constexpr bool SPLIT = sizeof(T) == 2;
typedef Floats<T> F;

// 64-bit fields only (`product` in ops/cuda/few_rows.rs).
struct Few {
  i64 rows, k, columns, share, x_row, w_row, up_row, residual_row, y_row, eps_bits;
};

// ---- loads and products ----

// 16 bytes that nobody reads again, zeros where `in` is false. Volatile: a load that the compiler puts off is not on its way.
DEVICE Words stream16(const void *p, bool in) {
  Words v;
  asm volatile(
      "{\n.reg .pred in;\nsetp.ne.u32 in, %5, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
      "@in ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p), "r"((u32)in));
  return v;
}
// 16 bytes, zeros where `in` is false. Through L2 alone: L1 may remember what was there before the kernel ahead of this one
// wrote.
DEVICE void copy16(Words *to, const void *from, bool in) {
  const u32 at = (u32)__cvta_generic_to_shared(to), bytes = in ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// c += a b, 16 by 16 by 8. Volatile, so that products stay before the loads that take their operands' place.
#define MULTIPLY(TYPE)                                                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                                \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                              \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (Same<T, bf16>::value) MULTIPLY("bf16");
  else MULTIPLY("f16");
}

// ---- sums of 8 rows and 8 columns, some of them in each lane ----

struct Sums { float even[4], odd[4]; };   // SPLIT: an m16n8 each. f32: rows 0 to 3, rows 4 to 7
DEVICE void clear(Sums &s) {
#pragma unroll
  for (int j = 0; j < 4; j++) s.even[j] = s.odd[j] = 0.0f;
}
// Of this warp, to where row r and column c have place 8 r + c.
DEVICE void put(float *to, const Sums &s) {
  const int lane = threadIdx.x & 31, i = lane >> 2, t = lane & 3;
  if constexpr (SPLIT) {
    to[COLUMNS * i + 2 * t] = (s.even[0] + s.odd[0]) + (s.even[2] + s.odd[2]);
    to[COLUMNS * i + 2 * t + 1] = (s.even[1] + s.odd[1]) + (s.even[3] + s.odd[3]);
  } else {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const float low = lanes_sum(s.even[r], 4), high = lanes_sum(s.odd[r], 4);
      if (r == t) to[COLUMNS * r + i] = low, to[COLUMNS * (r + 4) + i] = high;
    }
  }
}
DEVICE float total(const float (&parts)[WARPS][ROWS * COLUMNS], int at) {
  float sum = parts[0][at];
#pragma unroll
  for (int w = 1; w < WARPS; w++) sum += parts[w][at];
  return sum;
}

// ---- the rows in shared memory ----

// Threads have the same words of every row throughout, so they read what they wrote themselves without a barrier.
DEVICE void stage(Words *to, const T *row, int words, int k) {
  for (int word = threadIdx.x; word < words; word += THREADS) {
    if constexpr (PACKED) copy16(to + word, row + word * E, word * E < k);
    else to[word] = load_words(row, word * E, k);
  }
}

// x to n in place, and what T loses of it to `lost`.
DEVICE void normalize(Words *x, Words *lost, const Words *g, int rows, int words, int pitch, int k, float eps) {
  __shared__ float squares[WARPS][ROWS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float s[ROWS] = {};
  for (int word = threadIdx.x; word < words; word += THREADS) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= rows) break;
      const F v = unpacked<T>(x[r * pitch + word]);
#pragma unroll
      for (int j = 0; j < E; j++) s[r] = fmaf(v.x[j], v.x[j], s[r]);
    }
  }
  // lanes 4 r .. 4 r + 3 come to hold row r: half of the rows stays, half goes to the other lane
#pragma unroll
  for (int half = ROWS / 2; half > 0; half /= 2) {
    const bool high = lane & (4 * half);
#pragma unroll
    for (int r = 0; r < half; r++) {
      const float stays = high ? s[r + half] : s[r], goes = high ? s[r] : s[r + half];
      s[r] = stays + __shfl_xor_sync(0xffffffffu, goes, 4 * half);
    }
  }
  const float mine = lanes_sum(s[0], 4);
  if ((lane & 3) == 0) squares[warp][lane >> 2] = mine;
  __syncthreads();
  float sum = squares[0][lane >> 2];
#pragma unroll
  for (int w = 1; w < WARPS; w++) sum += squares[w][lane >> 2];
  const float all = 1.0f / sqrtf(sum / k + eps);
#pragma unroll 1
  for (int r = 0; r < rows; r++) {
    const float rstd = __shfl_sync(0xffffffffu, all, 4 * r);
    for (int word = threadIdx.x; word < words; word += THREADS) {
      F v = unpacked<T>(x[r * pitch + word]);
      const F weight = unpacked<T>(g[word]);
#pragma unroll
      for (int j = 0; j < E; j++) v.x[j] = v.x[j] * rstd * weight.x[j];
      const Words kept = packed<T>(v);
      x[r * pitch + word] = kept;
      if constexpr (SPLIT) {
        const F some = unpacked<T>(kept);
#pragma unroll
        for (int j = 0; j < E; j++) v.x[j] = fabsf(some.x[j]) < infinity() ? v.x[j] - some.x[j] : 0.0f;   // past T's range nothing is left to add
        lost[r * pitch + word] = packed<T>(v);
      }
    }
  }
}

// ---- a block ----

// N matrices whose columns go together.
template <int N>
DEVICE void product(T *y, const T *x, const T *g, const T *w, const T *up, const T *bias, const T *residual, const Few &f) {
  constexpr int WORDS = LOADS / TURNS / N, STEP = WORDS / 2 * WARPS * LINE;   // of a column: a thread's, a block's in a step
  extern __shared__ __align__(16) Words shared[];
  __shared__ float parts[2][N][WARPS][ROWS * COLUMNS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, i = lane >> 2, t = lane & 3;
  const int k = (int)f.k, words = (k + E - 1) / E, steps = (words + STEP - 1) / STEP;
  const int padded = (words + PAD - 1) / PAD * PAD, pitch = padded + LINE / 2;   // rows of x in shared memory
  const int own = warp * LINE + t;                                                // the first word of this lane
  const int columns = (int)f.columns, parcels = (columns + COLUMNS - 1) / COLUMNS;

  launch_dependents();
  const auto word_of = [](int u) { return u / 2 * (WARPS * LINE) + u % 2 * (LINE / 2); };
  Words ring[TURNS][N][WORDS];
  int ahead = blockIdx.x, ahead_step = 0;   // what is to be loaded next
  const auto fill = [&](Words (&to)[N][WORDS]) {
    const int first = own + ahead_step * STEP, end = ahead < parcels ? words : 0;
    const i64 c = min(ahead * COLUMNS + i, columns - 1);   // past the last: read again, not written
#pragma unroll
    for (int n = 0; n < N; n++) {
      const T *row = n == 0 ? w + c * f.w_row : up + c * f.up_row;
#pragma unroll
      for (int u = 0; u < WORDS; u++) {
        const int word = first + word_of(u);
        if constexpr (PACKED) to[n][u] = stream16(row + (i64)first * E + word_of(u) * E, word < end);
        else to[n][u] = load_words(row, (i64)word * E, word < end ? k : 0);
      }
    }
    if (++ahead_step == steps) ahead_step = 0, ahead += gridDim.x;
  };
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) fill(ring[turn]);

  const int share = (int)f.share, top = blockIdx.y * share, rows = min(share, (int)f.rows - top);
  Words *const lost = shared + share * pitch, *const weights = lost + (SPLIT ? share * pitch : 0);
  if (g) stage(weights, g, padded, k);
  await_kernel_before();
  for (int r = 0; r < rows; r++) stage(shared + r * pitch, x + (i64)(top + r) * f.x_row, padded, k);
  if constexpr (PACKED) copies_wait();
  if (g) normalize(shared, lost, weights, rows, padded, pitch, k, __uint_as_float((u32)f.eps_bits));
  __syncthreads();

  // Where SPLIT: a lane's row of A. What comes of rows past the last is not written, so they may be any.
  const Words *const own_kept = shared + min(i, rows - 1) * pitch + own;
  const int to_lost = share * pitch;
  Sums sums[N];
#pragma unroll
  for (int n = 0; n < N; n++) clear(sums[n]);
  int parcel = blockIdx.x, step = 0, side = 0;
#pragma unroll 1
  for (;;) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
#pragma unroll
      for (int u = 0; u < WORDS; u++) {
        const int at = step * STEP + word_of(u);
        if constexpr (SPLIT) {
          const Words a = own_kept[at];
          Words b = {};
          if (g) b = own_kept[at + to_lost];
#pragma unroll
          for (int n = 0; n < N; n++) {
            const Words &v = ring[turn][n][u];
            multiply(sums[n].even, a.w[0], b.w[0], a.w[1], b.w[1], v.w[0], v.w[1]);
            multiply(sums[n].odd, a.w[2], b.w[2], a.w[3], b.w[3], v.w[2], v.w[3]);
          }
        } else {
          F v[N];
#pragma unroll
          for (int n = 0; n < N; n++) v[n] = unpacked<T>(ring[turn][n][u]);
#pragma unroll
          for (int q = 0; q < ROWS; q++) {
            if (q >= rows) break;
            const F a = unpacked<T>(shared[q * pitch + own + at]);
#pragma unroll
            for (int n = 0; n < N; n++) {
              float &sum = q < 4 ? sums[n].even[q % 4] : sums[n].odd[q % 4];
#pragma unroll
              for (int j = 0; j < E; j++) sum = fmaf(a.x[j], v[n].x[j], sum);
            }
          }
        }
      }
      fill(ring[turn]);
      if (++step < steps) continue;
      const int r = threadIdx.x / COLUMNS, c = parcel * COLUMNS + threadIdx.x % COLUMNS;
      const bool ends = r < rows && c < columns;
      T before = {};   // fetched while warps wait for one another
      if (N == 1 && ends && residual) before = residual[(top + r) * f.residual_row + c];
#pragma unroll
      for (int n = 0; n < N; n++) {
        put(parts[side][n][warp], sums[n]);
        clear(sums[n]);
      }
      __syncthreads();
      if (ends) {
        float sum = total(parts[side][0], threadIdx.x);
        if constexpr (N == 1) {
          if (bias) sum += to_f32(bias[c]);
          if (residual) sum += to_f32(before);
        } else {
          sum = sum * sigmoid(sum) * total(parts[side][1], threadIdx.x);
        }
        y[(top + r) * f.y_row + c] = from_f32<T>(sum);
      }
      parcel += gridDim.x, step = 0;
      if (parcel >= parcels) return;
      side ^= 1;   // nobody is more than one barrier ahead, so these are read before they are written again
    }
  }
}

#define PARAMETERS T *y, const T *x, const T *g, const T *w, const T *up, const T *bias, const T *residual, Few f

KERNEL __launch_bounds__(THREADS, SPLIT && PACKED ? 4 : 2) few_rows(PARAMETERS) {
  product<1>(y, x, g, w, up, bias, residual, f);
}
KERNEL __launch_bounds__(THREADS, SPLIT && PACKED ? 3 : 2) few_rows_gated(PARAMETERS) {
  product<2>(y, x, g, w, up, bias, residual, f);
}
