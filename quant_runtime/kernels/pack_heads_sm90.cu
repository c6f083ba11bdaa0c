// pack_heads for Hopper: programs that stay, each with every so-manieth piece of the work, in an order that all know.
//
// A piece is BT tokens of a head: of samples of k for its center, of v for its largest values, of v to be packed, of q
// or of k. While a thread works on one, the copy engine of its own processor brings what it has of the next: 16 bytes
// at a time, into places that no other thread reads, so that nobody waits for anybody.
//
// The order is head after head of v: its largest values, some of q and k meanwhile, and the same v again from its end
// on, as much of it as the second-level cache still holds. q and k come by tokens, all heads of a block together, since
// these share their angles. A piece waits only for pieces before it, and every program works through its own in order.

#include "sm90.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int OWN = 16;                      // channels that a thread has of a token: 8 of either half
constexpr int LANES = D / OWN;               // threads of a token
constexpr int AT_ONCE = THREADS / LANES;     // tokens
constexpr int STEPS = BT / AT_ONCE;
constexpr int SUMS = AT_ONCE / 2;            // of two threads each, which have half of its channels apiece
constexpr int PIECES = D / 8;                // of 16 bytes that a token has
constexpr int V_TASKS = BT / 16 * (D / 64);  // 16 tokens of 64 channels are a warp's
constexpr int V_ROUNDS = (V_TASKS + WARPS - 1) / WARPS;
constexpr int SLOTS = 2 * STEPS > 4 * V_ROUNDS ? 2 * STEPS : 4 * V_ROUNDS;
constexpr int ANGLES = ROPE == 1 ? 4 * STEPS : 0;  // of 8 bytes that a thread has: in float32 they stay where they are
constexpr float TOP = 127.0f, FP8_TOP = 448.0f;
enum Kind { CENTER, MOST, VALUES, QUERIES, KEYS };

struct Work {
  int kind, head, block;
};

// 16 bytes, or zeros: then nothing is read, whatever `from` is.
__device__ __forceinline__ void bring(u32 to, const void *from, bool inside, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0), "l"(policy) : "memory");
}

__device__ __forceinline__ void bring_8(u32 to, const void *from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(inside ? 8 : 0) : "memory");
}

__device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {  // passes over NaN
  u32 r;
#if HALF
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#endif
  return r;
}

__device__ __forceinline__ void half_floats(u32 pair, float &low, float &high) {
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high) : "r"(pair));
}

__device__ __forceinline__ void floats(u32 pair, float &low, float &high) {
#if HALF
  half_floats(pair, low, high);
#else
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xFFFF0000u);
#endif
}

__device__ __forceinline__ void floats(uint4 piece, float *to) {
  floats(piece.x, to[0], to[1]);
  floats(piece.y, to[2], to[3]);
  floats(piece.z, to[4], to[5]);
  floats(piece.w, to[6], to[7]);
}

