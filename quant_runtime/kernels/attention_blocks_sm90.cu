// attention_blocks for Hopper, in sm_90a: 128 queries of a head at a time, over the blocks of 128 keys that they keep,
// in bfloat16 or float16 throughout, sums in float32.
//
// One group of warps (a single thread of it) takes tiles from a counter and has the copy engine bring Q, K and V; two
// groups have 64 queries each. While a block's weights are multiplied by its values, the next block's scores are made
// and weighted: what is waited for is asked for one block ahead.
//
//   s   the scores of a block, and then its weights, float32        p   those in 16 bits; of two blocks, by turns
//   o   weights times values, of all blocks so far                  sum   of the weights that a thread has seen
//
// V lies as it comes, the channels of a key side by side: the matrix unit turns 16-bit operands itself.
// The largest score is not followed exactly: weights are relative to the largest at the time it was last looked up, and
// may be 2**SLACK times as large as one. Up to that nothing is scaled again, and no thread asks another.

#include "sm90.cuh"

constexpr int BLOCK = 128, GROUPS = 2;
constexpr int PART_BYTES = BLOCK * 128;          // 64 channels of a block, rows of 128 bytes
constexpr int TILE_BYTES = D / 64 * PART_BYTES;  // all of them, 64 behind 64
constexpr int ENDS = 4;                          // tiles in front of a head that may have long lists
constexpr float SLACK = 8.0f;                    // both kinds of 16 bits end at 2**15 or more
#define INFINITE __int_as_float(0x7F800000)

// 128 tokens of a head from the given one on, all its channels; zeros for tokens behind the last.
__device__ __forceinline__ void copy_tile(u32 to, const TensorMap *map, int token, int head, int batch, u64 *bar) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %3, %5, %6}],"
      " [%2];" ::"r"(to), "l"(map), "r"(address_of(bar)), "r"(0), "r"(token), "r"(head), "r"(batch) : "memory");
}

