// sparse_delta_mm and its in-place and batched forms, over one block of tokens of one adapter, for one instruction set.
//
//   sum[t, r] = sum over entries e of row r of x[t, col[e]] * values[e];   out[t, r] <- sum | out[t, r] + sum
//
// Shapes: x [.., columns] and out [.., rows], of which the block's tokens are rows. Its x is packed into a panel
// [columns][kTokens], so that an entry is one number times a short vector that lies in one place, at 4 tokens as at
// 64. The caller gives each thread its own rows of the delta: no race. Sums are in float32 (float64 for float64), entry
// after entry of a row, so a token's result is the same bits with any number of threads, and in any block. A token that
// is alone with its adapter goes another way: sparse_delta_token_kernel.h.
// NOTES.md says what was measured and tried.
#pragma once

#include "sparse_delta_types.h"
#include "vectors.h"

namespace shira::SHIRA_ISA {

// Wide panels of bfloat16 keep it, as vectors of packed numbers: half the bytes that come from the second cache.
template <class T, int kTokens>
constexpr bool kPacked = std::is_same_v<T, BFloat16> && SHIRA_VECTOR_BYTES == 64 && kTokens >= 2 * kLanes<float>;

template <int kTokens, class V, class Col>
inline void row_sums(const BFloat16* panel, const Col* col, const V* values, int64_t count, float* sums) {
  constexpr int W = kLanes<float>, N = kTokens / (2 * W);
  Vector<float> added[2 * N] = {};
  for (int64_t e = 0; e < count; ++e) {
    const BFloat16* x = panel + static_cast<int64_t>(col[e]) * kTokens;
    Vector<float> value;
    if constexpr (std::is_same_v<V, BFloat16>)  // spread from a general register, which takes a shuffle less
      value = (Vector<float>)((uint32_t{values[e].bits} << 16) - Lanes<uint32_t, W>{});
    else
      value = values[e] - Vector<float>{};
    for (int k = 0; k < N; ++k) {
      auto numbers = load<Vector<BFloat16>>(x + k * 2 * W);
      asm("" : "+v"(numbers));  // else compilers load them for each half, and the second cache's time is what counts
      added[2 * k] = add_product(added[2 * k], value, unpacked<0>(numbers));
      added[2 * k + 1] = add_product(added[2 * k + 1], value, unpacked<1>(numbers));
    }
  }
  memcpy(sums, added, sizeof(added));
}

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

// What a panel of kTokens tokens has to do with x and out. Sums go by squares of as many rows as tokens, at most what
// fills vectors, and are transposed to be written: at 16 tokens and more, whole memory lines of out at a time.
template <class T, int kTokens>
struct PanelEnds {
  using S = typename Compute<T>::type;
  static constexpr int kSquare = kTokens < kLanes<S> ? kTokens : kLanes<S>;
  static constexpr int kRows = kSquare * static_cast<int>(sizeof(S) / sizeof(T));

  using Number = std::conditional_t<kPacked<T, kTokens>, T, S>;  // of the panel

  static void pack(const TokenBlock& block, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(block.x);
    auto* panel = static_cast<Number*>(block.panel);
    // Tokens beyond the last are the last again: their sums are not used.
    const auto row = [&](int64_t t) { return x + block.tokens[t < block.count ? t : block.count - 1] * block.columns; };
    if constexpr (kPacked<T, kTokens>) {
      constexpr int W = 2 * kSquare;
      for (int t = 0; t < kTokens; t += W) {
        int64_t c = begin;
        for (; c + W <= end; c += W)
          copy_square_packed([&](int i) { return row(t + i) + c; }, panel + c * kTokens + t, kTokens);
        for (; c < end; ++c)
          for (int i = 0; i < W; ++i) panel[c * kTokens + t + packed_place(i)] = row(t + i)[c];
      }
    } else {
      for (int t = 0; t < kTokens; t += kSquare) {
        int64_t c = begin;
        if constexpr (std::is_same_v<T, BFloat16>)
          for (; c + 2 * kSquare <= end; c += 2 * kSquare)
            copy_square_of_pairs<kSquare>([&](int i) { return row(t + i) + c; }, panel + c * kTokens + t, kTokens);
        for (; c + kSquare <= end; c += kSquare)
          copy_square<kSquare>([&](int i) { return row(t + i) + c; }, panel + c * kTokens + t, kTokens);
        for (; c < end; ++c)
          for (int i = 0; i < kSquare; ++i) panel[c * kTokens + t + i] = widen(row(t + i)[c]);
      }
    }
  }

  static T* out_of(const TokenBlock& block, int64_t t, int64_t row) {
    return static_cast<T*>(block.out) + block.tokens[t] * block.rows + row;
  }

  // When row i of those from `row` on is done: a share of the memory lines that the next kRows will be written to.
  static void prefetch(const TokenBlock& block, int64_t row, int64_t i) {
    for (int64_t t = i * kTokens / kRows; t < (i + 1) * kTokens / kRows && t < block.count; ++t)
      __builtin_prefetch(out_of(block, t, row + kRows), 1);
  }

