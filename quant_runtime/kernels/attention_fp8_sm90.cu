// attention_fp8 for Hopper, in sm_90a: 128 queries of a head at a time, over the blocks of 128 keys that they keep.
//
// One group of warps (a single thread of it) takes tiles from a counter and has the copy engine bring Q, K and V; two
// groups have 64 queries each.
//
//   s   the scores of a block, whole numbers, and then its weights, float32        p   those in e4m3
//   t   weights times values of one block                                          o   the sum of all blocks so far
//
// With heads of 128 a group overlaps its own work, in all registers that there are: while a block's weights are
// multiplied by its values, the next one's scores are made and weighted, and what is waited for is asked for one block
// ahead. Heads of 64 have the same exponentials for half of the products, and the matrix unit waits for them. A group
// does one thing after another then, with half of a block's scores at a time, in so few registers that two programs run
// on a processor: their four groups are at different things and fill each other's gaps.
//
// Sums over a block are the matrix unit's, over blocks float32: the matrix unit keeps 14 bits of a float that it adds
// to. V has eight rows more, of which the first is ones, so that the sum of the weights is one more channel.
// The largest score is not followed exactly: weights are relative to the largest at the time it was last looked up, and
// may be 2**SLACK times as large as one. Up to that nothing is scaled again, and no thread asks another.
//
// REFRESH goes on to the blocks that are not kept, which stand behind the others in a list. What the kept ones answer
// waits in the two answers' own memory, where each thread finds its own: of 16-bit answers as two halves of itself.

#include "sm90.cuh"

constexpr int D = SIZE, BLOCK = 128, GROUPS = 2;
constexpr int Q_BYTES = BLOCK * D, K_BYTES = BLOCK * D, V_BYTES = BLOCK * D + 8 * BLOCK;  // V and its rows of ones
constexpr int WIDE = (D + 8) / 2;  // floats a thread has of 64 rows of D + 8 channels
[[maybe_unused]] constexpr int EARLY = 2;  // quarters of a block that are weighted before the last's products are in
[[maybe_unused]] constexpr int POLYNOMIAL = 4;  // with heads of 64, one in so many weights of a second half is one
constexpr int FAR = -(1 << 30);  // the score of a key that is not there
constexpr float P_BITS = 7.0f, SLACK = 1.75f;  // weights to 2**8.75, and e4m3 ends at 448 = 2**8.8
static_assert(D == 64 || D == 128);
static_assert(STAGES > 2 && (STAGES & STAGES - 1) == 0, "a block is held while the next but one is waited for");

// Rows of 128 bytes, or of 64, swizzled in groups of eight, as copy_tile leaves them.
template <int ROW> __device__ __forceinline__ u64 described(u32 address) {
  static_assert(ROW == 128 || ROW == 64);
  return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(8 * ROW >> 4) << 32 | (u64)(128 / ROW) << 62;
}

// The same by its low word, which alone depends on the address, and so takes half the registers.
template <int ROW> __device__ __forceinline__ u64 described_by(u32 low) { return described<ROW>(0) >> 32 << 32 | low; }

// As hold: floats as words, which these products have been tuned with.
template <int N, typename T> __device__ __forceinline__ void hold_words(T (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(reinterpret_cast<u32 &>(r[i]))::"memory");
}

// Nothing is in these registers from here on.
template <int N, typename T> __device__ __forceinline__ void forget(T (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "=r"(reinterpret_cast<u32 &>(r[i])));
}

// Four numbers in e4m3, times a power of two that is given as two halves.
__device__ __forceinline__ u32 times(u32 p, u32 by) {
  asm("{.reg .b16 l, h; .reg .b32 x, y; mov.b32 {l, h}, %0; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h;"
      "mul.rn.f16x2 x, x, %1; mul.rn.f16x2 y, y, %1; cvt.rn.satfinite.e4m3x2.f16x2 l, x;"
      "cvt.rn.satfinite.e4m3x2.f16x2 h, y; mov.b32 %0, {l, h};}" : "+r"(p) : "r"(by));
  return p;
}

__device__ __forceinline__ u32 as_two_halves(float x) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same without the exponential unit, off by 0.17 % at most; from -20 down, and of NaN, what is nothing in e4m3.
__device__ __forceinline__ float exp2_by_polynomial(float x) {
  x = fmaxf(x, -20.0f);  // or the exponent runs over
  const float whole = x + 12582912.0f, f = x - (whole - 12582912.0f);
  const float y = fmaf(fmaf(0.23842693f, f, 0.70344794f), f, 1.00044327f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(whole) << 23));
}

