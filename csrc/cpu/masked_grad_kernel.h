// masked_grad over one block of tokens, for one instruction set: packing of an operand, and the sampled products.
//
//   sums[e] (+)= sum over tokens t of g[t, row(e)] * x[t, col[e]]
//
// Shapes: g [tokens, out] and x [tokens, in] are packed into panels, which hold one vector over the block's tokens for
// each column, so that an entry is the dot product of two contiguous vectors. A panel is small enough to stay in the
// second cache: kTokens tokens of at most kPanelColumns columns. The caller gives each thread its own rows of the
// result: no race. Sums are in float32 (float64 for float64), over the lanes of a vector register, then over the lanes,
// then over blocks of tokens in order: the same bits at any number of threads.
//
// bfloat16 and float16 become float32 in the panel; with AVX512-BF16 bfloat16 stays, and products of pairs of tokens
// are added by the processor's dot product.
#pragma once

#include "masked_grad_types.h"
#include "vectors.h"

namespace shira::SHIRA_ISA {

// What elements are in a panel, and what their products are summed in.
template <class T>
struct Panel {
  using Element = float;
  using Sum = float;
};
template <>
struct Panel<double> {
  using Element = double;
  using Sum = double;
};
#ifdef SHIRA_DOT_BF16
template <>
struct Panel<BFloat16> {
  using Element = BFloat16;
  using Sum = float;
};
#endif

// A square of the operand, transposed: kLanes columns, from as many tokens as a vector of the panel's elements holds.
template <class T>
struct Square {
  using P = typename Panel<T>::Element;
  static constexpr int64_t kTokens = kLanes<P>;
  static constexpr int64_t kColumns = kLanes<P>;

  static void copy(const T* from, int64_t pitch, P* to, int64_t stride) {
    copy_square<kTokens>([&](int i) { return from + i * pitch; }, to, stride);
  }
};

#ifdef SHIRA_DOT_BF16
// Pairs of tokens become elements of 4 bytes, which are then transposed: 32 tokens of 32 columns.
template <>
struct Square<BFloat16> {
  static constexpr int64_t kTokens = 32;
  static constexpr int64_t kColumns = 32;

  // Elements of two tokens in turn, of the first or the second 16 columns.
  template <size_t... lane>
  static Vector<uint32_t> interleaved(const BFloat16* from, int64_t pitch, int half, std::index_sequence<lane...>) {
    const auto a = load<Vector<uint16_t>>(from), b = load<Vector<uint16_t>>(from + pitch);
    return (Vector<uint32_t>)(half ? shuffled(a, b, std::index_sequence<(16 + lane / 2 + (lane & 1) * 32)...>())
                                   : shuffled(a, b, std::index_sequence<(lane / 2 + (lane & 1) * 32)...>()));
  }