// Rows of 128 bytes, swizzled in groups of eight, as copy_tile leaves them. Where rows are what is summed over, the
// next 64 columns lie a part further.
__device__ __forceinline__ u64 described(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(PART_BYTES >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if HALF
#define KIND "f16"
#else
#define KIND "bf16"
#endif

__device__ __forceinline__ u32 two_halves(float a, float b) {
  u32 r;
  asm("cvt.rn." KIND "x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
  return r;
}

#define FOUR(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define SIXTEEN(x, i) FOUR(x, i), FOUR(x, i + 4), FOUR(x, i + 8), FOUR(x, i + 12)
#define FLOATS32(x, i) SIXTEEN(x, i), SIXTEEN(x, i + 16)
#define NAMES32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define NAMES64 \
  NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
          "%57,%58,%59,%60,%61,%62,%63"

// s += 64 rows of Q times 16 channels of 128 keys.
__device__ __forceinline__ void scores(float (&s)[64], u64 q, u64 k, int more) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND "." KIND
               " {" NAMES64 "}, %64, %65, p, 1, 1, 0, 0;}"
               : FLOATS32(s, 0), FLOATS32(s, 32)
               : "l"(q), "l"(k), "r"(more));
}

// o += weights of 16 keys, 64 rows, times 16 keys of all channels.
#if D == 128
__device__ __forceinline__ void weighted(float (&o)[64], const u32 *p, u64 v) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND "." KIND
               " {" NAMES64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : FLOATS32(o, 0), FLOATS32(o, 32)
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
#else
__device__ __forceinline__ void weighted(float (&o)[32], const u32 *p, u64 v) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND "." KIND
               " {" NAMES32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
               : FLOATS32(o, 0)
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
#endif

// Behind the tiles in shared memory. A barrier is full when what it guards has come, and empty when all have read it.
struct Shared {
  u64 tile_full[SLOTS], tile_empty[SLOTS], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
  int keys[STAGES];  // from this block's first on: 128 or more, but of the last block
  int tile[SLOTS], count[SLOTS];
};

template <int N> struct Ring {  // whose turn among N, and how often it came
  int at = 0, phase = 0;
  __device__ __forceinline__ void step() {
    if (++at == N) at = 0, phase ^= 1;
  }
};

__device__ __forceinline__ int row_of(int tile, int rows) {  // text lies last or first and has the longest lists
  const int ends = min(ENDS, rows), row = ends - 1 - tile % rows;
  return row < 0 ? row + rows : row;
}

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1) attention_blocks_sm90(
    const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
    const __grid_constant__ TensorMap map_v, const int *kept, const int *counts, void *out, int *next, int H, int N,
    int M, int rows, int tiles, float scale, i64 list_b, i64 list_h, i64 list_r, i64 count_b, i64 count_h,
    i64 count_r) {
  extern __shared__ char raw[];
  const u32 base = (address_of(raw) + 1023) & ~1023;
  const u32 q_at = base, k_at = q_at + SLOTS * TILE_BYTES, v_at = k_at + STAGES * TILE_BYTES;
  Shared &sh = *(Shared *)(raw + (base - address_of(raw)) + (SLOTS + 2 * STAGES) * TILE_BYTES);
  const int thread = threadIdx.x, group = thread / 128;

  if (thread == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(&sh.tile_full[i], 1);
      barrier_init(&sh.tile_empty[i], 4 * GROUPS);
    }
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&sh.k_full[i], 1);
      barrier_init(&sh.k_empty[i], 4 * GROUPS);
      barrier_init(&sh.v_full[i], 1);
      barrier_init(&sh.v_empty[i], 4 * GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");  // 40 + 2 * 232 are no more than the 3 * 168 of the start
    if (thread == 0) {
      Ring<SLOTS> slot;
      Ring<STAGES> k, v;
      for (;;) {
        const int tile = atomicAdd(next, 1);
        const int head = tile / rows, row = row_of(tile, rows), b = head / H, h = head % H;
        const bool real = tile < tiles;
        const int count = real ? counts[b * count_b + h * count_h + row * count_r] : 0;
        wait(&sh.tile_empty[slot.at], slot.phase ^ 1);
        sh.tile[slot.at] = tile;
        sh.count[slot.at] = count;
        if (count > 0) {
          expect(&sh.tile_full[slot.at], TILE_BYTES);
          copy_tile(q_at + slot.at * TILE_BYTES, &map_q, row * BLOCK, h, b, &sh.tile_full[slot.at]);
        } else {
          arrive(&sh.tile_full[slot.at]);
        }
        slot.step();
        if (!real) break;
        const int *list = kept + b * list_b + h * list_h + row * list_r;
        auto bring_v = [&](int block) {
          wait(&sh.v_empty[v.at], v.phase ^ 1);
          expect(&sh.v_full[v.at], TILE_BYTES);
          copy_tile(v_at + v.at * TILE_BYTES, &map_v, block * BLOCK, h, b, &sh.v_full[v.at]);
          v.step();
        };
        int block = count > 0 ? list[0] : 0, before = 0;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
          const int then = i + 1 < count ? list[i + 1] : 0;
          wait(&sh.k_empty[k.at], k.phase ^ 1);
          sh.keys[k.at] = M - block * BLOCK;
          expect(&sh.k_full[k.at], TILE_BYTES);
          copy_tile(k_at + k.at * TILE_BYTES, &map_k, block * BLOCK, h, b, &sh.k_full[k.at]);
          k.step();
          if (i > 0) bring_v(before);  // values are needed a block later than keys
          before = block;
          block = then;
        }
        if (count > 0) bring_v(before);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int mine = group - 1, lane = thread % 32, quad = lane % 4;
    Ring<SLOTS> slot;
    Ring<STAGES> k, v;
    float s[64], o[D / 2], less[2], fade[2], sum[2];
    u32 p[32], other_p[32];
    for (;;) {
      wait(&sh.tile_full[slot.at], slot.phase);
      const int tile = sh.tile[slot.at], count = sh.count[slot.at];
      auto leave_tile = [&]() {  // its queries are read
        __syncwarp();
        if (lane == 0) arrive(&sh.tile_empty[slot.at]);
        slot.step();
      };
      if (tile >= tiles) break;
      const int head = tile / rows, row = row_of(tile, rows);
      const int first = row * BLOCK + mine * 64 + thread % 128 / 32 * 16 + lane / 4;
#pragma unroll
      for (int r = 0; r < 2; r++) less[r] = INFINITE, sum[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
      const u64 q_part = described(q_at + slot.at * TILE_BYTES + mine * 64 * 128);
      if (count == 0) leave_tile();

      bool grown;
      int left;
      auto ready = [&]() { wait(&sh.k_full[k.at], k.phase); };  // the next block's keys have come
      auto ask = [&]() {                                        // its scores
        const u64 k_part = described(k_at + k.at * TILE_BYTES);
        hold(s);
        fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
          const int at = i / 4 * (PART_BYTES / 16) + i % 4 * 2;
          scores(s, q_part + at, k_part + at, i > 0);
        }
        commit();
        left = sh.keys[k.at];
      };
      auto asked = [&]() {  // and they are there
        hold(s);
        __syncwarp();
        if (lane == 0) arrive(&sh.k_empty[k.at]);
        k.step();
      };
      auto measure = [&]() {
        if (left < BLOCK) {
#pragma unroll
          for (int i = 0; i < 64; i++)
            if (left - 2 * quad <= 8 * (i / 4) + i % 2) s[i] = -INFINITE;
        }
        float top[4] = {-INFINITE, -INFINITE, -INFINITE, -INFINITE};
#pragma unroll
        for (int i = 0; i < 64; i++) top[i % 4] = fmaxf(top[i % 4], s[i]);
        float high[2];
#pragma unroll
        for (int r = 0; r < 2; r++) high[r] = fmaxf(top[2 * r], top[2 * r + 1]) * scale;
        grown = __any_sync(0xFFFFFFFF, fmaxf(high[0] + less[0], high[1] + less[1]) > SLACK);
        if (grown) {
#pragma unroll
          for (int r = 0; r < 2; r++) {
            high[r] = fmaxf(high[r], __shfl_xor_sync(0xFFFFFFFF, high[r], 1));
            high[r] = fmaxf(high[r], __shfl_xor_sync(0xFFFFFFFF, high[r], 2));
            const float lower = fminf(less[r], -high[r]);
            fade[r] = exp2_of(lower - less[r]);
            less[r] = lower;
            sum[r] *= fade[r];
          }
        }
      };
      auto weigh = [&]() {  // scores become weights, unrounded
        float part[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 64; i += 2) {
          const int r = i / 2 % 2;
          s[i] = exp2_of(fmaf(s[i], scale, less[r]));
          s[i + 1] = exp2_of(fmaf(s[i + 1], scale, less[r]));
          sum[r] += s[i];
          part[r] += s[i + 1];
        }
        sum[0] += part[0];
        sum[1] += part[1];
      };
      auto round = [&](u32(&p)[32]) {
#pragma unroll
        for (int i = 0; i < 32; i++) p[i] = two_halves(s[2 * i], s[2 * i + 1]);
      };
      auto gather = [&](u32(&p)[32]) {  // o += weights of the last block times its values
        const u64 v_part = described(v_at + v.at * TILE_BYTES);
        hold(p);
        hold(o);
        fence();
#pragma unroll
        for (int i = 0; i < BLOCK / 16; i++) weighted(o, p + 4 * i, v_part + i * (16 * 128 / 16));
        commit();
      };
      auto gathered = [&]() {  // behind the end of a basic block: ptxas would wait at its beginning
        wait_products<0>();
        hold(o);
        __syncwarp();
        if (lane == 0) arrive(&sh.v_empty[v.at]);
        v.step();
      };
      auto come = [&]() { wait(&sh.v_full[v.at], v.phase); };  // the last block's values have
      int rest = count - 1;
      auto step = [&](u32(&p)[32], u32(&then)[32]) {  // from the weights of a block to those of the next
        come();
        ask();
        gather(p);
        wait_products<1>();
        asked();
        measure();
        weigh();
        round(then);
        hold(then);
        rest--;
        if (rest) ready();
        else leave_tile();
        gathered();
        if (grown) {
#pragma unroll
          for (int i = 0; i < D / 2; i++) o[i] *= fade[i / 2 % 2];
        }
      };
      auto end = [&](u32(&p)[32]) {
        come();
        gather(p);
        gathered();
      };
      if (count > 0) {
        ready();
        ask();
        wait_products<0>();
        asked();
        measure();
        weigh();
        round(p);
        if (rest) ready();
        else leave_tile();
#pragma unroll 1
        for (;;) {
          if (!rest) {
            end(p);
            break;
          }
          step(p, other_p);
          if (!rest) {
            end(other_p);
            break;
          }
          step(other_p, p);
        }
      }

      // the answer
      const int batch = head / H, h = head % H;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], 2);
        const float inverse = count > 0 ? 1.0f / sum[r] : 0.0f;
        const int n = first + 8 * r;
        const bool inside = n < N;
        const i64 at = (((i64)batch * N + n) * H + h) * D;
#pragma unroll
        for (int m = 0; m < D / 32; m++) {  // 32 channels: each thread of four has two of every eight, and gets eight
          u32 w[4];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int i = 4 * (4 * m + j) + 2 * r;
            w[j] = two_halves(o[i] * inverse, o[i + 1] * inverse);
          }
          exchange(w, quad);
          if (inside) *(uint4 *)((unsigned short *)out + at + 32 * m + 8 * quad) = make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
    }
  }
}