__device__ __forceinline__ u32 two_halves(float a, float b) {
  u32 r;
#if OUT == 1
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
#else
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
#endif
  return r;
}

// Two neighbours in bfloat16, or in float16.
template <bool BFLOAT16> __device__ __forceinline__ float2 two_floats(u32 x) {
  if constexpr (BFLOAT16) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000));
  float2 r;
  asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(r.x), "=f"(r.y)
      : "r"(x));
  return r;
}

// Two neighbours of the residual at `i`, an even place; `scale` is of int8 alone.
__device__ __forceinline__ float2 two_residuals(const void *residual, i64 i, float scale) {
#if RESIDUAL == 1
  const char2 x = *(const char2 *)((const signed char *)residual + i);
  return make_float2(x.x * scale, x.y * scale);
#elif RESIDUAL == 2
  return *(const float2 *)((const float *)residual + i);
#elif RESIDUAL > 2
  return two_floats<RESIDUAL == 3>(*(const u32 *)((const unsigned short *)residual + i));
#else
  return make_float2(0.0f, 0.0f);
#endif
}

// Two neighbours of an answer that waits, at `i`, an even place of both answers' memory.
__device__ __forceinline__ void leave(void *upper, void *lower, i64 i, float2 x) {
#if OUT == 0
  *(float2 *)((float *)upper + i) = x;
#else
  const u32 rounded = two_halves(x.x, x.y);
  const float2 has = two_floats<OUT == 1>(rounded);
  *(u32 *)((unsigned short *)upper + i) = rounded;
  *(u32 *)((unsigned short *)lower + i) = two_halves(x.x - has.x, x.y - has.y);
#endif
}

__device__ __forceinline__ float2 left_at(const void *upper, const void *lower, i64 i) {
#if OUT == 0
  return *(const float2 *)((const float *)upper + i);
#else
  const float2 x = two_floats<OUT == 1>(*(const u32 *)((const unsigned short *)upper + i));
  const float2 y = two_floats<OUT == 1>(*(const u32 *)((const unsigned short *)lower + i));
  return make_float2(x.x + y.x, x.y + y.y);
#endif
}

// Of two rows a thread has the scores of two neighbours in every eight keys, from 2 * quad on; `left` keys are there.
template <int N> __device__ __forceinline__ void hide(int (&s)[N], int left, int quad) {
#pragma unroll
  for (int i = 0; i < N; i++)
    if (left - 2 * quad <= 8 * (i / 4) + i % 2) s[i] = FAR;
}

template <int N> __device__ __forceinline__ void look(const int (&s)[N], int (&top)[2]) {
  top[0] = top[1] = FAR;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    top[0] = max(max(top[0], s[i]), s[i + 1]);
    top[1] = max(max(top[1], s[i + 2]), s[i + 3]);
  }
}

__device__ __forceinline__ float largest_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

// Weights of no keys are zero, whatever the scale.
__device__ __forceinline__ void drop(u32 (&p)[16], int left, int quad) {
#pragma unroll
  for (int i = 0; i < 16; i++) {
    u32 keep = 0;
#pragma unroll
    for (int c = 0; c < 4; c++)
      if (left - 2 * quad > 32 * (i / 4) + 16 * (i % 4 / 2) + 8 * (c / 2) + c % 2) keep |= 0xFFu << 8 * c;
    p[i] &= keep;
  }
}

#define FOUR(kind, x, i) kind(x[i]), kind(x[i + 1]), kind(x[i + 2]), kind(x[i + 3])
#define SIXTEEN(kind, x, i) FOUR(kind, x, i), FOUR(kind, x, i + 4), FOUR(kind, x, i + 8), FOUR(kind, x, i + 12)
#define NAMES32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"

