// hadamard_quantize for Hopper: rows of 16-bit numbers, turned in the registers of one warp for every 2048 of them.
//
// A thread (g, t) of a warp, 8 by 4, has of blocks 2g and 2g + 1 of 128 columns those at 32s + 8t + j. The matrix unit
// turns what four threads have beside each other, bits 0, 1 (in j), 3 and 4 (t) of a column, as a product with H of 16:
// exact products, float32 sums. Where its answers lie is where its inputs lay. Bits 2, 5, 6 and 7 are then sums and
// differences of a thread's own numbers, 8 to 10 those of two threads, and 11 those of two warps. H of all bits is the
// product of these, in any order.

#include "sm90.cuh"

constexpr int TILE = 2048;  // columns, of one row or of several
constexpr int TILES = (ROWS * K + TILE - 1) / TILE, THREADS = 32 * TILES;
static_assert(K % 256 == 0 && K % B == 0 && B >= 32 && B <= 2 * TILE, "a thread's 256 columns are of one row");
static_assert(B <= TILE || TILES % 2 == 0, "two warps turn together");

__device__ __forceinline__ void bring(u32 to, const void *from, bool inside) {  // 16 bytes, or zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void times_h16(float (&y)[4], const u32 (&x)[4], u32 low, u32 high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32."
#if HALF
      "f16.f16"
#else
      "bf16.bf16"
#endif
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(low), "r"(high), "f"(0.0f));
}

__device__ __forceinline__ void turn(float &a, float &b) {
  const float was = a;
  a = was + b;
  b = was - b;
}

__device__ __forceinline__ u32 four(const float *x, float by) {
#if FP8
  return four_e4m3(x[0] * by, x[1] * by, x[2] * by, x[3] * by);
#else
  return four_bytes(x, by);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) hadamard_quantize_sm90(
    const char *x, const signed char *signs, const float *factor, char *q, float *scale, int M, float top, float tiny,
    float shrink) {
  extern __shared__ char memory[];
  uint4 *own = (uint4 *)memory + threadIdx.x;       // [8][THREADS]
  float *turned = (float *)memory + 32 * THREADS;  // [32][THREADS], where two warps turn together
  int *most = (int *)(turned + (B > TILE ? 32 * THREADS : 0));  // [3][ROWS]

  const int lane = threadIdx.x % 32, t = lane % 4, at = threadIdx.x / 32 * TILE + lane / 4 * 256;  // in ROWS rows
  const int row = at / K, column = at % K + 8 * t;
  const bool there = row < ROWS;
  auto place = [](int h, int s) { return 128 * h + 32 * s; };
  const int second = threadIdx.x / 32 % 2, to_column = B > TILE ? column - second * (TILE - 128) : column;
  auto to_place = [](int h, int s) { return (B > TILE ? TILE : 128) * h + 32 * s; };

  u32 h16[2][2];  // [answers 2u, 2u + 1 of four][inputs 0, 1 and 2, 3 of four], of thread g / 2 and of this one
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32 pair = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int parity = __popc((2 * i + j) & (2 * u + lane / 4 % 2)) + __popc(t & lane / 8);
        pair |= ((HALF ? 0x3C00u : 0x3F80u) | parity % 2 << 15) << 16 * j;
      }
      h16[u][i] = pair;
    }
  u32 flips[2] = {};  // of each pair of columns; word i's sign bits come up by shifting i to the left
  if (there) {
#pragma unroll
    for (int word = 0; word < 32; ++word)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (signs[column + place(word / 16, word / 4 % 4) + word % 4 * 2 + j] < 0)
          flips[word / 16] |= 1u << (15 - word % 16 + 16 * j);
  }
  if (threadIdx.x < 3 * ROWS) most[threadIdx.x] = 0;
  __syncthreads();

  auto fetch = [&](int first) {
    const bool inside = there && first + row < M;
    const char *from = x + 2 * (inside ? (i64)(first + row) * K + column : 0);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      bring(address_of(own) + i * THREADS * 16, from + (inside ? 2 * place(i / 4, i % 4) : 0), inside);
  };

  const int step = gridDim.x * ROWS;
  int first = blockIdx.x * ROWS, turn_of = 0;
  if (first < M) fetch(first);
  for (; first < M; first += step, turn_of = turn_of == 2 ? 0 : turn_of + 1) {
    u32 raw[2][4][4];
    wait_for_own();
#pragma unroll
    for (int i = 0; i < 8; ++i) *(uint4 *)raw[i / 4][i % 4] = own[i * THREADS];
    if (first + step < M) fetch(first + step);

    float y[2][4][8];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[h][s][i] ^= flips[h] << (4 * s + i) & 0x80008000u;
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int a = 0; a < 2; ++a) {
        const u32 in[4] = {raw[0][s][2 * a], raw[1][s][2 * a], raw[0][s][2 * a + 1], raw[1][s][2 * a + 1]};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float out[4];
          times_h16(out, in, h16[u][0], h16[u][1]);
          y[0][s][4 * a + 2 * u] = out[0];
          y[0][s][4 * a + 2 * u + 1] = out[1];
          y[1][s][4 * a + 2 * u] = out[2];
          y[1][s][4 * a + 2 * u + 1] = out[3];
        }
      }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < 4) {
#pragma unroll
          for (int s = 0; s < 4; ++s) turn(y[h][s][j], y[h][s][j + 4]);
        }
      }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (B >= 64) turn(y[h][0][j], y[h][1][j]), turn(y[h][2][j], y[h][3][j]);
        if (B >= 128) turn(y[h][0][j], y[h][2][j]), turn(y[h][1][j], y[h][3][j]);
      }
    float *flat = y[0][0];
    if (B >= 256) {
#pragma unroll
      for (int i = 0; i < 32; ++i) turn(flat[i], flat[i + 32]);
    }
