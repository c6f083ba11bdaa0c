// pack_heads for Hopper: programs that stay, each with every so-manieth piece of the work, in an order that all know.
//
// A piece is BT tokens of a head: of samples of k for its center, of v for its largest values, of v to be packed, of q
// or of k. While a thread works on one, the copy engine of its own processor brings what it has of the next: 16 bytes
// at a time, into places that no other thread reads, so that nobody waits for anybody.
//
// The order is head after head of v: its largest values, some of q and k meanwhile, and the same v again from its end
// on, as much of it as the second-level cache still holds. q and k come by tokens, all heads of a block together, since
// these share their angles. A piece waits only for pieces before it, and every program works through its own in order.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef long long i64;

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int OWN = 16;                     // channels that a thread has of a token: 8 of its first half, 8 of its second
constexpr int LANES = D / OWN;              // threads of a token
constexpr int AT_ONCE = THREADS / LANES;    // tokens
constexpr int STEPS = BT / AT_ONCE;
constexpr int PIECES = D / 8;               // of 16 bytes that a token has
constexpr int V_TASKS = BT / 16 * (D / 64);  // 16 tokens of 64 channels are a warp's
constexpr int V_ROUNDS = (V_TASKS + WARPS - 1) / WARPS;
constexpr int SLOTS = 2 * STEPS > 4 * V_ROUNDS ? 2 * STEPS : 4 * V_ROUNDS;
constexpr float TOP = 127.0f, FP8_TOP = 448.0f, WHOLE = 12582912.0f;  // 1.5 * 2**23: the lowest bits are the number
enum Kind { CENTER, MOST, VALUES, QUERIES, KEYS };

struct Work {
  int kind, head, block;
};

__device__ __forceinline__ u32 address_of(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes, or zeros.
__device__ __forceinline__ void bring(u32 to, const void *from, bool inside, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0), "l"(policy) : "memory");
}

__device__ __forceinline__ void wait_for_own() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ float larger(float a, float b) {  // a NaN is the largest
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
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
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(pair));
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

__device__ __forceinline__ u32 four_bytes(const float *x, float by) {
  u32 a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(fmaf(x[i], by, WHOLE));
  return __byte_perm(__byte_perm(a[0], a[1], 0x0040), __byte_perm(a[2], a[3], 0x0040), 0x5410);
}