// s += 64 rows of Q times 32 channels of 128 keys.
__device__ __forceinline__ void scores(int (&s)[64], u64 q, u64 k, int more) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0;"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,"
      "%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"
      "%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65,"
      " p;}"
      : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7]), "+r"(s[8]),
      "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]), "+r"(s[14]), "+r"(s[15]), "+r"(s[16]),
      "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]), "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), "+r"(s[24]),
      "+r"(s[25]), "+r"(s[26]), "+r"(s[27]), "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31]), "+r"(s[32]),
      "+r"(s[33]), "+r"(s[34]), "+r"(s[35]), "+r"(s[36]), "+r"(s[37]), "+r"(s[38]), "+r"(s[39]), "+r"(s[40]),
      "+r"(s[41]), "+r"(s[42]), "+r"(s[43]), "+r"(s[44]), "+r"(s[45]), "+r"(s[46]), "+r"(s[47]), "+r"(s[48]),
      "+r"(s[49]), "+r"(s[50]), "+r"(s[51]), "+r"(s[52]), "+r"(s[53]), "+r"(s[54]), "+r"(s[55]), "+r"(s[56]),
      "+r"(s[57]), "+r"(s[58]), "+r"(s[59]), "+r"(s[60]), "+r"(s[61]), "+r"(s[62]), "+r"(s[63])
      : "l"(q), "l"(k), "r"(more));
}

// s += 64 rows of Q times 32 channels of 64 keys.
__device__ __forceinline__ void scores(int (&s)[32], u64 q, u64 k, int more) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" NAMES32
               "}, %32, %33, p;}"
               : SIXTEEN("+r", s, 0), SIXTEEN("+r", s, 16)
               : "l"(q), "l"(k), "r"(more));
}

// t += weights of 32 keys, 64 rows, times 32 keys of all channels.
__device__ __forceinline__ void weighted(float (&t)[36], const u32 *p, u64 v, int more) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %41, 0; wgmma.mma_async.sync.aligned.m64n72k32.f32.e4m3.e4m3 {" NAMES32
               ",%32,%33,%34,%35}, {%36,%37,%38,%39}, %40, p, 1, 1;}"
               : SIXTEEN("+f", t, 0), SIXTEEN("+f", t, 16), FOUR("+f", t, 32)
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(more));
}

__device__ __forceinline__ void weighted(float (&t)[68], const u32 *p, u64 v, int more) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %73, 0;"
      "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,"
      "%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,"
      "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,"
      "%66,%67}, {%68,%69,%70,%71}, %72, p, 1, 1;}"
      : "+f"(t[0]), "+f"(t[1]), "+f"(t[2]), "+f"(t[3]), "+f"(t[4]), "+f"(t[5]), "+f"(t[6]), "+f"(t[7]), "+f"(t[8]),
      "+f"(t[9]), "+f"(t[10]), "+f"(t[11]), "+f"(t[12]), "+f"(t[13]), "+f"(t[14]), "+f"(t[15]), "+f"(t[16]),
      "+f"(t[17]), "+f"(t[18]), "+f"(t[19]), "+f"(t[20]), "+f"(t[21]), "+f"(t[22]), "+f"(t[23]), "+f"(t[24]),
      "+f"(t[25]), "+f"(t[26]), "+f"(t[27]), "+f"(t[28]), "+f"(t[29]), "+f"(t[30]), "+f"(t[31]), "+f"(t[32]),
      "+f"(t[33]), "+f"(t[34]), "+f"(t[35]), "+f"(t[36]), "+f"(t[37]), "+f"(t[38]), "+f"(t[39]), "+f"(t[40]),
      "+f"(t[41]), "+f"(t[42]), "+f"(t[43]), "+f"(t[44]), "+f"(t[45]), "+f"(t[46]), "+f"(t[47]), "+f"(t[48]),
      "+f"(t[49]), "+f"(t[50]), "+f"(t[51]), "+f"(t[52]), "+f"(t[53]), "+f"(t[54]), "+f"(t[55]), "+f"(t[56]),
      "+f"(t[57]), "+f"(t[58]), "+f"(t[59]), "+f"(t[60]), "+f"(t[61]), "+f"(t[62]), "+f"(t[63]), "+f"(t[64]),
      "+f"(t[65]), "+f"(t[66]), "+f"(t[67])
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(more));
}

