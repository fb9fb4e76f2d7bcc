// Vectors of numbers, for one instruction set: loads that widen, stores that round, transposition of squares, products
// added to sums. For kernels that pack their operands.
#pragma once

#include "../shared/element.h"

namespace shira::SHIRA_ISA {

// N numbers of one type; T itself for one.
template <class T, int N>
struct LanesOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
struct LanesOf<T, 1> {
  using type = T;
};
template <class T, int N>
using Lanes = typename LanesOf<T, N>::type;

template <class T>
constexpr int64_t kLanes = SHIRA_VECTOR_BYTES / sizeof(T);

// What fills a register. Vectors of bfloat16 are their bits.
template <class T>
struct VectorOf {
  using type = Lanes<T, kLanes<T>>;
};
template <>
struct VectorOf<BFloat16> {
  using type = Lanes<uint16_t, kLanes<uint16_t>>;
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class To, class From>
inline To load(const From* from) {
  To to;
  memcpy(&to, from, sizeof(to));
  return to;
}

// Lanes of a and b, those of b numbered after those of a.
template <class V, size_t... lane>
inline V shuffled(V a, V b, std::index_sequence<lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, lane...);
#else  // GCC has __builtin_shufflevector since version 12 only
  constexpr int N = sizeof...(lane);
  using Number =
      std::conditional_t<sizeof(V) / N == 2, int16_t, std::conditional_t<sizeof(V) / N == 4, int32_t, int64_t>>;
  return __builtin_shuffle(a, b, Lanes<Number, N>{lane...});
#endif
}

// One step of the transposition of a square of N rows: exchanges squares of S x S across the diagonal.
template <int S, class V, size_t... lane>
[[gnu::always_inline]] inline void exchange(V& a, V& b, std::index_sequence<lane...>) {
  constexpr size_t N = sizeof...(lane);
  const V first = shuffled(a, b, std::index_sequence<((lane & S) ? N + lane - S : lane)...>());
  b = shuffled(a, b, std::index_sequence<((lane & S) ? N + lane : lane + S)...>());
  a = first;
}

template <int S, class V, int N>
[[gnu::always_inline]] inline void transpose(V (&rows)[N]) {
  if constexpr (S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<N>());
    transpose<2 * S>(rows);
  }
}

// Between 16 and 32 bits: GCC's __builtin_convertvector makes 8 and 16 lanes of two halves.
template <int N>
inline Lanes<uint32_t, N> zero_extended(Lanes<uint16_t, N> from) {
#if SHIRA_VECTOR_BYTES == 64
  if constexpr (N == 16) return (Lanes<uint32_t, N>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)from);
#endif
#if SHIRA_VECTOR_BYTES >= 32
  if constexpr (N == 8) return (Lanes<uint32_t, N>)_mm256_cvtepu16_epi32((__m128i)from);
#endif
  return __builtin_convertvector(from, Lanes<uint32_t, N>);
}

template <int N>
inline Lanes<uint16_t, N> truncated(Lanes<uint32_t, N> from) {
#if SHIRA_VECTOR_BYTES == 64
  if constexpr (N == 16) return (Lanes<uint16_t, N>)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)from);
#endif
  return __builtin_convertvector(from, Lanes<uint16_t, N>);
}

// N neighbours in the type that arithmetic on T is done in.
template <int N, class T>
inline Lanes<typename Compute<T>::type, N> widened(const T* from) {
  using C = typename Compute<T>::type;
  if constexpr (std::is_same_v<T, C>) {
    return load<Lanes<C, N>>(from);
  } else if constexpr (N == 1) {
    return widen(*from);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return (Lanes<float, N>)(zero_extended<N>(load<Lanes<uint16_t, N>>(from)) << 16);
  } else {
#if SHIRA_VECTOR_BYTES == 64
    if constexpr (N == 16) return (Lanes<float, N>)_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));
#endif
#if SHIRA_VECTOR_BYTES >= 32
    if constexpr (N == 8) return (Lanes<float, N>)_mm256_cvtph_ps(load<__m128i>(from));
#endif
    Lanes<float, N> to;
    for (int i = 0; i < N; ++i) to[i] = widen(from[i]);
    return to;
  }
}