__device__ __forceinline__ float inverse_root(float x) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float of_token(float x) {  // the sum over a token's threads
#pragma unroll
  for (int lane = 1; lane < LANES; lane *= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

__device__ __forceinline__ void wait_until(const int *counter, int many) {
  int seen;
  do asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen < many);
}

// m / 127, rounded once, of an m that is not infinite.
__device__ __forceinline__ float in_steps(float m) {
  const float near = m * (1.0f / TOP);
  return fmaf(fmaf(-near, TOP, m), 1.0f / TOP, near);
}

__device__ __forceinline__ float inverse(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// n / d, where reciprocal is 2**32 / d, rounded up, and n * d is below 2**32.
__device__ __forceinline__ int divided(int n, i64 reciprocal) { return (int)((u64)n * (u64)reciprocal >> 32); }

// Channels of a token lie in shared memory such that what its threads read together lies together: the first four of
// each thread, the next four, and the same of the second half.
__device__ __forceinline__ int channel_of(int place) {
  const int quarter = place / (D / 4), c = place % (D / 4) / 4;
  return quarter / 2 * (D / 2) + c * 8 + quarter % 2 * 4 + place % 4;
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) pack_heads_sm90(
    const char *q, const char *k, const char *v, const float *norm_q, const float *norm_k, const float *other_q,
    const float *other_k, const float *bias_q, const float *bias_k, const float *inverse_q, const float *inverse_k,
    const char *cos, const char *sin, const int *tokens, char *q_out, float *q_scale, char *k_out, float *k_scale,
    char *v_out, float *v_scale, float *q_means, float *k_means, float *q_alike, float *k_alike, float *parts,
    float *center, int *most, int *counters, int all_heads, int H, int N, int blocks, int first, int R, int stride,
    int samples, int meanwhile, float eps, float tiny, float nothing, i64 by_all_heads, i64 by_heads, i64 q_b, i64 q_h,
    i64 q_n, i64 k_b, i64 k_h, i64 k_n, i64 v_b, i64 v_h, i64 v_n, i64 tokens_b, i64 tokens_h) {
  extern __shared__ char memory[];
  uint4 *own = (uint4 *)memory + threadIdx.x;             // [SLOTS][THREADS]
  uint2 *angles = (uint2 *)(memory + SLOTS * THREADS * 16) + threadIdx.x;  // [STEPS][halves][cos, sin][THREADS]
  float *sums = (float *)(memory + SLOTS * THREADS * 16 + ANGLES * THREADS * 8);  // [2][SUMS][D]: tokens, directions
  u32 *tile = (u32 *)sums;                                                        // [D][32]: v, four tokens a word
  float *weights = sums + 2 * SUMS * D;                     // [q, k][norm, other, bias][D]
  float *middle = weights + 6 * D;                         // [D]: a head's center
  float *inverses = middle + D;                            // [D]: one over the scales of a head's values
  u32 *largest = (u32 *)(inverses + D);                    // [WARPS]
  float *together = (float *)(largest + WARPS);            // [D / 32]
  int *centered = counters, *most_of = counters + all_heads, *all_centered = most_of + all_heads;

  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, c = lane % LANES;
  const int centers = (samples + BT - 1) / BT;

  int phase = 0, place = (int)blockIdx.x - all_heads * centers;  // of the next piece: in which head of v, and where
  auto step_on = [&] {
    while (place >= 3 * blocks) place -= 3 * blocks, ++phase;
  };
  auto work_there = [&]() -> Work {
    if (place < 0) {
      const int i = place + all_heads * centers;
      return {CENTER, i / centers, i % centers};
    }
    int i = place;
    if (i < blocks) return {MOST, phase, i};
    i -= blocks;
    if (i >= meanwhile && i < meanwhile + blocks) return {VALUES, phase, blocks - 1 - (i - meanwhile)};
    if (i >= meanwhile) i -= blocks;
    i += phase * blocks;
    const int block = divided(i, by_all_heads);
    return {QUERIES, i - block * all_heads, block};
  };
  auto token_at = [&](const Work &w, int at) -> int {
    if (w.kind == CENTER) return at * stride;
#if TOKENS
    if (w.kind != MOST && at < N) {
      const int b = divided(w.head, by_heads);
      return tokens[b * tokens_b + (w.head - b * H) * tokens_h + at];
    }
#endif
    return at;
  };
  auto row_of_step = [&](int s) { return s * AT_ONCE + tid / LANES; };

  auto rotates = [&](int n) { return ROPE && n >= first && n < first + R; };
  int next_n[STEPS];  // of the next piece, if it is one of q or k, the tokens that this thread has some of
  auto fetch = [&](const Work &w) {
    const bool of_v = w.kind == MOST || w.kind == VALUES;
    const char *base = of_v ? v : w.kind == QUERIES ? q : k;
    const i64 its_b = of_v ? v_b : w.kind == QUERIES ? q_b : k_b, its_h = of_v ? v_h : w.kind == QUERIES ? q_h : k_h,
              its_n = of_v ? v_n : w.kind == QUERIES ? q_n : k_n;
    const int b = divided(w.head, by_heads);
    base += 2 * (b * its_b + (w.head - b * H) * its_h);
    u64 policy;  // what will not be read again soon makes way first
    if (w.kind == MOST)
      asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    else
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const u32 to = address_of(own);
    const i64 unit = 2 * its_n * (w.kind == CENTER ? stride : 1);
    const int before = w.block * BT, left = (w.kind == CENTER ? samples : N) - before;
    auto one = [&](int slot, int row, int further, int channel, int n) {  // of token row + further of the block, n
      const char *from = base + (before + row) * unit + 2 * channel + further * unit;
#if TOKENS
      from = base + 2 * (n * its_n + channel);
#endif
      bring(to + slot * THREADS * 16, from, row + further < left, policy);
    };
    if (w.kind == VALUES) {
      const int row = warp / (D / 64) * 16 + lane / 8 * 2;
      auto further = [](int i) { return i / 4 * WARPS / (D / 64) * 16 + i % 2 + i % 4 / 2 * 8; };
      int n[4 * V_ROUNDS];
#pragma unroll
      for (int i = 0; i < 4 * V_ROUNDS; ++i) n[i] = token_at(w, before + row + further(i));
      if (!(V_TASKS % WARPS) || warp < V_TASKS) {
#pragma unroll
        for (int i = 0; i < 4 * V_ROUNDS; ++i) one(i, row, further(i), warp % (D / 64) * 64 + lane % 8 * 8, n[i]);
      }
    } else if (w.kind == MOST) {
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) {
        const int row = tid / PIECES, further = i * (THREADS / PIECES);
        one(i, row, further, tid % PIECES * 8, before + row + further);
      }
    } else {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) next_n[s] = token_at(w, before + row_of_step(s));
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        one(2 * s, row_of_step(0), s * AT_ONCE, c * 8, next_n[s]);
        one(2 * s + 1, row_of_step(0), s * AT_ONCE, D / 2 + c * 8, next_n[s]);
      }
    }
  };

  auto fetch_angles = [&](const Work &w) {  // keys have those of their queries
#if ROPE == 1
    if (w.kind == QUERIES || w.kind == CENTER) {
#pragma unroll
      for (int i = 0; i < 4 * STEPS; ++i) {
        const int n = TOKENS ? next_n[i / 4] : token_at(w, w.block * BT + row_of_step(i / 4));
        const int at = (n - first) * (D / 8) + c + i / 2 % 2 * (D / 16);
        bring_8(address_of(angles) + i * THREADS * 8, (const uint2 *)(i % 2 ? sin : cos) + at, rotates(n));
      }
    }
#endif
  };