// Behind the tiles in shared memory. A barrier is full when what it guards has come, and empty when all have read it.
struct Shared {
  u64 q_full[SLOTS], q_empty[SLOTS], tile_full[2], tile_empty[2], full[STAGES], empty[STAGES];
  float scale[STAGES];
  int keys[STAGES];  // from this block's first on: 128 or more, but of the last block
  int tile[2], count[2];
};

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, PROGRAMS) attention_fp8_sm90(
    const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
    const __grid_constant__ TensorMap map_v, const float *q_scale, const float *k_scale, const float *v_scale,
    const int *kept, const int *counts, const int *tokens, const void *residual, const float *residual_scale, void *out,
    void *second, int *next, int H, int N, int M, int P, int rows, int tiles, float softmax_scale, i64 list_b,
    i64 list_h, i64 list_r, i64 count_b, i64 count_h, i64 count_r, i64 token_b, i64 token_h) {
  extern __shared__ char raw[];
  const u32 base = (address_of(raw) + 1023) & ~1023;
  const u32 q_at = base, k_at = q_at + SLOTS * Q_BYTES, v_at = k_at + STAGES * K_BYTES;
  Shared &sh = *(Shared *)(raw + (base - address_of(raw)) + SLOTS * Q_BYTES + STAGES * (K_BYTES + V_BYTES));
  const int thread = threadIdx.x, group = thread / 128;

  if (thread == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(&sh.q_full[i], 1);
      barrier_init(&sh.q_empty[i], 4 * GROUPS);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(&sh.tile_full[i], 1);
      barrier_init(&sh.tile_empty[i], 4 * GROUPS);
    }
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&sh.full[i], 1);
      barrier_init(&sh.empty[i], 4 * GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = thread; i < STAGES * 256; i += (GROUPS + 1) * 128) {
    const int stage = i / 256, word = i % 256;
    const u32 to = v_at + stage * V_BYTES + BLOCK * D + word * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word < 32 ? 0x38383838 : 0));
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(D == 64 ? 32 : 24));
    if (thread == 0) {
      int stage = 0, phase = 0, slot = 0, slot_phase = 0, q = 0, q_phase = 0;
      for (;;) {
        const int tile = atomicAdd(next, 1);
        const int head = tile / rows, row = rows - 1 - tile % rows;  // text lies last and has the longest lists
        const bool real = tile < tiles;
        const int kept_blocks = real ? counts[head / H * count_b + head % H * count_h + row * count_r] : 0;
        const int count = REFRESH && real ? P / BLOCK : kept_blocks;  // a list goes on to the others
        wait(&sh.tile_empty[slot], slot_phase ^ 1);
        sh.tile[slot] = tile;
        sh.count[slot] = kept_blocks;
        arrive(&sh.tile_full[slot]);
        slot ^= 1;
        slot_phase ^= slot == 0;
        if (!real) break;
        const int *list = kept + head / H * list_b + head % H * list_h + row * list_r;
        const float *scales = k_scale + (i64)head * (P / BLOCK);
        int block = count > 0 ? list[0] : 0;
        wait(&sh.q_empty[q], q_phase ^ 1);
        expect(&sh.q_full[q], Q_BYTES);
        copy_tile(q_at + q * Q_BYTES, &map_q, 0, head * N + row * BLOCK, &sh.q_full[q]);
        if (++q == SLOTS) q = 0, q_phase ^= 1;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
          const int then = i + 1 < count ? list[i + 1] : 0;
          const float scale = scales[block];
          wait(&sh.empty[stage], phase ^ 1);
          u64 *bar = &sh.full[stage];
          sh.scale[stage] = scale;
          sh.keys[stage] = M - block * BLOCK;
          expect(bar, K_BYTES + BLOCK * D);
          copy_tile(k_at + stage * K_BYTES, &map_k, 0, head * P + block * BLOCK, bar);
          copy_tile(v_at + stage * V_BYTES, &map_v, block * BLOCK, head * D, bar);
          if (++stage == STAGES) stage = 0, phase ^= 1;
          block = then;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(D == 64 ? 104 : 240));
    const int mine = group - 1, lane = thread % 32, quad = lane % 4;
    int visited = 0, tiles_seen = 0;
    const u64 q_part = described<D>(q_at + mine * 64 * D);
    int s[D == 64 ? 32 : 64];
    float o[WIDE], t[WIDE];
    u32 p[16];
    for (;; tiles_seen++) {
      const int slot = tiles_seen & 1;
      wait(&sh.tile_full[slot], tiles_seen >> 1 & 1);
      const int tile = sh.tile[slot], kept_blocks = sh.count[slot];
      __syncwarp();
      if (lane == 0) arrive(&sh.tile_empty[slot]);
      if (tile >= tiles) break;
      const int head = tile / rows, row = rows - 1 - tile % rows;
      const int first = row * BLOCK + mine * 64 + thread % 128 / 32 * 16 + lane / 4;
      float scale_of[2], less[2], scale[2], fade[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int n = first + 8 * r;
        scale_of[r] = (n < N ? q_scale[(i64)head * N + n] : 1.0f) * softmax_scale;
        less[r] = __int_as_float(0x7F800000);
      }
#pragma unroll
      for (int i = 0; i < WIDE; i++) o[i] = 0.0f;
      const int q = tiles_seen & SLOTS - 1;
      wait(&sh.q_full[q], tiles_seen / SLOTS & 1);

      const int batch = head / H, h = head % H;
      auto sum_of = [&](int r) { return __shfl_sync(0xFFFFFFFF, o[D / 2 + 2 * r], lane & ~3); };  // of a row's weights
      auto token_of = [&](int n) {
#if TOKENS
        return n < N ? tokens[batch * token_b + h * token_h + n] : 0;
#else
        return n;
#endif
      };
      auto place_of = [&](int token) { return (((i64)batch * N + token) * H + h) * D; };
      auto answer = [&](int i, int d, float inverse) {  // of channels d and d + 1
        const float2 of = *(const float2 *)(v_scale + (i64)head * D + d);
        return make_float2(o[i] * inverse * of.x, o[i + 1] * inverse * of.y);
      };

#pragma unroll 1
      for (int part = 0; part <= REFRESH; part++) {
        const int count = part == 0 ? kept_blocks : P / BLOCK - kept_blocks;
#if SIZE == 64
        // By way of a shuffle the compiler knows it to be one in a warp, as descriptions are.
        const u32 q_first = __shfl_sync(0xFFFFFFFF, (u32)q_part, 0) + q * (Q_BYTES >> 4);
        const u32 k_first = (u32)described<D>(k_at), v_first = (u32)described<BLOCK>(v_at);
#pragma unroll 1
        for (int i = 0; i < count; i++) {
          const u32 at = visited + i, stage = at % STAGES;
          const u32 k_low = k_first + stage * (K_BYTES >> 4), v_low = v_first + stage * (V_BYTES >> 4);
          wait(&sh.full[stage], at / STAGES & 1);
          const int left = sh.keys[stage];
#pragma unroll
          for (int r = 0; r < 2; r++) scale[r] = scale_of[r] * sh.scale[stage];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            forget(s);
            fence();
#pragma unroll
            for (int k = 0; k < D / 32; k++)
              scores(s, described_by<D>(q_first + 2 * k), described_by<D>(k_low + half * (K_BYTES / 2 >> 4) + 2 * k),
                     k > 0);
            commit();
            wait_products<0>();
            hold(s);
            if (left < 64 * (half + 1)) hide(s, left - 64 * half, quad);
            int top[2];
            look(s, top);
            float high[2];
#pragma unroll
            for (int r = 0; r < 2; r++) high[r] = (float)top[r] * scale[r];
            if (__any_sync(0xFFFFFFFF, fmaxf(high[0] + less[0], high[1] + less[1]) > P_BITS + SLACK)) {
#pragma unroll
              for (int r = 0; r < 2; r++) {
                high[r] = largest_of_four(high[r]);
                if (half == 0) {
                  const float lower = fminf(less[r], P_BITS - high[r]);
                  fade[r] = exp2_of(lower - less[r]);
                  less[r] = lower;
                } else {  // the first half is in e4m3 already, and keeps its bits by whole steps: to 2**7.5 at most
                  const float step = fminf(0.0f, rintf(P_BITS - high[r] - less[r]));
                  fade[r] = exp2_of(step);
                  less[r] += step;
                  const u32 by = as_two_halves(fade[r]);
#pragma unroll
                  for (int c = r; c < 8; c += 2) p[c] = times(p[c], by);
                }
              }
#pragma unroll
              for (int at = 0; at < WIDE; at++) o[at] *= fade[at / 2 % 2];
            }
#pragma unroll
            for (int c = 0; c < 8; c++) {  // rows g and g + 8 of keys 0-15, then of keys 16-31, and of the next 32
              const int at = 8 * (c / 2) + 2 * (c % 2), r = c % 2;
              auto weight = [&](int at) {
                const float x = fmaf((float)s[at], scale[r], less[r]);
                if (half == 1 && at % POLYNOMIAL == 0)  // beside the first half's weights, the second's scores are
                  return exp2_by_polynomial(x);         // made in the registers that this takes
                return exp2_of(x);
              };
              p[8 * half + c] = four_e4m3(weight(at), weight(at + 1), weight(at + 4), weight(at + 5));
            }
          }
          if (left < BLOCK) drop(p, left, quad);
          hold(p);
          forget(t);
          fence();
#pragma unroll
          for (int k = 0; k < BLOCK / 32; k++) weighted(t, p + 4 * k, described_by<BLOCK>(v_low + 2 * k), k > 0);
          commit();
          wait_products<0>();
          hold(t);
          __syncwarp();
          if (lane == 0) arrive(&sh.empty[stage]);
#pragma unroll
          for (int at = 0; at < WIDE; at++) o[at] += t[at];
        }
        visited += count;
        if (part == REFRESH && lane == 0) arrive(&sh.q_empty[q]);

#else
        bool grown;
        auto ready = [&]() {  // the next block has come
          wait(&sh.full[visited & STAGES - 1], visited / STAGES & 1);
        };
        float k_of;
        int left;
        auto ask = [&]() {  // its scores
          const u64 k_part = described<D>(k_at + (visited & STAGES - 1) * K_BYTES);
          hold_words(s);
          fence();
#pragma unroll
          for (int k = 0; k < D / 32; k++) scores(s, q_part + 2 * k, k_part + 2 * k, k > 0);
          commit();
          k_of = sh.scale[visited & STAGES - 1];
          left = sh.keys[visited & STAGES - 1];
        };
        auto measure = [&]() {
          hold_words(s);
          if (left < BLOCK) hide(s, left, quad);
          int top[2];
          look(s, top);
          float high[2];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            scale[r] = scale_of[r] * k_of;
            high[r] = (float)top[r] * scale[r];
          }
          grown = __any_sync(0xFFFFFFFF, fmaxf(high[0] + less[0], high[1] + less[1]) > P_BITS + SLACK);
          if (grown) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
              const float lower = fminf(less[r], P_BITS - largest_of_four(high[r]));
              fade[r] = exp2_of(lower - less[r]);
              less[r] = lower;
            }
          }
        };
        auto weigh = [&](int i) {  // a quarter of the scores become weights, unrounded, in s
#pragma unroll
          for (int at = 16 * i; at < 16 * i + 16; at++)
            s[at] = __float_as_int(exp2_of(fmaf((float)s[at], scale[at / 2 % 2], less[at / 2 % 2])));
        };
        auto round = [&](int i) {
#pragma unroll
          for (int c = 0; c < 4; c++) {  // rows g and g + 8 of keys 0-15, then of keys 16-31
            const int at = 16 * i + 8 * (c / 2) + 2 * (c % 2);
            p[4 * i + c] = four_e4m3(__int_as_float(s[at]), __int_as_float(s[at + 1]), __int_as_float(s[at + 4]),
                                     __int_as_float(s[at + 5]));
          }
        };
        auto mask = [&]() {
          if (left < BLOCK) drop(p, left, quad);
          visited++;
        };
        auto gather = [&]() {  // t = weights of the last block times its values
          const u64 v_part = described<BLOCK>(v_at + (visited - 1 & STAGES - 1) * V_BYTES);
          hold_words(p);
          hold_words(t);
          fence();
#pragma unroll
          for (int k = 0; k < BLOCK / 32; k++) weighted(t, p + 4 * k, v_part + 2 * k, k > 0);
          commit();
        };
        auto gathered = [&]() {
          wait_products<0>();
          hold_words(t);
          __syncwarp();
          if (lane == 0) arrive(&sh.empty[visited - 1 & STAGES - 1]);
        };
        auto add = [&](int i) {  // a quarter
#pragma unroll
          for (int at = D / 8 * i; at < D / 8 * (i + 1); at++) o[at] += t[at];
          if (i == 3)
            for (int at = D / 2; at < WIDE; at++) o[at] += t[at];
        };
        int rest = count - 1;
        if (count > 0) {
          ready();
          ask();
          wait_products<0>();
          measure();
          if (REFRESH && grown) {  // what the kept blocks have left
#pragma unroll
            for (int at = 0; at < WIDE; at++) o[at] *= fade[at / 2 % 2];
          }
#pragma unroll
          for (int i = 0; i < 4; i++) weigh(i), round(i);
          mask();
          if (rest) ready();
#pragma unroll 1
          while (rest) {
            ask();
            gather();
            wait_products<1>();
            measure();
#pragma unroll
            for (int j = 0; j < EARLY; j++) weigh(j);
            hold_words(s);
            visited++;
            rest--;
            if (rest) ready();
            visited--;
            gathered();
            if (grown) {
#pragma unroll
              for (int at = 0; at < WIDE; at++) o[at] *= fade[at / 2 % 2], t[at] *= fade[at / 2 % 2];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
              if (j >= EARLY) weigh(j);
              add(j);
              round(j);
            }
            mask();
          }
          if (part == REFRESH && lane == 0) arrive(&sh.q_empty[q]);
          gather();
          gathered();
#pragma unroll
          for (int j = 0; j < 4; j++) add(j);
        } else if (part == REFRESH && lane == 0) {
          arrive(&sh.q_empty[q]);
        }

