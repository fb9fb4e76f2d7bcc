// Kernels for x86-64 processors with AVX2; other functions here are compiled for every processor.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define SHIRA_ISA avx2
#define SHIRA_VECTOR_BYTES 32
#include "isa.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