  template <int N>
  static void write(T* out, Lanes<S, N> sums, bool accumulate) {
    store_narrowed<N>(accumulate ? widened<N>(out) + sums : sums, out);
  }

  // Some rows from `row` on: fewer than kRows, or such without entries among them.
  static void write_some(const TokenBlock& block, const CsrRows& rows, int64_t row, int64_t count, const S* sums) {
    for (int64_t t = 0; t < block.count; ++t)
      for (int64_t i = 0; i < count; ++i)
        if (!block.accumulate || rows.border(row + i) < rows.border(row + i + 1))
          write<1>(out_of(block, t, row + i), sums[i * kTokens + t], block.accumulate);
  }

  static void write_all(const TokenBlock& block, int64_t row, const S* sums) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      // Two rows' numbers of a token are 32 bits of out: the even rows are transposed, and the odd ones, and nothing is
      // shuffled to widen and to narrow.
      using Pairs = Lanes<uint32_t, kSquare>;
      for (int64_t t = 0; t < block.count; t += kSquare) {
        const int64_t count = block.count - t < kSquare ? block.count - t : kSquare;
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(out_of(block, t + i, row), 1);
        Lanes<S, kSquare> even[kSquare], odd[kSquare];
        for (int i = 0; i < kSquare; ++i) even[i] = load<Lanes<S, kSquare>>(sums + 2 * i * kTokens + t);
        transpose<1>(even);
        for (int i = 0; i < kSquare; ++i) odd[i] = load<Lanes<S, kSquare>>(sums + (2 * i + 1) * kTokens + t);
        transpose<1>(odd);
        for (int64_t i = 0; i < count; ++i) {
          T* out = out_of(block, t + i, row);
          if (block.accumulate) {
            const auto old = load<Pairs>(out);
            even[i] = (Lanes<S, kSquare>)(old << 16) + even[i];
            odd[i] = (Lanes<S, kSquare>)(old & 0xffff0000u) + odd[i];
          }
          const Pairs kept =
              rounded_to_bfloat16<kSquare>(even[i]) >> 16 | (rounded_to_bfloat16<kSquare>(odd[i]) & 0xffff0000u);
          memcpy(out, &kept, sizeof(kept));
        }
      }
    } else {
      for (int64_t t = 0; t < block.count; t += kSquare) {
        const int64_t count = block.count - t < kSquare ? block.count - t : kSquare;
        // The panel has driven them out of the first cache since.
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(out_of(block, t + i, row), 1);
        for (int64_t r = 0; r < kRows; r += kSquare) {
          Lanes<S, kSquare> square[kSquare];
          for (int i = 0; i < kSquare; ++i) square[i] = load<Lanes<S, kSquare>>(sums + (r + i) * kTokens + t);
          transpose<1>(square);
          for (int64_t i = 0; i < count; ++i)
            write<kSquare>(out_of(block, t + i, row + r), square[i], block.accumulate);
        }
      }
    }
  }
};

template <class T, class V, class Col, int kTokens>
void run_panel(const TokenBlock& block, const CsrRows& rows, const void* values) {
  using Ends = PanelEnds<T, kTokens>;
  using S = typename Ends::S;
  constexpr int kRows = Ends::kRows;
  const auto* panel = static_cast<const typename Ends::Number*>(block.panel);
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
      if (all) Ends::prefetch(block, row, i);
      all &= begin < end || !block.accumulate;
      begin = end;
    }
    if (all)
      Ends::write_all(block, row, sums);
    else
      Ends::write_some(block, rows, row, count, sums);
  }
}

template <class T, class V, class Col, int kTokens>
constexpr SparseDeltaMm delta_panel() {
  using Ends = PanelEnds<T, kTokens>;
  return {Ends::pack, run_panel<T, V, Col, kTokens>, kTokens, sizeof(typename Ends::Number)};
}

constexpr int64_t kDeltaPanelBytes = 3 << 19;  // no wider panel than stays in a second cache of 2 MB beside the entries

template <class T, class V, class Col>
SparseDeltaMm delta_panel_of(int64_t columns, int64_t tokens) {
  const auto fits = [&](const SparseDeltaMm& kernel) {
    return columns * kernel.tokens * kernel.token_bytes <= kDeltaPanelBytes;
  };
  constexpr SparseDeltaMm of_64 = delta_panel<T, V, Col, 64>(), of_32 = delta_panel<T, V, Col, 32>();
  if (tokens > 32 && fits(of_64)) return of_64;
  if (tokens > 16 && fits(of_32)) return of_32;
  if (tokens > 8) return delta_panel<T, V, Col, 16>();
  if (tokens > 4) return delta_panel<T, V, Col, 8>();
  return delta_panel<T, V, Col, 4>();
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