#endif
#if REFRESH
        if (part == 0) {
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const float sum = sum_of(r), inverse = count > 0 ? 1.0f / sum : 0.0f;
            int n = first + 8 * r, d = 2 * quad;  // held, or its places are worked out before the loop over the parts,
            asm volatile("" : "+r"(n), "+r"(d));  // and take registers of the loop over blocks
            const i64 at = place_of(token_of(n)) + d;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
              const float2 y = answer(4 * j + 2 * r, 8 * j + d, inverse);
              if (n < N) leave(second, out, at + 8 * j, y);
            }
          }
          __syncwarp();
        }
#endif
      }

      // the answer
      const int blocks = REFRESH ? P / BLOCK : kept_blocks;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float sum = sum_of(r), inverse = blocks > 0 ? 1.0f / sum : 0.0f;
        const int n = first + 8 * r;
        const bool inside = n < N;
        const int token = token_of(n);
        const i64 at = place_of(token);
#if LSE
        if (inside && quad == 0)  // weights are 2**less of exp2(score)
          ((float *)second)[(i64)head * N + token] =
              blocks > 0 ? (log2f(sum) - less[r]) * 0.69314718f : -__int_as_float(0x7F800000);
#endif
#if RESIDUAL == 1
        const float lost = inside ? residual_scale[(i64)head * N + token] : 0.0f;