__device__ __forceinline__ u32 four_e4m3(float a, float b, float c, float d) {
  u32 r;
  asm("{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; mov.b32 %0, {l, h};}"
      : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

__device__ __forceinline__ void wait_until(const int *counter, int many) {
  int seen;
  do asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen < many);
}

__device__ __forceinline__ float4 fresh(const float *at) {  // past the first-level cache, which knows no other processor
  return __ldcg((const float4 *)at);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) pack_heads_sm90(
    const char *q, const char *k, const char *v, const float *norm_q, const float *norm_k, const float *other_q,
    const float *other_k, const float *bias_q, const float *bias_k, const float *inverse_q, const float *inverse_k,
    const char *cos, const char *sin, const int *tokens, char *q_out, float *q_scale, char *k_out, float *k_scale,
    char *v_out, float *v_scale, float *q_means, float *k_means, float *q_alike, float *k_alike, float *parts,
    float *center, int *most, int *counters, int all_heads, int H, int N, int blocks, int first, int R, int stride,
    int samples, int meanwhile, float eps, float tiny, float nothing, i64 q_b, i64 q_h, i64 q_n, i64 k_b, i64 k_h,
    i64 k_n, i64 v_b, i64 v_h, i64 v_n, i64 tokens_b, i64 tokens_h) {
  extern __shared__ char memory[];
  uint4 *own = (uint4 *)memory + threadIdx.x;             // [SLOTS][THREADS]
  float *sums = (float *)(memory + SLOTS * THREADS * 16);  // [2][AT_ONCE][D]: of tokens, of their directions
  u32 *tile = (u32 *)sums;                                 // [D][32]: v, four tokens a word
  float *operands = sums + 2 * AT_ONCE * D;                // [4][D]: norm, other, bias, center; of v 1 / scale
  u32 *largest = (u32 *)(operands + 4 * D);                // [WARPS]

  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, c = lane % LANES;
  const int centers = (samples + BT - 1) / BT, total = all_heads * (centers + 4 * blocks);
  u64 once, again;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
#if KEEP == 2
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(again));
#else
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(again));
#endif

  auto work_at = [&](int i) -> Work {
    if (i < all_heads * centers) return {CENTER, i / centers, i % centers};
    i -= all_heads * centers;
    const int head = i / (4 * blocks);
    i -= head * 4 * blocks;
    if (i < blocks) return {MOST, head, i};
    i -= blocks;
    if (i >= meanwhile && i < meanwhile + blocks) return {VALUES, head, blocks - 1 - (i - meanwhile)};
    if (i >= meanwhile) i -= blocks;
    i += head * 2 * blocks;
    return {i % 2 ? KEYS : QUERIES, i / 2 % all_heads, i / 2 / all_heads};
  };
  auto token_at = [&](const Work &w, int place) -> int {
    if (w.kind == CENTER) return place * stride;
#if TOKENS
    if (w.kind != MOST && place < N) return tokens[w.head / H * tokens_b + w.head % H * tokens_h + place];
#endif
    return place;
  };
  auto row_of_step = [&](int s) { return s * AT_ONCE + tid / LANES; };

  auto fetch = [&](const Work &w) {
    const bool of_v = w.kind == MOST || w.kind == VALUES;
    const char *base = of_v ? v : w.kind == QUERIES ? q : k;
    const i64 its_b = of_v ? v_b : w.kind == QUERIES ? q_b : k_b, its_h = of_v ? v_h : w.kind == QUERIES ? q_h : k_h,
              its_n = of_v ? v_n : w.kind == QUERIES ? q_n : k_n;
    base += 2 * (w.head / H * its_b + w.head % H * its_h);
    const u32 to = address_of(own);
    auto one = [&](int slot, int row, int channel) {
      const int n = token_at(w, w.block * BT + row);
      const bool inside = n < N;
      bring(to + slot * THREADS * 16, base + (inside ? 2 * (n * its_n + channel) : 0), inside,
            w.kind == MOST ? again : once);
    };
    if (w.kind == VALUES) {
#pragma unroll
      for (int round = 0; round < V_ROUNDS; ++round) {
        const int task = warp + round * WARPS, t = lane / 8;
        if (V_TASKS % WARPS && task >= V_TASKS) break;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          one(4 * round + i, task / (D / 64) * 16 + 2 * t + i % 2 + i / 2 * 8, task % (D / 64) * 64 + lane % 8 * 8);
      }
    } else if (w.kind == MOST) {
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) one(i, i * (THREADS / PIECES) + tid / PIECES, tid % PIECES * 8);
    } else {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        one(2 * s, row_of_step(s), c * 8);
        one(2 * s + 1, row_of_step(s), D / 2 + c * 8);
      }
    }
  };

  Work next = {};
  if (blockIdx.x < total) fetch(next = work_at(blockIdx.x));
  for (int i = blockIdx.x; i < total; i += gridDim.x) {
    const Work w = next;
    const int held = min(N - w.block * BT, BT);
    const i64 blocks_before = (i64)w.head * blocks + w.block, P = (i64)blocks * BT;
    auto go_on = [&] {  // what this thread has of the piece lies in registers
      if (i + (int)gridDim.x < total) fetch(next = work_at(i + gridDim.x));
    };
    wait_for_own();

    if (w.kind == MOST) {
      uint4 most_own = {};
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
      ((uint4 *)sums)[tid] = most_own;
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
        asm volatile("bar.sync 1, %0;" ::"n"(D / 2) : "memory");
        if (tid == 0) atomicAdd(counters + all_heads + w.head, 1);
      }
      continue;
    }

    if (w.kind == VALUES) {
      uint4 raw[4 * V_ROUNDS];
#pragma unroll
      for (int s = 0; s < 4 * V_ROUNDS; ++s) raw[s] = own[s * THREADS];
      go_on();
      if (tid < D) {
        wait_until(counters + all_heads + w.head, blocks);
        const float scale = fmaxf(__int_as_float(__ldcg(most + w.head * D + tid)), tiny) / FP8_TOP;
        operands[tid] = 1.0f / scale;
        if (w.block == 0) v_scale[w.head * D + tid] = scale;
      }
      __syncthreads();
#pragma unroll
      for (int round = 0; round < V_ROUNDS; ++round) {
        const int task = warp + round * WARPS, t = lane / 8, word = task / (D / 64) * 4 + t;
        if (V_TASKS % WARPS && task >= V_TASKS) break;
        const int channel = task % (D / 64) * 64 + lane % 8 * 8;
        float x[4][8];
#pragma unroll
        for (int n = 0; n < 4; ++n) floats(raw[4 * round + n], x[n]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float by = operands[channel + j];
          tile[(channel + j) * 32 + (word ^ 4 * (lane % 8))] =
              four_e4m3(x[0][j] * by, x[1][j] * by, x[2][j] * by, x[3][j] * by);
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < D * BT / 16 / THREADS; ++j) {
        const int at = j * THREADS + tid, channel = at / (BT / 16), part = at % (BT / 16);
        const uint4 bytes = *(const uint4 *)(tile + channel * 32 + 4 * (part ^ channel / 8 % 8));
        __stcs((uint4 *)(v_out + ((i64)w.head * D + channel) * P + w.block * BT + part * 16), bytes);
      }
      continue;
    }

    float x[STEPS][OWN];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      floats(own[2 * s * THREADS], x[s]);
      floats(own[(2 * s + 1) * THREADS], x[s] + 8);
    }
    go_on();
    const bool queries = w.kind == QUERIES;
    if (tid < D) {
#if NORM
      operands[tid] = (queries ? norm_q : norm_k)[(NORM == 2 ? w.head % H * D : 0) + tid];
#endif
#if OTHER
      operands[D + tid] = (queries ? other_q : other_k)[tid];
#endif
#if NORM == 3
      operands[2 * D + tid] = (queries ? bias_q : bias_k)[tid];
#endif
      if (w.kind == KEYS) {
        wait_until(counters + w.head, centers + 1);
        operands[3 * D + tid] = __ldcg(center + w.head * D + tid);
      }
    }
    __syncthreads();