#if NORM && NORM != 2
  if (tid < D) {
    for (int of_k = 0; of_k < 2; ++of_k) {
      weights[of_k * 3 * D + tid] = (of_k ? norm_k : norm_q)[channel_of(tid)];
#if OTHER
      weights[(of_k * 3 + 1) * D + tid] = (of_k ? other_k : other_q)[channel_of(tid)];
#endif
#if NORM == 3
      weights[(of_k * 3 + 2) * D + tid] = (of_k ? bias_k : bias_q)[channel_of(tid)];
#endif
    }
  }
#endif
  bool centers_known = false;
  float ahead = 0.0f;   // what the next keys' center will have in this thread's place, if all are known
  int run = 0;          // pieces of a head of v, one behind the other, whose largest values are not yet told
  int most_known = -1;  // the last head of v whose largest values are known to be complete
  step_on();
  Work next = {};
  if (phase < all_heads) {
    fetch(next = work_there());
    fetch_angles(next);
  }
  while (phase < all_heads) {
    const Work w = next;
    auto go_on = [&] {  // what this thread has of the piece lies in registers
      if (w.kind == QUERIES) {
        fetch(next = {KEYS, w.head, w.block});
        if (centers_known && tid < D) ahead = __ldcg(center + w.head * D + channel_of(tid));
        return;
      }
      place += gridDim.x;
      step_on();
      if (phase >= all_heads) return;
      fetch(next = work_there());
      if (w.kind == MOST || w.kind == VALUES) fetch_angles(next);
    };
    wait_for_own();

    if (w.kind == MOST) {
      uint4 *mine = (uint4 *)sums + tid, most_own = run ? *mine : uint4();
#pragma unroll
      for (int s = 0; s < 2 * STEPS; ++s) {
        const uint4 piece = own[s * THREADS];
        most_own.x = larger_pair(most_own.x, piece.x & 0x7FFF7FFF);
        most_own.y = larger_pair(most_own.y, piece.y & 0x7FFF7FFF);
        most_own.z = larger_pair(most_own.z, piece.z & 0x7FFF7FFF);
        most_own.w = larger_pair(most_own.w, piece.w & 0x7FFF7FFF);
      }
      go_on();
      __syncthreads();  // all are done with the sums of the piece before
      *mine = most_own;
      ++run;
      if (phase < all_heads && next.kind == MOST && next.head == w.head) continue;
      __syncthreads();
      if (tid < D / 2) {
        u32 pair = 0;
#pragma unroll
        for (int row = 0; row < THREADS / PIECES; ++row) pair = larger_pair(pair, ((u32 *)sums)[row * (D / 2) + tid]);
        float low, high;
        floats(pair, low, high);
        atomicMax(most + w.head * D + 2 * tid, __float_as_int(low));
        atomicMax(most + w.head * D + 2 * tid + 1, __float_as_int(high));
        __threadfence();
      }
      __syncthreads();
      if (tid == 0) __threadfence(), atomicAdd(most_of + w.head, run);
      run = 0;
      continue;
    }

    if (w.kind == VALUES) {
      uint4 raw[4 * V_ROUNDS];
#pragma unroll
      for (int s = 0; s < 4 * V_ROUNDS; ++s) raw[s] = own[s * THREADS];
      go_on();
      if (most_known != w.head && tid < D) {
        wait_until(most_of + w.head, blocks);
        const float scale = fmaxf(__int_as_float(__ldcg(most + w.head * D + tid)), tiny) / FP8_TOP;
        inverses[tid] = 1.0f / scale;
        v_scale[w.head * D + tid] = scale;  // every program tells the same
      }
      most_known = w.head;
      __syncthreads();
#pragma unroll
      for (int round = 0; round < V_ROUNDS; ++round) {
        const int task = warp + round * WARPS, t = lane / 8, word = task / (D / 64) * 4 + t;
        if (V_TASKS % WARPS && task >= V_TASKS) break;
        const int channel = task % (D / 64) * 64 + lane % 8 * 8;
        float x[4][8], by[8];
        *(float4 *)by = *(const float4 *)(inverses + channel);
        *(float4 *)(by + 4) = *(const float4 *)(inverses + channel + 4);
#pragma unroll
        for (int n = 0; n < 4; ++n) floats(raw[4 * round + n], x[n]);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          tile[(channel + j) * 32 + (word ^ 4 * (lane % 8))] =
              four_e4m3(x[0][j] * by[j], x[1][j] * by[j], x[2][j] * by[j], x[3][j] * by[j]);
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < D * BT / 16 / THREADS; ++j) {
        const int at = j * THREADS + tid, channel = at / (BT / 16), part = at % (BT / 16);
        const uint4 bytes = *(const uint4 *)(tile + channel * 32 + 4 * (part ^ channel / 8 % 8));
        __stcs((uint4 *)(v_out + ((i64)w.head * D + channel) * ((i64)blocks * BT) + w.block * BT + part * 16), bytes);
      }
      continue;
    }

    const bool queries = w.kind == QUERIES;
    uint4 raw[2 * STEPS];
#pragma unroll
    for (int s = 0; s < 2 * STEPS; ++s) raw[s] = own[s * THREADS];
    int n[STEPS];
    bool turns[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      n[s] = TOKENS ? next_n[s] : token_at(w, w.block * BT + row_of_step(s));
      turns[s] = rotates(n[s]);
    }
    go_on();
    if (tid < D) {
#if NORM == 2
      const int b = divided(w.head, by_heads);
      weights[(queries ? 0 : 3 * D) + tid] =
          __ldg((queries ? norm_q : norm_k) + (w.head - b * H) * D + channel_of(tid));
#endif
      if (w.kind == KEYS) {
        if (!centers_known) {
          wait_until(all_centered, all_heads);
          ahead = __ldcg(center + w.head * D + channel_of(tid));
        }
        middle[tid] = ahead;
      }
    }
    centers_known |= w.kind == KEYS;
    __syncthreads();

    float x[STEPS][OWN], by[STEPS];  // a token is by * x
    auto shared_of_own = [&](const float *from, float *to) {
#pragma unroll
      for (int j = 0; j < OWN; j += 4) *(float4 *)(to + j) = *(const float4 *)(from + j * (D / 16) + c * 4);
    };
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      floats(raw[2 * s], x[s]);
      floats(raw[2 * s + 1], x[s] + 8);
      by[s] = 1.0f;
#if NORM == 3
      float shift = 0.0f;
#pragma unroll
      for (int j = 0; j < OWN; ++j) shift += x[s][j];
      shift = of_token(shift) / D;
#pragma unroll
      for (int j = 0; j < OWN; ++j) x[s][j] -= shift;
#endif
#if NORM == 1 || NORM == 3
      float square = 0.0f;
#pragma unroll
      for (int j = 0; j < OWN; ++j) square = fmaf(x[s][j], x[s][j], square);
      by[s] = inverse_root(of_token(square) / D + eps);
#elif NORM == 2
      by[s] = n[s] < N ? __ldg((queries ? inverse_q : inverse_k) + divided(w.head, by_heads) * N + n[s]) : 0.0f;
#endif
#if NORM
      float weight[OWN];
      shared_of_own(weights + (queries ? 0 : 3 * D) + (OTHER && !turns[s] ? D : 0), weight);
#endif
#if NORM == 3
      float bias[OWN];
      shared_of_own(weights + (queries ? 2 : 5) * D, bias);
#pragma unroll
      for (int j = 0; j < OWN; ++j) x[s][j] = n[s] < N ? fmaf(x[s][j], by[s] * weight[j], bias[j]) : 0.0f;
      by[s] = 1.0f;
#elif NORM
#pragma unroll
      for (int j = 0; j < OWN; ++j) x[s][j] *= weight[j];
#endif
#if ROPE
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float co[4] = {1.0f, 1.0f, 1.0f, 1.0f}, si[4] = {};
#if ROPE == 1
        uint2 both = angles[(4 * s + 2 * half) * THREADS];
        if (!turns[s]) both = make_uint2(0x3C003C00, 0x3C003C00);  // ones; sines are zero there
        half_floats(both.x, co[0], co[1]);
        half_floats(both.y, co[2], co[3]);
        both = angles[(4 * s + 2 * half + 1) * THREADS];
        half_floats(both.x, si[0], si[1]);
        half_floats(both.y, si[2], si[3]);
#else
        if (turns[s]) {
          const int at = (n[s] - first) * (D / 8) + c + half * (D / 16);
          *(float4 *)co = __ldg((const float4 *)cos + at);
          *(float4 *)si = __ldg((const float4 *)sin + at);
        }
#endif
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float &even = x[s][half * 8 + 2 * j], &odd = x[s][half * 8 + 2 * j + 1];
          const float was = even;
          even = even * co[j] - odd * si[j];
          odd = odd * co[j] + was * si[j];
        }
      }
