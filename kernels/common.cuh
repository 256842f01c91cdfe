// What the kernels share: element types, vector loads, reductions, strided rows. Compiled by NVRTC: no toolkit headers.
//
// A module is one .cu file compiled for one element type T (FELID_T: float, bf16 or f16), so entry points are plain
// extern "C" names, the same for every type. Arithmetic runs in f32 and rounds once, to nearest even, when it is stored.
// Nothing here uses atomics: every sum has one order, so results do not depend on scheduling.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

struct alignas(2) bf16 { u16 bits; };
struct alignas(2) f16 { u16 bits; };

#ifndef FELID_T
#define FELID_T float
#endif
typedef FELID_T T;

template <typename A, typename B> struct Same { static constexpr bool value = false; };
template <typename A> struct Same<A, A> { static constexpr bool value = true; };

// ---- conversions ----

DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float to_f32(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }

template <typename D> DEVICE D from_f32(float x);
template <> DEVICE float from_f32<float>(float x) { return x; }
template <> DEVICE bf16 from_f32<bf16>(float x) { bf16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
template <> DEVICE f16 from_f32<f16>(float x) { f16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }

// Two elements as the 32 bits that tensor cores take: `low` in the low half.
template <typename D> DEVICE u32 pack2(float low, float high);
template <> DEVICE u32 pack2<bf16>(float low, float high) { u32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }
template <> DEVICE u32 pack2<f16>(float low, float high) { u32 y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }

// ---- 16-byte accesses ----

template <typename D> struct alignas(16) Pack {
  static constexpr int N = 16 / sizeof(D);
  D x[N];
};
template <typename D> DEVICE Pack<D> load_pack(const D *p) { return *reinterpret_cast<const Pack<D> *>(p); }
template <typename D> DEVICE void store_pack(D *p, const Pack<D> &v) { *reinterpret_cast<Pack<D> *>(p) = v; }
DEVICE bool aligned16(const void *p) { return (reinterpret_cast<u64>(p) & 15) == 0; }

// ---- 16 bytes of a row as words: N elements, unpacked when they are used ----

struct alignas(16) Words { u32 w[4]; };

// Modules that move rows this way exist twice: compiled with PACKED=1 for rows that begin and end on 16 bytes, and with
// PACKED=0 for others, whose elements come one by one. Each thread has the same elements in both, so results do not depend
// on alignment.
#ifndef PACKED
#define PACKED 1
#endif

// The words at column `at` of a row of d elements: zeros past its end.
template <typename D> DEVICE Words load_words(const D *row, i64 at, i64 d) {
  Words v = {};
  if constexpr (PACKED) {
    if (at < d) v = *reinterpret_cast<const Words *>(row + at);
  } else if constexpr (sizeof(D) == 4) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (at + j < d) v.w[j] = __float_as_uint(row[at + j]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (at + j < d) v.w[j / 2] |= (u32)row[at + j].bits << (j % 2 * 16);
  }
  return v;
}
template <typename D> DEVICE void store_words(D *row, i64 at, i64 d, const Words &v) {
  if constexpr (PACKED) {
    if (at < d) *reinterpret_cast<Words *>(row + at) = v;
  } else if constexpr (sizeof(D) == 4) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (at + j < d) row[at + j] = __uint_as_float(v.w[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (at + j < d) row[at + j].bits = (u16)(v.w[j / 2] >> (j % 2 * 16));
  }
}

// Words as the N = 16 / sizeof(D) numbers that they hold.
template <typename D> struct Floats { float x[16 / sizeof(D)]; };
template <typename D> DEVICE Floats<D> unpacked(const Words &v) {
  Floats<D> f;
  if constexpr (sizeof(D) == 4) {
#pragma unroll
    for (int j = 0; j < 4; j++) f.x[j] = __uint_as_float(v.w[j]);
  } else if constexpr (Same<D, bf16>::value) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      f.x[2 * j] = __uint_as_float(v.w[j] << 16);
      f.x[2 * j + 1] = __uint_as_float(v.w[j] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) f.x[j] = to_f32(D{(u16)(v.w[j / 2] >> (j % 2 * 16))});
  }
  return f;
}
template <typename D> DEVICE Words packed(const Floats<D> &f) {
  Words v;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if constexpr (sizeof(D) == 4) v.w[j] = __float_as_uint(f.x[j]);
    else v.w[j] = pack2<D>(f.x[2 * j], f.x[2 * j + 1]);
  }
  return v;
}

// ---- reductions: the order of additions is fixed by the block's size ----

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}
// Sum over groups of `lanes` neighbouring threads of a warp, a power of two; all of the warp takes part.
DEVICE float lanes_sum(float x, int lanes) {
  for (int o = lanes >> 1; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}
// Sum over the whole (one-dimensional) block, returned to every thread. `shared` holds at least 32 floats; the block
// may use it again after the call returns.
DEVICE float block_sum(float x, float *shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  x = warp_sum(x);
  if (warps == 1) return x;
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? shared[lane] : 0.0f);
  __syncthreads();
  return x;
}
DEVICE float block_max(float x, float *shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  x = warp_max(x);
  if (warps == 1) return x;
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = warp_max(lane < warps ? shared[lane] : -__int_as_float(0x7f800000));
  __syncthreads();
  return x;
}

// ---- strided views, passed by value (`View` in src/cuda/launch.rs) ----

// Dimensions of a view, outermost first; neighbours that behave as one are merged by the host, so rank is small.
constexpr int MAX_RANK = 8;
struct View {
  i64 rank;
  i64 shape[MAX_RANK];
  i64 stride[MAX_RANK];
};
// Where element (or row) i of the view lies, counted in row-major order.
DEVICE i64 offset_of(const View &v, i64 i) {
  if (v.rank == 1) return i * v.stride[0];
  i64 at = 0;
  for (int d = (int)v.rank - 1; d > 0; d--) {
    // 32-bit division is several times faster, and most sizes fit
    i64 q, r;
    if ((u64)i <= 0xffffffffull && (u64)v.shape[d] <= 0xffffffffull) {
      q = (u32)i / (u32)v.shape[d];
      r = (u32)i - (u32)q * (u32)v.shape[d];
    } else {
      q = i / v.shape[d];
      r = i - q * v.shape[d];
    }
    at += r * v.stride[d];
    i = q;
  }
  return at + i * v.stride[0];
}

DEVICE i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE i64 thread_count() { return (i64)gridDim.x * blockDim.x; }

// ---- kernels that overlap (`Grid::early` in src/cuda/launch.rs); nothing where launches do not ask for it ----

// From here on the next kernel's blocks may begin, where this one's leave room.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Before this returns, nothing that an earlier kernel writes may be read, and nothing written. Every block has to come here, or
// a later kernel would begin before earlier ones are done.
DEVICE void await_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// For kernels that need all of what is before them: only their start overlaps. What they read must not be `__restrict__`, or the
// compiler may read it first.
DEVICE void begin_early() {
  launch_dependents();
  await_kernel_before();
}

DEVICE float infinity() { return __int_as_float(0x7f800000); }