#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int n = token_at(w, w.block * BT + row_of_step(s));
      const bool turns = ROPE && n >= first && n < first + R;
#if NORM == 1 || NORM == 3
      float shift = 0.0f, square = 0.0f;
#if NORM == 3
#pragma unroll
      for (int j = 0; j < OWN; ++j) shift += x[s][j];
      shift = of_token(shift) / D;
#endif
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        x[s][j] -= shift;
        square = fmaf(x[s][j], x[s][j], square);
      }
      const float by = inverse_root(of_token(square) / D + eps);
#elif NORM == 2
      const float by = n < N ? (queries ? inverse_q : inverse_k)[w.head / H * N + n] : 0.0f;
#endif
#if NORM
      const float *weights = operands + (OTHER && !turns ? D : 0) + c * 8;
#pragma unroll
      for (int j = 0; j < OWN; ++j) x[s][j] *= by * weights[j % 8 + j / 8 * (D / 2)];
#endif
#if NORM == 3
#pragma unroll
      for (int j = 0; j < OWN; ++j)
        x[s][j] = n < N ? x[s][j] + operands[2 * D + c * 8 + j % 8 + j / 8 * (D / 2)] : 0.0f;
#endif
#if ROPE
      if (turns) {
        const int at = (n - first) * (D / 2) + c * 4;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float co[4], si[4];
#if ROPE == 1
          const uint2 a = ((const uint2 *)cos)[at / 4 + part * (D / 16)], b = ((const uint2 *)sin)[at / 4 + part * (D / 16)];
          half_floats(a.x, co[0], co[1]);
          half_floats(a.y, co[2], co[3]);
          half_floats(b.x, si[0], si[1]);
          half_floats(b.y, si[2], si[3]);
#else
          *(float4 *)co = ((const float4 *)cos)[at / 4 + part * (D / 16)];
          *(float4 *)si = ((const float4 *)sin)[at / 4 + part * (D / 16)];
#endif
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float &even = x[s][part * 8 + 2 * j], &odd = x[s][part * 8 + 2 * j + 1];
            const float was = even;
            even = even * co[j] - odd * si[j];
            odd = odd * co[j] + was * si[j];
          }
        }
      }
#endif
    }

    float *mine = sums + tid / LANES * D + c * 8;
    float added[OWN];
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      added[j] = x[0][j];
#pragma unroll
      for (int s = 1; s < STEPS; ++s) added[j] += x[s][j];
    }
