// The dialect in which kernels are written: CUDA C for GPUs, and the same text as OpenCL C, so that their logic also
// runs on a processor. Kernels work on 32-bit floats, and on 64-bit ones where few are needed; 16-bit ones travel as bits.
#ifndef EMAUDIT_PORTABLE_H
#define EMAUDIT_PORTABLE_H

// Threads of every block: `THREADS` is also what the launchers ask for.
#define THREADS 256

#ifdef __OPENCL_VERSION__

#pragma OPENCL EXTENSION cl_khr_fp64 : enable

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
#define FABS fabs
#define SQRT_F64 sqrt
#define ABS_F64 fabs
#define BITS_OF_F32 as_uint
#define F32_OF_BITS as_float
#define LOWEST (-INFINITY)

typedef uchar U8;
typedef ushort U16;
typedef uint U32;
typedef ulong U64;
typedef float F32;
typedef double F64;
typedef uint4 U32X4;
typedef float4 F32X4;
#define MAKE_U32X4(a, b, c, d) ((uint4)(a, b, c, d))
#define MAKE_F32X4(a, b, c, d) ((float4)(a, b, c, d))

DEVICE F32 f32_of_f16(U16 bits) { return vload_half(0, (const half *)&bits); }

// To nearest, ties to even.
DEVICE U16 f16_of_f32(F32 value) {
  U16 bits;
  vstore_half_rte(value, 0, (half *)&bits);
  return bits;
}

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
#define FABS fabsf
#define SQRT_F64 sqrt
#define ABS_F64 fabs
#define BITS_OF_F32 __float_as_uint
#define F32_OF_BITS __uint_as_float
#define LOWEST __int_as_float(0xff800000)

typedef unsigned char U8;
typedef unsigned short U16;
typedef unsigned int U32;
typedef unsigned long long U64;
typedef float F32;
typedef double F64;
typedef uint4 U32X4;
typedef float4 F32X4;
#define MAKE_U32X4 make_uint4
#define MAKE_F32X4 make_float4

DEVICE F32 f32_of_f16(U16 bits) {
  F32 value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// To nearest, ties to even.
DEVICE U16 f16_of_f32(F32 value) {
  U16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#endif

// This thread's place among all threads of the launch.
#define INDEX (BLOCK * THREADS + THREAD)

// The bits of the bf16 nearest to `value`, ties to even; a NaN stays one.
DEVICE U32 bf16_bits(F32 value) {
  U32 bits = BITS_OF_F32(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return (bits >> 16) | 0x40u;
  }
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

#endif
