// Kernels that gain from AVX512-BF16 beside AVX512; other functions here are compiled for every processor.
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define SHIRA_ISA avx512_bf16
#define SHIRA_VECTOR_BYTES 64
#define SHIRA_DOT_BF16
#include "masked_grad_kernel.h"

namespace shira {
extern const ChooseMaskedGrad avx512_bf16_masked_grad;
const ChooseMaskedGrad avx512_bf16_masked_grad = avx512_bf16::choose_masked_grad;
}  // namespace shira

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
