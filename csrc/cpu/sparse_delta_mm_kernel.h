// sparse_delta_mm and its in-place and batched forms, over one block of tokens of one adapter, for one instruction set.
//
//   sum[t, r] = sum over entries e of row r of x[t, col[e]] * values[e];   out[t, r] <- sum | out[t, r] + sum
//
// Shapes: x [.., columns] and out [.., rows], of which the block's tokens are rows. Its x is packed into a panel
// [columns][kTokens], so that an entry is one number times a short vector that lies in one place, at one token as
// at 64. The caller gives each thread its own rows of the delta: no race. Sums are in float32 (float64 for float64),
// entry after entry of a row, so a token's result is the same bits in any block, with any number of threads.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace shira::SHIRA_ISA {

// The sums of one row, for all tokens of the panel.
template <int kTokens, class S, class V, class Col>
inline void row_sums(const S* panel, const Col* col, const V* values, int64_t count, S* sums) {
  constexpr int W = kTokens < kLanes<S> ? kTokens : kLanes<S>, N = kTokens / W;
  using Sums = Lanes<S, W>;
  Sums added[N] = {};
  for (int64_t e = 0; e < count; ++e) {
    const S* x = panel + static_cast<int64_t>(col[e]) * kTokens;
    const Sums value = static_cast<S>(widen(values[e])) - Sums{};
    for (int k = 0; k < N; ++k) added[k] = add_product(added[k], value, load<Sums>(x + k * W));
  }
  memcpy(sums, added, sizeof(added));
}

template <int N, class T>
inline void write_sums(T* out, Lanes<typename Compute<T>::type, N> sums, bool accumulate) {
  store_narrowed<N>(accumulate ? widened<N>(out) + sums : sums, out);
}

// Panels of kTokens tokens. Rows go by squares of kRows rows and as many tokens, which are transposed to be written.
template <class T, class V, class Col, int kTokens>
struct DeltaPanel {
  using S = typename Compute<T>::type;
  static constexpr int kFull = kLanes<S>;
  static constexpr int kSquare = kTokens < kFull ? kTokens : kFull;
  static constexpr int kRows = kTokens == 1 ? kFull : kSquare;

  static void pack(const TokenBlock& block, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(block.x);
    S* panel = static_cast<S*>(block.panel);
    // Tokens beyond the last are the last again: their sums are not used.
    const auto row = [&](int64_t t) { return x + block.tokens[t < block.count ? t : block.count - 1] * block.columns; };
    for (int t = 0; t < kTokens; t += kSquare) {
      int64_t c = begin;
      for (; c + kSquare <= end; c += kSquare)
        copy_square<kSquare>([&](int i) { return row(t + i) + c; }, panel + c * kTokens + t, kTokens);
      for (; c < end; ++c)
        for (int i = 0; i < kSquare; ++i) panel[c * kTokens + t + i] = widen(row(t + i)[c]);
    }
  }

  // Writes `rows` rows' sums of token t, which are `stride` apart, from row `first` on.
  static void write_some(const TokenBlock& block, const CsrRows& rows, int64_t first, int64_t count, const S* sums) {
    for (int64_t t = 0; t < block.count; ++t) {
      T* out = static_cast<T*>(block.out) + block.tokens[t] * block.rows + first;
      for (int64_t i = 0; i < count; ++i)
        if (!block.accumulate || rows.border(first + i) < rows.border(first + i + 1))
          write_sums<1>(out + i, sums[i * kTokens + t], block.accumulate);
    }
  }

  static void write_all(const TokenBlock& block, int64_t first, const S* sums) {
    T* out = static_cast<T*>(block.out) + first;
    if constexpr (kTokens == 1) {
      write_sums<kRows>(out + block.tokens[0] * block.rows, load<Lanes<S, kRows>>(sums), block.accumulate);
    } else {
      for (int64_t t = 0; t < block.count; t += kSquare) {
        Lanes<S, kSquare> square[kSquare];
        for (int i = 0; i < kSquare; ++i) square[i] = load<Lanes<S, kSquare>>(sums + i * kTokens + t);
        transpose<1>(square);
        for (int i = 0; i < kSquare && t + i < block.count; ++i)
          write_sums<kSquare>(out + block.tokens[t + i] * block.rows, square[i], block.accumulate);
      }
    }
  }

  static void run(const TokenBlock& block, const CsrRows& rows, const void* values) {
    const S* panel = static_cast<const S*>(block.panel);
    const Col* col = static_cast<const Col*>(rows.col) + rows.shift;
    const V* value = static_cast<const V*>(values) + rows.shift;
    alignas(64) S sums[kRows * kTokens];
    int64_t begin = rows.border(rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row += kRows) {
      const int64_t count = rows.end - row < kRows ? rows.end - row : kRows;
      bool all = count == kRows;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t end = rows.border(row + i + 1);
        row_sums<kTokens>(panel, col + begin, value + begin, end - begin, sums + i * kTokens);
        all &= begin < end || !block.accumulate;
        begin = end;
      }
      if (all)
        write_all(block, row, sums);
      else
        write_some(block, rows, row, count, sums);
    }
  }

  static constexpr SparseDeltaMm kernel() { return {pack, run, kTokens, sizeof(S)}; }
};

constexpr int64_t kDeltaPanelBytes = 3 << 19;  // no wider panel than stays in a second cache of 2 MB beside the entries

template <class T, class V, class Col>
SparseDeltaMm delta_panel_of(int64_t columns, int64_t tokens) {
  using S = typename Compute<T>::type;
  const auto fits = [&](int64_t width) {
    return columns * width * static_cast<int64_t>(sizeof(S)) <= kDeltaPanelBytes;
  };
  if (tokens > 32 && fits(64)) return DeltaPanel<T, V, Col, 64>::kernel();
  if (tokens > 16 && fits(32)) return DeltaPanel<T, V, Col, 32>::kernel();
  if (tokens > 8) return DeltaPanel<T, V, Col, 16>::kernel();
  if (tokens > 4) return DeltaPanel<T, V, Col, 8>::kernel();
  if (tokens > 1) return DeltaPanel<T, V, Col, 4>::kernel();
  return DeltaPanel<T, V, Col, 1>::kernel();
}

template <class T>
SparseDeltaMm choose_delta_values(Element own, Element value, bool wide_col, int64_t columns, int64_t tokens) {
  if constexpr (!std::is_same_v<T, typename Compute<T>::type>) {
    if (value != own)
      return wide_col ? delta_panel_of<T, float, int32_t>(columns, tokens)
                      : delta_panel_of<T, float, uint16_t>(columns, tokens);
  }
  return wide_col ? delta_panel_of<T, T, int32_t>(columns, tokens) : delta_panel_of<T, T, uint16_t>(columns, tokens);
}

inline SparseDeltaMm choose_sparse_delta_mm(Element x, Element value, bool wide_col, int64_t columns, int64_t tokens) {
  switch (x) {
    case Element::Float64: return choose_delta_values<double>(x, value, wide_col, columns, tokens);
    case Element::Float32: return choose_delta_values<float>(x, value, wide_col, columns, tokens);
    case Element::BFloat16: return choose_delta_values<BFloat16>(x, value, wide_col, columns, tokens);
    case Element::Float16: return choose_delta_values<Half>(x, value, wide_col, columns, tokens);
    default: return {};
  }
}

}  // namespace shira::SHIRA_ISA
