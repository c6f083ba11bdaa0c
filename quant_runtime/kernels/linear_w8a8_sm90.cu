// linear_w8a8 for Hopper, in sm_90a: 128 rows by 256 columns of y at a time, in clusters of programs.
//
// One thread of the first group of warps has the copy engine bring tiles of x and w, 128 channels at a time, and runs
// ahead of the two groups that multiply them, 64 rows each by all 256 columns: what a tile's first products need comes
// while the last tile is scaled, rounded and stored. The programs of a cluster have the same columns and neighbouring
// rows: each brings its part of w to all of them, so that w leaves the second-level cache once for all.
//
// Sums are whole numbers in the matrix unit's registers from a tile's first channel to its last.

#include "sm90.cuh"

constexpr int ROWS = 128, COLUMNS = 256, STEP = 128, GROUPS = 2;
constexpr int X_BYTES = ROWS * STEP, W_BYTES = COLUMNS * STEP, W_PART = W_BYTES / CLUSTER;
constexpr int GROUP = 8;   // clusters' rows that share their columns' w while it is in cache
constexpr int CHUNK = 64;  // columns that a warp stores at a time, 16 rows of them
constexpr int CHUNK_BYTES = 16 * CHUNK * 2;

// At the same barrier of another program of the cluster.
__device__ __forceinline__ void arrive_at(u64 *bar, int program) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
      "mbarrier.arrive.shared::cluster.b64 _, [there];}"
      ::"r"(address_of(bar)), "r"(program) : "memory");
}

__device__ __forceinline__ void cluster_meets() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// To the same place of every program of the cluster, and each one's barrier is told.
__device__ __forceinline__ void copy_tile_to_all(u32 to, const TensorMap *map, int x, int y, u64 *bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;"
      ::"r"(to), "l"(map), "r"(address_of(bar)), "r"(x), "r"(y), "h"((unsigned short)((1 << CLUSTER) - 1))
      : "memory");
}

__device__ __forceinline__ void store_tile(const TensorMap *map, int x, int y, u32 from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
      "cp.async.bulk.commit_group;"
      ::"l"(map), "r"(x), "r"(y), "r"(from) : "memory");
}

template <int LEFT> __device__ __forceinline__ void wait_stores() {  // until their memory has been read
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

// Rows of 128 bytes, swizzled in groups of eight, as copy_tile leaves them.
__device__ __forceinline__ u64 described(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define FOUR(i) "+r"(s[i]), "+r"(s[i + 1]), "+r"(s[i + 2]), "+r"(s[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)

// s += 64 rows of x times 256 of w, 32 channels; s = that where there is no `more`.
__device__ __forceinline__ void multiply(int (&s)[128], u64 x, u64 w, int more) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
      "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,"
      "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
      "%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,"
      "%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,"
      "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,"
      "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
      "}, %128, %129, p;}"
      : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112)
      : "l"(x), "l"(w), "r"(more));
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

__device__ __forceinline__ float bias_at(const void *bias, int column) {
#if BIAS == 0
  return 0.0f;
#elif BIAS == 1
  return ((const float *)bias)[column];
#elif BIAS == 2
  return __uint_as_float((u32)((const unsigned short *)bias)[column] << 16);
#else
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(((const unsigned short *)bias)[column]));
  return r;
#endif
}

// Behind the tiles in shared memory. A barrier is full when what it guards has come, and empty when all have read it.
struct Shared {
  float4 scales[COLUMNS / 2];  // of a column and its neighbour, and their biases
  u64 full[STAGES], empty[STAGES], scales_full, scales_empty;
};

struct Place {
  int row, column;
};

