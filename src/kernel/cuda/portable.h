// The dialect in which kernels are written: CUDA C for GPUs, and the same text as OpenCL C, so that their logic also
// runs on a processor. Kernels work on 32-bit floats; 16-bit ones travel as bits.
#ifndef EMAUDIT_PORTABLE_H
#define EMAUDIT_PORTABLE_H

// Threads of every block: `THREADS` is also what the launchers ask for.
#define THREADS 256

#ifdef __OPENCL_VERSION__

#define KERNEL __kernel __attribute__((reqd_work_group_size(THREADS, 1, 1)))
#define DEVICE static inline
#define GLOBAL __global
#define SHARED __local
#define SHARED_POINTER __local
#define RESTRICT restrict
#define BARRIER barrier(CLK_LOCAL_MEM_FENCE)
#define THREAD ((U32)get_local_id(0))
#define BLOCK ((U32)get_group_id(0))
#define EXP exp
#define LOG log
#define TANH tanh
#define SQRT sqrt
#define FMAX fmax
#define BITS_OF_F32 as_uint
#define LOWEST (-INFINITY)

typedef uchar U8;
typedef ushort U16;
typedef uint U32;
typedef ulong U64;
typedef float F32;
typedef uint4 U32X4;
typedef float4 F32X4;
#define MAKE_U32X4(a, b, c, d) ((uint4)(a, b, c, d))
#define MAKE_F32X4(a, b, c, d) ((float4)(a, b, c, d))

// Round as written, as the processor's code does: no product may be fused with a sum. CUDA: --fmad=false.
#pragma OPENCL FP_CONTRACT OFF

#else

#define KERNEL extern "C" __global__ __launch_bounds__(THREADS)
#define DEVICE static __device__ __forceinline__
#define GLOBAL
#define SHARED __shared__
#define SHARED_POINTER
#define RESTRICT __restrict__
#define BARRIER __syncthreads()
#define THREAD ((U32)threadIdx.x)
#define BLOCK ((U32)blockIdx.x)
#define EXP expf
#define LOG logf
#define TANH tanhf
#define SQRT sqrtf
#define FMAX fmaxf
#define BITS_OF_F32 __float_as_uint
#define LOWEST __int_as_float(0xff800000)

typedef unsigned char U8;
typedef unsigned short U16;
typedef unsigned int U32;
typedef unsigned long long U64;
typedef float F32;
typedef uint4 U32X4;
typedef float4 F32X4;
#define MAKE_U32X4 make_uint4
#define MAKE_F32X4 make_float4

#endif

// This thread's place among all threads of the launch.
#define INDEX (BLOCK * THREADS + THREAD)

// Sum over the block, the same in every thread; `shared` has THREADS places and may be used again at once.
DEVICE F32 block_sum(F32 value, SHARED_POINTER F32 *shared) {
  shared[THREAD] = value;
  BARRIER;
  for (U32 step = THREADS / 2; step > 0; step /= 2) {
    if (THREAD < step) {
      shared[THREAD] += shared[THREAD + step];
    }
    BARRIER;
  }
  F32 sum = shared[0];
  BARRIER;
  return sum;
}

// Largest value of the block; NaN is passed over.
DEVICE F32 block_max(F32 value, SHARED_POINTER F32 *shared) {
  shared[THREAD] = value;
  BARRIER;
  for (U32 step = THREADS / 2; step > 0; step /= 2) {
    if (THREAD < step) {
      shared[THREAD] = FMAX(shared[THREAD], shared[THREAD + step]);
    }
    BARRIER;
  }
  F32 largest = shared[0];
  BARRIER;
  return largest;
}

// The bits of the bf16 nearest to `value`, ties to even; a NaN stays one.
DEVICE U32 bf16_bits(F32 value) {
  U32 bits = BITS_OF_F32(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return (bits >> 16) | 0x40u;
  }
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

#endif