#pragma unroll
    for (int far = 4; far < 32 && far < B / 64; far *= 2) {
      const float sign = lane & far ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < 64; ++i) flat[i] = fmaf(flat[i], sign, __shfl_xor_sync(~0u, flat[i], far));
    }
    if (B > TILE) {  // block 2g + `second` of both tiles comes to this thread, the other block to the other warp's
#pragma unroll
      for (int i = 0; i < 32; ++i) turned[i * THREADS + threadIdx.x] = second ? flat[i] : flat[i + 32];
      asm volatile("bar.sync %0, 64;" ::"r"(threadIdx.x / 64 + 1) : "memory");
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float mine = second ? flat[i + 32] : flat[i], its = turned[i * THREADS + (threadIdx.x ^ 32)];
        flat[i] = mine + its;
        flat[i + 32] = second ? its - mine : mine - its;
      }
    }
#if FACTOR
    if (there) {
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        const float4 by = *(const float4 *)(factor + to_column + to_place(i / 32, i / 8 % 4) + i % 8);
        flat[i] *= by.x;
        flat[i + 1] *= by.y;
        flat[i + 2] *= by.z;
        flat[i + 3] *= by.w;
      }
    }
#endif

    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 64; ++i) largest = larger(largest, fabsf(flat[i]));
    largest = larger(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = larger(largest, __shfl_xor_sync(~0u, largest, 2));
    int *here = most + turn_of * ROWS;
    if (there && t == 0) atomicMax(here + row, __float_as_int(largest));  // as whole numbers, NaN is the largest too
    __syncthreads();
    if (threadIdx.x < ROWS) most[(turn_of == 0 ? 2 : turn_of - 1) * ROWS + threadIdx.x] = 0;  // all have read it
    if (there && first + row < M) {
      const float its = larger(__int_as_float(here[row]) * shrink, tiny) / top, by = 1.0f / its * shrink;
      if (column == 0) scale[first + row] = its;
      char *to = q + (i64)(first + row) * K + to_column;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        __stcs((uint2 *)(to + to_place(i / 4, i % 4)), make_uint2(four(flat + 8 * i, by), four(flat + 8 * i + 4, by)));
    }
  }
}