// Which tile of y: GROUP rows of the clusters' tiles share their columns' w while it is in cache, and the next group
// begins with the columns that the last one ended with.
__device__ __forceinline__ Place place_of(int tile, int tall, int wide, int rank) {
  const int first = tile / (GROUP * wide) * GROUP, here = min(tall - first, GROUP), in = tile - first * wide;
  const int column = in / here, odd = first / GROUP & 1;
  return {((first + in % here) * CLUSTER + rank) * ROWS, (odd ? wide - 1 - column : column) * COLUMNS};
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__((GROUPS + 1) * 128, 1) linear_w8a8_sm90(
    const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w,
    const __grid_constant__ TensorMap map_y, const float *x_scale, const float *w_scale, const void *bias, int M, int N,
    int steps, int tall, int wide) {
  extern __shared__ __align__(1024) char raw[];
  const u32 x_at = address_of(raw), w_at = x_at + STAGES * X_BYTES, y_at = w_at + STAGES * W_BYTES;
  Shared &sh = *(Shared *)(raw + STAGES * (X_BYTES + W_BYTES) + GROUPS * 4 * 2 * CHUNK_BYTES);
  const int thread = threadIdx.x, rank = blockIdx.x % CLUSTER;
  const int begin = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER, tiles = tall * wide;

  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&sh.full[i], 1);
      barrier_init(&sh.empty[i], 4 * GROUPS * CLUSTER);
    }
    barrier_init(&sh.scales_full, 32);
    barrier_init(&sh.scales_empty, 4 * GROUPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_meets();

  if (thread < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (thread == 0) {
      int stage = 0, phase = 0;
      for (int tile = begin; tile < tiles; tile += stride) {
        const Place at = place_of(tile, tall, wide, rank);
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
          const int k = step * STEP;
          u64 *bar = &sh.full[stage];
          wait(&sh.empty[stage], phase ^ 1);
          expect(bar, X_BYTES + W_BYTES);
          copy_tile(x_at + stage * X_BYTES, &map_x, k, at.row, bar);
          const u32 to = w_at + stage * W_BYTES + rank * W_PART;
          const int column = at.column + rank * (COLUMNS / CLUSTER);
          copy_tile_to_all(to, &map_w, k, column, bar);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    } else if (thread / 32 == 1) {  // scales and biases of a tile's columns, in pairs
      int seen = 0;
      for (int tile = begin; tile < tiles; tile += stride, seen++) {
        const int first = place_of(tile, tall, wide, rank).column;
        wait(&sh.scales_empty, seen & 1 ^ 1);
#pragma unroll 1
        for (int i = thread % 32; i < COLUMNS / 2; i += 32) {
          const int c = min(first + 2 * i, N - 2);
          sh.scales[i] = make_float4(w_scale[c], w_scale[c + 1], bias_at(bias, c), bias_at(bias, c + 1));
        }
        arrive(&sh.scales_full);
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int mine = thread / 128 - 1, warp = thread / 32 - 4, lane = thread % 32, quad = lane % 4;
    const u64 x_part = described(x_at + mine * 64 * STEP), w_part = described(w_at);
    const u32 chunks = y_at + warp * 2 * CHUNK_BYTES;
    const int to_row = lane % 16, to_piece = lane / 16;  // of a chunk, where this thread's part of stmatrix is
    const float4 *scales = sh.scales + quad;
    int stage = 0, phase = 0, seen = 0;
    int s[128];
    auto release = [&](int read) {  // every program's copy engine writes to every program's stage
      if (lane < CLUSTER) arrive_at(&sh.empty[read], lane);
    };
    for (int tile = begin; tile < tiles; tile += stride, seen++) {
      const Place at = place_of(tile, tall, wide, rank);
      const int row = at.row + 16 * warp;
      float scale[2];  // asked for here, so that they have come when the sums have
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int m = min(row + lane / 4 + 8 * r, M - 1);
        asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(scale[r]) : "l"(x_scale + m));
      }
      int last = 0;
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        wait(&sh.full[stage], phase);
        const u64 x = x_part + (u64)(stage * (X_BYTES >> 4)), w = w_part + (u64)(stage * (W_BYTES >> 4));
        hold(s);
        fence();
#pragma unroll
        for (int k = 0; k < STEP / 32; k++) multiply(s, x + 2 * k, w + 2 * k, step | k);
        commit();
        hold(s);
        wait_products<1>();
        if (step > 0) release(last);
        last = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      wait(&sh.scales_full, seen & 1);
      float4 of[CHUNK / 8];
      auto fetch = [&](int c) {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) of[j] = scales[c * CHUNK / 2 + 4 * j];
      };
      fetch(0);
      wait_products<0>();
      hold(s);
      release(last);
#pragma unroll
      for (int c = 0; c < COLUMNS / CHUNK; c++) {
        const u32 chunk = chunks + c % 2 * CHUNK_BYTES;
        u32 y[CHUNK / 8][2];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const int i = c * CHUNK / 2 + 4 * j + 2 * r;
            y[j][r] = two_halves(fmaf((float)s[i] * of[j].x, scale[r], of[j].z),
                                 fmaf((float)s[i + 1] * of[j].y, scale[r], of[j].w));
          }
        if (c + 1 < COLUMNS / CHUNK) fetch(c + 1);
        if (lane == 0) wait_stores<1>();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j += 2)
          asm volatile(
              "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
              ::"r"(chunk + to_row * 128 + ((j + to_piece ^ to_row & 7) << 4)), "r"(y[j][0]), "r"(y[j][1]),
              "r"(y[j + 1][0]), "r"(y[j + 1][1]) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) store_tile(&map_y, at.column + c * CHUNK, row, chunk);
      }
      if (lane == 0) arrive(&sh.scales_empty);
    }
    if (lane == 0) wait_stores<0>();
  }
  __syncthreads();
  cluster_meets();  // none ends while another may still write to it
}
