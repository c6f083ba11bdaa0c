// What kernels for Hopper (sm_90a) have in common: barriers in shared memory, products that are waited for, rounding.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef long long i64;

struct alignas(64) TensorMap {
  char bytes[128];
};

__device__ __forceinline__ u32 address_of(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64 *bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(bar)), "r"(arrivals));
}

__device__ __forceinline__ void expect(u64 *bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(bar)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u64 *bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(bar)) : "memory");
}

__device__ __forceinline__ void wait(u64 *bar, int phase) {
  asm volatile(
      "{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done:}"
      ::"r"(address_of(bar)), "r"(phase) : "memory");
}

__device__ __forceinline__ void copy_tile(u32 to, const TensorMap *map, int x, int y, u64 *bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(address_of(bar)), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT> __device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Nothing that computes or reads these registers moves across. (A float goes as one: as a word it would be copied.)
template <int N, typename T> __device__ __forceinline__ void hold(T (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(r[i])::"memory");
}

template <int N> __device__ __forceinline__ void hold(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}

// Until what this thread has asked for by cp.async has come.
__device__ __forceinline__ void wait_for_own() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ float larger(float a, float b) {  // a NaN is the largest
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Each times `by`, as a byte, half to even, where that is at most 127: 1.5 * 2**23 leaves no bits below one.
__device__ __forceinline__ u32 four_bytes(const float *x, float by) {
  u32 a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(fmaf(x[i], by, 12582912.0f));
  return __byte_perm(__byte_perm(a[0], a[1], 0x0040), __byte_perm(a[2], a[3], 0x0040), 0x5410);
}

__device__ __forceinline__ u32 four_e4m3(float a, float b, float c, float d) {
  u32 r;
  asm("{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3;"
      "mov.b32 %0, {l, h};}" : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

// Of four threads, each with a word for each of them: all that are for the `quad`th, by who had them.
__device__ __forceinline__ void exchange(u32 (&w)[4], int quad) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (!(j & bit)) {
        const bool upper = quad & bit;
        const u32 got = __shfl_xor_sync(0xFFFFFFFF, upper ? w[j] : w[j | bit], bit);
        if (upper)
          w[j] = got;
        else
          w[j | bit] = got;
      }
}