#endif
    }

    if (!queries && phase < all_heads) fetch_angles(next);

    // The sums over this thread's tokens, each times its factor.
    auto add_up = [&](int which, const float (&factor)[STEPS]) {
      float added[OWN];
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        added[j] = x[0][j] * factor[0];
#pragma unroll
        for (int s = 1; s < STEPS; ++s) added[j] = fmaf(x[s][j], factor[s], added[j]);
      }
      const bool upper = lane & 16;  // takes its second half of channels, of both threads, the other the first
      float *to = sums + (which * SUMS + warp * (16 / LANES) + lane % 16 / LANES) * D + (upper ? D / 2 : 0) + c * 4;
#pragma unroll
      for (int j = 0; j < OWN / 2; ++j) {
        const float kept = upper ? added[j + OWN / 2] : added[j], given = upper ? added[j] : added[j + OWN / 2];
        added[j] = kept + __shfl_xor_sync(~0u, given, 16);
      }
#pragma unroll
      for (int j = 0; j < OWN / 2; j += 4) *(float4 *)(to + j * (D / 16)) = *(float4 *)(added + j);
    };
    add_up(0, by);

    if (w.kind == CENTER) {
      __syncthreads();
      if (tid < D) {
        float sum = 0.0f;
        for (int row = 0; row < SUMS; ++row) sum += sums[row * D + tid];
        parts[(w.head * centers + w.block) * D + channel_of(tid)] = sum;
        __threadfence();
      }
      __syncthreads();
      if (tid == 0) __threadfence(), largest[0] = atomicAdd(centered + w.head, 1);
      __syncthreads();
      const bool last = largest[0] == centers - 1;  // of the head
      if (last && tid < D) {
        __threadfence();
        float all = 0.0f;
        for (int part = 0; part < centers; ++part) all += __ldcg(parts + (w.head * centers + part) * D + tid);
        center[w.head * D + tid] = all / samples;
        __threadfence();
      }
      __syncthreads();
      if (last && tid == 0) __threadfence(), atomicAdd(all_centered, 1);
      continue;
    }

    const int held = min(N - w.block * BT, BT);
    float square[STEPS], most_own[STEPS];
    auto measure = [&] {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        square[s] = most_own[s] = 0.0f;
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          square[s] = fmaf(x[s][j], x[s][j], square[s]);
          most_own[s] = larger(most_own[s], fabsf(x[s][j]));
        }
        square[s] = of_token(square[s]);
      }
    };
    auto write = [&](char *to, int s, float times) {  // a token's bytes
      to += c * 8;
      __stcs((uint2 *)to, make_uint2(four_bytes(x[s], times), four_bytes(x[s] + 4, times)));
      __stcs((uint2 *)(to + D / 2), make_uint2(four_bytes(x[s] + 8, times), four_bytes(x[s] + 12, times)));
    };
    if (queries) {
      measure();
      float toward[STEPS];
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        toward[s] = by[s] * inverse_root(fmaxf(by[s] * by[s] * square[s], nothing));
#pragma unroll
        for (int l = 1; l < LANES; l *= 2) most_own[s] = larger(most_own[s], __shfl_xor_sync(~0u, most_own[s], l));
      }
      add_up(1, toward);
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const float scale = in_steps(larger(most_own[s] * by[s], tiny));
        const int row = row_of_step(s);
        if (row < held) {
          const i64 at = (i64)w.head * N + w.block * BT + row;
          if (c == 0) q_scale[at] = scale;
          write(q_out + at * D, s, by[s] * inverse(scale));
        }
      }
    } else {
      float its_center[OWN];
      shared_of_own(middle, its_center);
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int j = 0; j < OWN; ++j) x[s][j] = fmaf(x[s][j], by[s], -its_center[j]);
      if (held < BT) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
          for (int j = 0; j < OWN; ++j) x[s][j] = row_of_step(s) < held ? x[s][j] : 0.0f;
      }
      measure();
      float toward[STEPS], most_here = 0.0f;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        toward[s] = inverse_root(fmaxf(square[s], nothing));
        most_here = larger(most_here, most_own[s]);
      }
      add_up(1, toward);
      u32 bits;
      asm("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(bits) : "r"(__float_as_uint(most_here)));
      if (lane == 0) largest[warp] = bits;
    }
    __syncthreads();

    const i64 blocks_before = (i64)w.head * blocks + w.block, P = (i64)blocks * BT;
    if (!queries) {
      u32 bits = 0;
#pragma unroll
      for (int j = 0; j < WARPS; ++j) bits = max(bits, largest[j]);
      const float scale = in_steps(larger(__uint_as_float(bits), tiny)), times = inverse(scale);
      if (tid == 0) k_scale[blocks_before] = scale;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) write(k_out + (w.head * P + w.block * BT + row_of_step(s)) * D, s, times);
    }
    if (tid < D) {
      float sum = 0.0f;
#pragma unroll 8
      for (int row = 0; row < SUMS; ++row) sum += sums[row * D + tid];
      (queries ? q_means : k_means)[blocks_before * D + channel_of(tid)] = sum / held;
    } else if (tid < 2 * D) {
      float sum = 0.0f;
#pragma unroll 8
      for (int row = 0; row < SUMS; ++row) sum += sums[(SUMS - 1 + row) * D + tid];
      sum /= held;
      sum *= sum;
#pragma unroll
      for (int l = 1; l < 32; l *= 2) sum += __shfl_xor_sync(~0u, sum, l);
      if (lane == 0) together[warp - D / 32] = sum;
      asm volatile("bar.sync 1, %0;" ::"n"(D) : "memory");
      if (tid == D) {
        float all = together[0];
#pragma unroll
        for (int j = 1; j < D / 32; ++j) all += together[j];
        (queries ? q_alike : k_alike)[blocks_before] = all;
      }
    }
  }
}