#else
        const float lost = 1.0f;
#endif
#pragma unroll
        for (int m = 0; m < D / 32; m++) {  // 32 channels: each thread of four has two of every eight, and gets eight
          [[maybe_unused]] u32 w[4], gone[4];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int d = 8 * (4 * m + j) + 2 * quad;
            float2 y = answer(4 * (4 * m + j) + 2 * r, d, inverse);
#if REFRESH
            const float2 sparse = inside ? left_at(second, out, at + d) : y;
            float2 less_sparse = make_float2(y.x - sparse.x, y.y - sparse.y);
            if (kept_blocks == blocks) less_sparse = make_float2(0.0f, 0.0f);
#if OUT == 0
            if (inside) *(float2 *)((float *)second + at + d) = less_sparse;
#else
            gone[j] = two_halves(less_sparse.x, less_sparse.y);
#endif
#endif
            if (RESIDUAL && inside) {
              const float2 added = two_residuals(residual, at + d, lost);
              y.x += added.x;
              y.y += added.y;
            }
#if OUT == 0
            if (inside) *(float2 *)((float *)out + at + d) = y;
#else
            w[j] = two_halves(y.x, y.y);
#endif
          }
#if OUT != 0
          exchange(w, quad);
#if REFRESH
          exchange(gone, quad);
          __syncwarp();  // what waited where the four write now is read
#endif
          if (inside) *(uint4 *)((unsigned short *)out + at + 32 * m + 8 * quad) = make_uint4(w[0], w[1], w[2], w[3]);
#if REFRESH
          if (inside)
            *(uint4 *)((unsigned short *)second + at + 32 * m + 8 * quad) =
                make_uint4(gone[0], gone[1], gone[2], gone[3]);
#endif
#endif
        }
      }
    }
  }
}
