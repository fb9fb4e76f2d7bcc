// Element types and the per-element math of every kernel, the same for g++ and nvcc. No torch here.
//
// SHIRA_ISA names the namespace: one per compilation, so that the linker never merges an inline function that was
// compiled for a wider instruction set into a narrower one. No operation may be contracted (-ffp-contract=off,
// -fmad=false): each rounds on its own, as in the reference.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SHIRA_HD __host__ __device__ __forceinline__
#else
#define SHIRA_HD inline
#endif

#ifndef SHIRA_ISA
#error "define SHIRA_ISA (the namespace) before including this header"
#endif

namespace shira::SHIRA_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The type that arithmetic on T is done in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class To, class From>
SHIRA_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

SHIRA_HD double widen(double x) { return x; }
SHIRA_HD float widen(float x) { return x; }
SHIRA_HD float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

SHIRA_HD float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity or NaN
    return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude < 0x400u)  // zero or subnormal: a multiple of 2^-24
    return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  return bit_cast<float>(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

// Round to nearest, ties to even.
template <class T, class C>
SHIRA_HD T narrow(C x) {
  return static_cast<T>(x);
}

template <>
SHIRA_HD BFloat16 narrow<BFloat16, float>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
SHIRA_HD Half narrow<Half, float>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // A subnormal half: adding 0.5 puts its unit, 2^-24, at the last bit of the sum, which the addition rounds to.
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(sum) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

// w + alpha (v - w)
struct Interpolate {
  template <class C>
  static SHIRA_HD C update(C w, C v, C alpha) {
    return w + (v - w) * alpha;
  }
};

// w + alpha v
struct Add {
  template <class C>
  static SHIRA_HD C update(C w, C v, C alpha) {
    return w + v * alpha;
  }
};

}  // namespace shira::SHIRA_ISA