  static void copy(const BFloat16* from, int64_t pitch, BFloat16* to, int64_t stride) {
    for (int half = 0; half < 2; ++half) {
      Vector<uint32_t> rows[16];
      for (int i = 0; i < 16; ++i)
        rows[i] = interleaved(from + 2 * i * pitch, pitch, half, std::make_index_sequence<32>());
      transpose<1>(rows);
      for (int i = 0; i < 16; ++i) memcpy(to + (16 * half + i) * stride, &rows[i], sizeof(rows[i]));
    }
  }
};
#endif

// Fills the panel with `columns` columns of `tokens` rows of an operand; tokens beyond are 0 up to a whole vector, and
// columns up to a whole square.
template <class T>
void pack(const PackBlock& block) {
  using S = Square<T>;
  using P = typename Panel<T>::Element;
  const T* from = static_cast<const T*>(block.operand);
  P* panel = static_cast<P*>(block.panel);
  const int64_t stride = kPanelBytes / sizeof(P);
  for (int64_t t = 0; t < block.tokens; t += S::kTokens)
    for (int64_t c = 0; c < block.columns; c += S::kColumns) {
      const int64_t tokens = block.tokens - t, columns = block.columns - c;
      const T* corner = from + t * block.pitch + c;
      if (tokens >= S::kTokens && columns >= S::kColumns) {
        S::copy(corner, block.pitch, panel + c * stride + t, stride);
      } else {
        T edge[S::kTokens * S::kColumns] = {};
        for (int64_t i = 0; i < tokens && i < S::kTokens; ++i)
          for (int64_t j = 0; j < columns && j < S::kColumns; ++j)
            edge[i * S::kColumns + j] = corner[i * block.pitch + j];
        S::copy(edge, S::kColumns, panel + c * stride + t, stride);
      }
    }
}

#ifdef SHIRA_DOT_BF16
inline Vector<float> add_product(Vector<float> sum, Vector<uint16_t> a, Vector<uint16_t> b) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

template <int S, class V, size_t... lane>
inline V neighbours_added(V v, std::index_sequence<lane...>) {
  return v + shuffled(v, v, std::index_sequence<(lane ^ S)...>());
}

// The sum of the lanes: halves first, then quarters, and so on.
template <int S, class V>
inline auto lanes_added(V v) {
  if constexpr (S == 0)
    return v[0];
  else
    return lanes_added<S / 2>(neighbours_added<S>(v, std::make_index_sequence<sizeof(V) / sizeof(v[0])>()));
}

// Adds the lanes of four vectors to four sums, in the order of lanes_added and with a third of its instructions.
template <class S>
inline void add_lanes_of_four(Vector<S> (&v)[4], S* sums) {
  constexpr int N = kLanes<S>;
  if constexpr (N < 4) {
    for (int k = 0; k < 4; ++k) sums[k] += lanes_added<N / 2>(v[k]);
  } else {
    constexpr auto lanes = std::make_index_sequence<N>();
    exchange<N / 2>(v[0], v[1], lanes);
    exchange<N / 2>(v[2], v[3], lanes);
    Vector<S> even = v[0] + v[1], odd = v[2] + v[3];
    exchange<N / 4>(even, odd, lanes);
    Vector<S> all = even + odd;  // a quarter of the lanes each for entries 0, 2, 1 and 3
    if constexpr (N >= 16) all = neighbours_added<2>(all, lanes);
    if constexpr (N >= 8) all = neighbours_added<1>(all, lanes);
    for (int k = 0; k < 4; ++k) sums[k] += all[(k & 1) * (N / 2) + (k >> 1) * (N / 4)];
  }
}

// Adds the products of kEntries neighbours of one row.
template <int kEntries, class P, class S, class Col>
inline void add_entries(const P* g, const P* x, const Col* col, int64_t first_column, int64_t length, S* sums) {
  constexpr int64_t stride = kPanelBytes / sizeof(P);
  const P* columns[kEntries];
  Vector<S> added[kEntries];
  for (int k = 0; k < kEntries; ++k) {
    columns[k] = x + (static_cast<int64_t>(col[k]) - first_column) * stride;
    added[k] = Vector<S>{};
  }
  for (int64_t t = 0; t < length; t += kLanes<P>) {
    const auto a = load<Vector<P>>(g + t);
    for (int k = 0; k < kEntries; ++k) added[k] = add_product(added[k], a, load<Vector<P>>(columns[k] + t));
  }
  if constexpr (kEntries == 4)
    add_lanes_of_four(added, sums);
  else
    for (int k = 0; k < kEntries; ++k) sums[k] += lanes_added<kLanes<S> / 2>(added[k]);
}

template <class T, class Col>
void add_rows(const RowBlock& block) {
  using P = typename Panel<T>::Element;
  using S = typename Panel<T>::Sum;
  const P* x = static_cast<const P*>(block.x_panel);
  const Col* col = static_cast<const Col*>(block.col);
  S* sums = static_cast<S*>(block.sums);
  const int64_t length = (block.tokens + kLanes<P> - 1) / kLanes<P> * kLanes<P>;
  for (int64_t row = 0; row < block.rows; ++row) {
    const P* g = static_cast<const P*>(block.g_panel) + row * (kPanelBytes / sizeof(P));
    int64_t e = block.begin[row];
    const int64_t end = block.end[row];
    for (; e + 4 <= end; e += 4) add_entries<4>(g, x, col + e, block.first_column, length, sums + e);
    for (; e < end; ++e) add_entries<1>(g, x, col + e, block.first_column, length, sums + e);
  }
}

template <class T>
MaskedGrad masked_grad_of(bool wide_col) {
  return {pack<T>, wide_col ? add_rows<T, int32_t> : add_rows<T, uint16_t>,
          kPanelVectorBytes / static_cast<int64_t>(sizeof(typename Panel<T>::Element))};
}

inline MaskedGrad choose_masked_grad(Element operand, bool wide_col) {
  switch (operand) {
    case Element::Float64: return masked_grad_of<double>(wide_col);
    case Element::Float32: return masked_grad_of<float>(wide_col);
    case Element::BFloat16: return masked_grad_of<BFloat16>(wide_col);
    case Element::Float16: return masked_grad_of<Half>(wide_col);
    default: return {};
  }
}

}  // namespace shira::SHIRA_ISA
