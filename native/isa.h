// The instructions that the kernels use, turned on for a part of a file.
//
// Between KERNELS_BEGIN and KERNELS_END every function, lambdas too, is compiled for AVX-512 with
// VNNI and BF16, whatever the compiler's own flags: the library builds anywhere on x86-64 and is
// loaded only where vlm_edge_supported() says so. Include every header before KERNELS_BEGIN.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#define KERNELS_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,bmi2\"))), apply_to=function)")
#define KERNELS_END _Pragma("clang attribute pop")
#else
#define KERNELS_BEGIN \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,bmi2\")")
#define KERNELS_END _Pragma("GCC pop_options")
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))

KERNELS_BEGIN
namespace vlm_edge {

// f(0), ..., f(N - 1), each index a constant: GCC keeps an array of vectors in registers only if it
// never sees a variable index into it. Write f as [&](auto i) INLINED { ... }.
template <class F, size_t... I>
ALWAYS_INLINE void unrolled(const F& f, std::index_sequence<I...>) {
  (f(std::integral_constant<size_t, I>()), ...);
}

template <size_t N, class F>
ALWAYS_INLINE void unrolled(const F& f) {
  unrolled(f, std::make_index_sequence<N>());
}

}  // namespace vlm_edge
KERNELS_END