// The upper half of each is the number's bfloat16, rounded as narrow() does; of the lower ones nothing is known.
template <int N>
inline Lanes<uint32_t, N> rounded_to_bfloat16(Lanes<float, N> from) {
  const auto bits = (Lanes<uint32_t, N>)from;
  return from != from ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// N neighbours, rounded as narrow() does.
template <int N, class T>
inline void store_narrowed(Lanes<typename Compute<T>::type, N> from, T* to) {
  if constexpr (std::is_same_v<T, typename Compute<T>::type>) {
    memcpy(to, &from, sizeof(from));
  } else if constexpr (N == 1) {
    *to = narrow<T>(from);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto kept = truncated<N>(rounded_to_bfloat16<N>(from) >> 16);
    memcpy(to, &kept, sizeof(kept));
  } else {
    float numbers[N];
    memcpy(numbers, &from, sizeof(from));
    for (int i = 0; i < N; ++i) to[i] = narrow<T>(numbers[i]);
  }
}

// sum + a b: one rounding where the processor has such an instruction, else two.
template <class V>
inline V add_product(V sum, V a, V b) {
#if SHIRA_VECTOR_BYTES >= 32
  if constexpr (std::is_same_v<V, float>)
    return __builtin_fmaf(a, b, sum);
  else if constexpr (std::is_same_v<V, double>)
    return __builtin_fma(a, b, sum);
  else if constexpr (std::is_same_v<V, Lanes<float, 4>>)
    return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)sum);
  else if constexpr (std::is_same_v<V, Lanes<float, 8>>)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
  else if constexpr (std::is_same_v<V, Lanes<double, 4>>)
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#if SHIRA_VECTOR_BYTES == 64
  else if constexpr (std::is_same_v<V, Lanes<float, 16>>)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
  else
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#endif
#else
  return sum + a * b;
#endif
}

// A square of an operand, transposed: N columns from as many rows. row(i) points to its elements in row i; columns
// are `stride` apart at `to`.
template <int N, class Row, class C>
inline void copy_square(const Row& row, C* to, int64_t stride) {
  Lanes<C, N> rows[N];
  for (int i = 0; i < N; ++i) rows[i] = widened<N>(row(i));
  transpose<1>(rows);
  for (int i = 0; i < N; ++i) memcpy(to + i * stride, &rows[i], sizeof(rows[i]));
}

// As copy_square, from N rows of 2 N columns of bfloat16, of which two neighbours are transposed as one: half the
// shuffles.
template <int N, class Row>
inline void copy_square_of_pairs(const Row& row, float* to, int64_t stride) {
  Lanes<uint32_t, N> pairs[N];
  for (int i = 0; i < N; ++i) pairs[i] = load<Lanes<uint32_t, N>>(row(i));
  transpose<1>(pairs);
  for (int i = 0; i < N; ++i) {
    const Lanes<uint32_t, N> even = pairs[i] << 16, odd = pairs[i] & 0xffff0000u;
    memcpy(to + 2 * i * stride, &even, sizeof(even));
    memcpy(to + (2 * i + 1) * stride, &odd, sizeof(odd));
  }
}

// Two vectors of as many numbers as are lanes of float, in one of bfloat16: four of one and four of the other in each
// 128 bits, so that one instruction widens half of them. Number i of the first is at packed_place(i), number i of the
// second at packed_place(lanes + i).
constexpr int64_t packed_place(int64_t i) { return i % kLanes<float> / 4 * 8 + i / kLanes<float> * 4 + i % 4; }

template <int kWhich, size_t... lane>
inline Vector<float> unpacked(Vector<BFloat16> numbers, std::index_sequence<lane...>) {
  return (Vector<float>)shuffled(
      Vector<BFloat16>{}, numbers,
      std::index_sequence<(lane % 2 * sizeof...(lane) + lane / 8 * 8 + kWhich * 4 + lane % 8 / 2)...>());
}
template <int kWhich>
inline Vector<float> unpacked(Vector<BFloat16> numbers) {
  return unpacked<kWhich>(numbers, std::make_index_sequence<kLanes<uint16_t>>());
}

// Packs the lower halves of 32 bits of both, or the upper ones.
template <int kHalf, size_t... lane>
inline Vector<BFloat16> packed(Vector<uint32_t> first, Vector<uint32_t> second, std::index_sequence<lane...>) {
  return shuffled((Vector<BFloat16>)first, (Vector<BFloat16>)second,
                  std::index_sequence<(lane % 8 / 4 * sizeof...(lane) + lane / 8 * 8 + lane % 4 * 2 + kHalf)...>());
}

// A square of bfloat16, transposed and packed: columns from as many rows as one vector has numbers.
template <class Row>
inline void copy_square_packed(const Row& row, BFloat16* to, int64_t stride) {
  constexpr int W = kLanes<float>;
  constexpr auto kLane = std::make_index_sequence<2 * W>();
  Vector<uint32_t> first[W], second[W];
  for (int i = 0; i < W; ++i) first[i] = load<Vector<uint32_t>>(row(i));
  transpose<1>(first);
  for (int i = 0; i < W; ++i) second[i] = load<Vector<uint32_t>>(row(W + i));
  transpose<1>(second);
  for (int i = 0; i < W; ++i) {
    const auto even = packed<0>(first[i], second[i], kLane), odd = packed<1>(first[i], second[i], kLane);
    memcpy(to + 2 * i * stride, &even, sizeof(even));
    memcpy(to + (2 * i + 1) * stride, &odd, sizeof(odd));
  }
}

}  // namespace shira::SHIRA_ISA