#pragma unroll
    for (int j = 0; j < OWN; j += 4) *(float4 *)(mine + j % 8 + j / 8 * (D / 2)) = *(float4 *)(added + j);

    if (w.kind == CENTER) {
      __syncthreads();
      if (tid < D) {
        float sum = 0.0f;
        for (int row = 0; row < AT_ONCE; ++row) sum += sums[row * D + tid];
        parts[(w.head * centers + w.block) * D + tid] = sum;
        __threadfence();
        asm volatile("bar.sync 1, %0;" ::"n"(D) : "memory");
        if (tid == 0) largest[0] = atomicAdd(counters + w.head, 1);
        asm volatile("bar.sync 1, %0;" ::"n"(D) : "memory");
        if (largest[0] == centers - 1) {  // the last of the head
          __threadfence();
          float all = 0.0f;
          for (int part = 0; part < centers; ++part) all += __ldcg(parts + (w.head * centers + part) * D + tid);
          center[w.head * D + tid] = all / samples;
          __threadfence();
          asm volatile("bar.sync 1, %0;" ::"n"(D) : "memory");
          if (tid == 0) atomicAdd(counters + w.head, 1);
        }
      }
      __syncthreads();
      continue;
    }

    float most_own = 0.0f;
    float toward[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int row = row_of_step(s);
      if (!queries) {
#pragma unroll
        for (int j = 0; j < OWN; ++j)
          x[s][j] = row < held ? x[s][j] - operands[3 * D + c * 8 + j % 8 + j / 8 * (D / 2)] : 0.0f;
      }
      float square = 0.0f, most_here = 0.0f;
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
        square = fmaf(x[s][j], x[s][j], square);
        most_here = larger(most_here, fabsf(x[s][j]));
      }
      toward[s] = inverse_root(fmaxf(of_token(square), nothing));
      most_own = larger(most_own, most_here);
      if (queries) {
#pragma unroll
        for (int l = 1; l < LANES; l *= 2) most_here = larger(most_here, __shfl_xor_sync(~0u, most_here, l));
        const float scale = larger(most_here, tiny) / TOP, by = 1.0f / scale;
        if (row < held) {
          const i64 at = (i64)w.head * N + w.block * BT + row;
          if (c == 0) q_scale[at] = scale;
          __stcs((uint2 *)(q_out + at * D + c * 8), make_uint2(four_bytes(x[s], by), four_bytes(x[s] + 4, by)));
          __stcs((uint2 *)(q_out + at * D + D / 2 + c * 8), make_uint2(four_bytes(x[s] + 8, by), four_bytes(x[s] + 12, by)));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      added[j] = x[0][j] * toward[0];
#pragma unroll
      for (int s = 1; s < STEPS; ++s) added[j] = fmaf(x[s][j], toward[s], added[j]);
    }
#pragma unroll
    for (int j = 0; j < OWN; j += 4)
      *(float4 *)(mine + AT_ONCE * D + j % 8 + j / 8 * (D / 2)) = *(float4 *)(added + j);
    if (!queries) {
      u32 bits;
      asm("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(bits) : "r"(__float_as_uint(most_own)));
      if (lane == 0) largest[warp] = bits;
    }
    __syncthreads();

    if (tid < D) {
      float sum = 0.0f;
#pragma unroll 8
      for (int row = 0; row < AT_ONCE; ++row) sum += sums[row * D + tid];
      (queries ? q_means : k_means)[blocks_before * D + tid] = sum / held;
    }
    if (warp == WARPS - 1) {
      float sum[D / 32] = {}, square = 0.0f;
#pragma unroll 8
      for (int row = 0; row < AT_ONCE; ++row)
#pragma unroll
        for (int j = 0; j < D / 32; ++j) sum[j] += sums[(AT_ONCE + row) * D + j * 32 + lane];
#pragma unroll
      for (int j = 0; j < D / 32; ++j) square = fmaf(sum[j] / held, sum[j] / held, square);
#pragma unroll
      for (int l = 1; l < 32; l *= 2) square += __shfl_xor_sync(~0u, square, l);
      if (lane == 0) (queries ? q_alike : k_alike)[blocks_before] = square;
    }
    if (!queries) {
      u32 bits = 0;
#pragma unroll
      for (int j = 0; j < WARPS; ++j) bits = max(bits, largest[j]);
      const float scale = larger(__uint_as_float(bits), tiny) / TOP, by = 1.0f / scale;
      if (tid == 0) k_scale[blocks_before] = scale;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        char *to = k_out + (w.head * P + w.block * BT + row_of_step(s)) * D + c * 8;
        __stcs((uint2 *)to, make_uint2(four_bytes(x[s], by), four_bytes(x[s] + 4, by)));
        __stcs((uint2 *)(to + D / 2), make_uint2(four_bytes(x[s] + 8, by), four_bytes(x[s] + 12, by)));
      }
    }
  }
}
