// sparse_delta_mm of a token that is alone with its adapter (decoding), for one instruction set.
//
//   sums[r] = sum over entries e of row r of x[col[e]] * values[e]
//
// Shapes: x [columns], sums [rows]. Its caller gives each thread its own rows: no race. Products and sums are in
// float32 (float64 for float64): entry i of a row goes to lane i % lanes, lanes then go halves first, so a sum is the
// same bits with any number of threads, in pages or not. The sum of a row without entries is -0, which no other sum
// is.
//
// Entries are read once, since they come from memory: their columns are checked with the sums, which the caller adds to
// an output when all are known to fit. Products are formed of as many entries as a vector holds, over the borders of
// rows, and are summed by rows from the first cache; rows of up to 64 entries go 16 at a time without a branch that
// depends on the length of one.
//
// What was measured (1024 x 1024, 1.4 %, one thread, AVX-512), in the time of the gathers alone: 1.9 in cache, and 1.3
// where entries come from memory, for reading these takes as long as the gathers. A gather for each row, which leaves
// lanes idle, and a check in a pass of its own took 2.2 and 1.8, and an adapter in pages, cut into pieces, a third
// more.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace shira::SHIRA_ISA {

constexpr int64_t kEntriesAhead = 1024;  // of a prefetch: the processor's own stops at pages of 4 KB
constexpr int64_t kProducts = 1024;      // formed at a time

// Lane i becomes the sum of the lanes of row(i): halves first, then quarters, and so on. A row is asked for when it is
// needed, so that few are held in registers.
template <int S, int i, class V, class Row>
[[gnu::always_inline]] inline V sums_of_lanes(const Row& row) {
  constexpr int N = sizeof(V) / sizeof(V{}[0]);
  if constexpr (S == N) {
    return row(i);
  } else {
    V a = sums_of_lanes<2 * S, i, V>(row), b = sums_of_lanes<2 * S, i + S, V>(row);
    exchange<S>(a, b, std::make_index_sequence<N>());
    return a + b;
  }
}

// What a check of columns needs to know: how often one does not rise over the one before, and which is the largest.
struct ColumnFacts {
  int64_t falls;
  uint32_t largest;
};

// products[e] = x[col[e]] * value[e]; x is read in its columns only, of which there is one at least.
template <class S, class V, class Col>
ColumnFacts form_products(const S* x, int64_t columns, const Col* col, const V* value, int64_t count, S* products) {
  // No int32 is larger, also of more columns: what is, was negative.
  const auto last = static_cast<uint32_t>(columns <= int64_t{1} << 31 ? columns - 1 : INT32_MAX);
#if SHIRA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>) {
    constexpr int N = 16;
    __m512i largest = _mm512_setzero_si512();
    const __m512i limit = _mm512_set1_epi32(static_cast<int32_t>(last));
    int64_t falls = 0;
    const auto form = [&](int64_t e, __mmask16 in, __mmask16 follows) {
      __builtin_prefetch(col + e + kEntriesAhead);
      __builtin_prefetch(value + e + kEntriesAhead);
      __m512i at;
      if constexpr (sizeof(Col) == 2) {
        const __m256i own = _mm256_maskz_loadu_epi16(in, col + e),
                      before = _mm256_maskz_loadu_epi16(follows, col + e - 1);
        falls += __builtin_popcount(_mm256_mask_cmple_epu16_mask(follows, own, before));
        at = (__m512i)zero_extended<N>((Lanes<uint16_t, N>)own);
      } else {
        at = _mm512_maskz_loadu_epi32(in, col + e);
        falls += __builtin_popcount(
            _mm512_mask_cmple_epu32_mask(follows, at, _mm512_maskz_loadu_epi32(follows, col + e - 1)));
      }
      largest = _mm512_maskz_max_epu32(0xffff, largest, at);
      at = _mm512_maskz_min_epu32(0xffff, at, limit);
      __m512 number;
      if constexpr (std::is_same_v<V, float>)
        number = _mm512_maskz_loadu_ps(in, value + e);
      else if constexpr (std::is_same_v<V, BFloat16>)
        number = (__m512)(zero_extended<N>((Lanes<uint16_t, N>)_mm256_maskz_loadu_epi16(in, value + e)) << 16);
      else
        number = _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(in, value + e));
      const __m512 product = number * _mm512_mask_i32gather_ps(__m512{}, in, at, x, sizeof(S));
      memcpy(products + e, &product, sizeof(product));
    };
    const auto first = [](int64_t k) { return static_cast<__mmask16>(k < N ? (1u << k) - 1 : 0xffff); };
    if (count > 0) form(0, first(count), first(count) & ~1u);
    int64_t e = N;
    for (; e + N <= count; e += N) form(e, 0xffff, 0xffff);
    if (e < count) form(e, first(count - e), first(count - e));
    uint32_t all[N], most = 0;
    memcpy(all, &largest, sizeof(all));
    for (int i = 0; i < N; ++i) most = all[i] > most ? all[i] : most;
    return {falls, most};
  }
#endif
  constexpr int N = kLanes<S>;
  Col falls = 0, largest = 0;  // count is at most kProducts
  for (int64_t e = 1; e < count; ++e) falls += col[e] <= col[e - 1];
  for (int64_t e = 0; e < count; ++e) largest = col[e] > largest ? col[e] : largest;
  if (largest > last) {
    memset(products, 0, static_cast<size_t>(count) * sizeof(S));
    return {falls, largest};
  }
  int64_t e = 0;
  for (; e + N <= count; e += N) {
    __builtin_prefetch(col + e + kEntriesAhead);
    __builtin_prefetch(value + e + kEntriesAhead);
    S gathered[N];
    for (int i = 0; i < N; ++i) gathered[i] = x[col[e + i]];
    const Vector<S> product = load<Vector<S>>(gathered) * widened<N>(value + e);
    memcpy(products + e, &product, sizeof(product));
  }
  for (; e < count; ++e) products[e] = x[col[e]] * static_cast<S>(widen(value[e]));
  return {falls, largest};
}

// Adds neighbouring products to lanes, of which kVectors hold them; 0: so many as needed.
template <int kVectors, class S>
inline Vector<S> add_lanes(Vector<S> added, const S* products, int64_t count) {
  constexpr int N = kLanes<S>;
#if SHIRA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float> && kVectors > 0) {
    const uint64_t in = _bzhi_u64(~uint64_t{0}, static_cast<uint32_t>(count));
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k)
      added = added + (Vector<S>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(in >> (k * N)), products + k * N);
    return added;
  }
#endif
  int64_t e = 0;
  for (; e + N <= count; e += N) added = added + load<Vector<S>>(products + e);
  S last[N] = {};
  for (int i = 0; e + i < count; ++i) last[i] = products[e + i];
  return added + load<Vector<S>>(last);
}

// The sums of rows whose products begin at the offsets, each of them at most kVectors.
template <int kVectors, class S, int N>
inline Vector<S> sums_of_rows(const S* products, const int32_t (&offsets)[N]) {
  return sums_of_lanes<1, 0, Vector<S>>(
      [&](int i) { return add_lanes<kVectors>(Vector<S>{}, products + offsets[i], offsets[i + 1] - offsets[i]); });
}

// Entries of an adapter that lie side by side, if need be in copies.
template <class V, class Col>
struct NeighbouringEntries {
  const Col* col;
  const V* values;
  alignas(64) Col cols_of_pages[kProducts];
  alignas(64) V values_of_pages[kProducts];

  void take(const DeltaEntries& entries, int64_t begin, int64_t end) {
    const auto* all_cols = static_cast<const Col*>(entries.rows.col);
    const auto* all_values = static_cast<const V*>(entries.values);
    const int64_t size = entries.page_size;
    const auto place = [&](int64_t e) { return entries.page_of ? entries.page_of[e / size] * size + e % size : e; };
    if (entries.page_of && begin < end && (end - 1) / size > begin / size) {
      for (int64_t e = begin; e < end;) {
        const int64_t page_end = (e / size + 1) * size, stop = page_end < end ? page_end : end, at = place(e);
        memcpy(cols_of_pages + (e - begin), all_cols + at, static_cast<size_t>(stop - e) * sizeof(Col));
        memcpy(values_of_pages + (e - begin), all_values + at, static_cast<size_t>(stop - e) * sizeof(V));
        e = stop;
      }
      col = cols_of_pages;
      values = values_of_pages;
    } else {
      const int64_t at = begin < end ? place(begin) : 0;
      col = all_cols + at;
      values = all_values + at;
    }
  }
};

// Where each of `count` rows begins, and the last ends, from where the first does; the others have no entries.
template <class Index, int N>
inline void offsets_of(const Index* borders, int64_t count, int32_t (&offsets)[N]) {
  if (count >= N - 1)
    for (int i = 0; i < N; ++i) offsets[i] = static_cast<int32_t>(borders[i] - borders[0]);
  else
    for (int i = 0; i < N; ++i) offsets[i] = static_cast<int32_t>(borders[i < count ? i : count] - borders[0]);
}

// The sums of rows [begin, end), and whether their columns fit: sorted and unique in each row, in [0, columns).
template <class S, class V, class Col>
class TokenSums {
 public:
  TokenSums(const S* x, const DeltaEntries& entries) : x_(x), entries_(entries) {}

  bool form(int64_t begin, int64_t end, S* sums) {
    const CsrRows& rows = entries_.rows;
    for (int64_t row = begin; row < end; row += N) {
      const int64_t count = end - row < N ? end - row : N, first = rows.border(row);
      Vector<S> added;
      bool some_empty = true;
      if (rows.border(row + count) - first > kProducts) {
        added = sums_of_lanes<1, 0, Vector<S>>(
            [&](int i) { return i < count ? long_row(rows.border(row + i), rows.border(row + i + 1)) : Vector<S>{}; });
      } else {
        int32_t offsets[N + 1];
        if (rows.wide_row_ptr)
          offsets_of(static_cast<const int64_t*>(rows.row_ptr) + row, count, offsets);
        else
          offsets_of(static_cast<const int32_t*>(rows.row_ptr) + row, count, offsets);
        added = short_rows(first, offsets, some_empty);
      }
      memcpy(sums + row, &added, sizeof(added));
      for (int64_t i = row; some_empty && i < row + count; ++i)
        if (rows.border(i) == rows.border(i + 1)) sums[i] = -S{};
    }
    return fit_;
  }

 private:
  static constexpr int N = kLanes<S>;

  // some_empty: whether there are rows without entries.
  Vector<S> short_rows(int64_t first, const int32_t (&offsets)[N + 1], bool& some_empty) {
    taken_.take(entries_, first, first + offsets[N]);
    int64_t falls = form_products(offsets[N]);
    for (int i = 1; i < N; ++i)  // where a row begins they may fall
      if (const int32_t at = offsets[i]; at > 0 && at < offsets[i + 1]) falls -= taken_.col[at] <= taken_.col[at - 1];
    fit_ &= falls == 0;
    int32_t most = 0, least = kProducts;
    for (int i = 0; i < N; ++i) {
      const int32_t count = offsets[i + 1] - offsets[i];
      most = count > most ? count : most;
      least = count < least ? count : least;
    }
    some_empty = least == 0;
    if (most <= N) return sums_of_rows<1>(products_, offsets);
    if (most <= 2 * N) return sums_of_rows<2>(products_, offsets);
    if (most <= 3 * N) return sums_of_rows<3>(products_, offsets);
    if (most <= 4 * N) return sums_of_rows<4>(products_, offsets);
    return sums_of_rows<0>(products_, offsets);
  }

  Vector<S> long_row(int64_t begin, int64_t end) {
    Vector<S> lanes{};
    Col before = 0;
    for (int64_t e = begin; e < end; e += kProducts) {
      const int64_t count = end - e < kProducts ? end - e : kProducts;
      taken_.take(entries_, e, e + count);
      const int64_t falls = form_products(count);
      fit_ &= falls == 0 && (e == begin || taken_.col[0] > before);
      before = taken_.col[count - 1];
      lanes = add_lanes<0>(lanes, products_, count);
    }
    return lanes;
  }

  int64_t form_products(int64_t count) {
    const int64_t columns = entries_.rows.columns;
    const ColumnFacts facts = SHIRA_ISA::form_products(x_, columns, taken_.col, taken_.values, count, products_);
    fit_ &= facts.largest < (columns < int64_t{1} << 31 ? columns : int64_t{1} << 31);
    return facts.falls;
  }

  const S* x_;
  const DeltaEntries& entries_;
  bool fit_ = true;
  NeighbouringEntries<V, Col> taken_;
  alignas(64) S products_[kProducts + N];  // a vector of a row may end beyond what there is
};

template <class S, class V, class Col>
bool token_sums(const void* x, const DeltaEntries& entries, int64_t begin, int64_t end, void* sums) {
  if (entries.rows.columns == 0) {
    for (int64_t row = begin; row < end; ++row) static_cast<S*>(sums)[row] = -S{};
    return entries.rows.border(begin) == entries.rows.border(end);
  }
  TokenSums<S, V, std::make_unsigned_t<Col>> all(static_cast<const S*>(x), entries);
  return all.form(begin, end, static_cast<S*>(sums));
}

template <class T>
void widen_token(const void* x, int64_t count, void* to) {
  using S = typename Compute<T>::type;
  for (int64_t i = 0; i < count; ++i) static_cast<S*>(to)[i] = widen(static_cast<const T*>(x)[i]);
}

// What a row without entries has in out keeps its bits: adding would make a signalling NaN a quiet one.
template <class T>
void write_token(const void* sums, int64_t count, bool accumulate, void* out) {
  using S = typename Compute<T>::type;
  using Bits = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
  constexpr int N = kLanes<S>;
  const S* from = static_cast<const S*>(sums);
  T* to = static_cast<T*>(out);
  const auto is_empty = [&](int64_t i) { return load<Bits>(from + i) == Bits{1} << (8 * sizeof(S) - 1); };
  const auto write = [&](auto lanes, int64_t i) {
    constexpr int kCount = decltype(lanes)::value;
    const auto sum = load<Lanes<S, kCount>>(from + i);
    store_narrowed<kCount>(accumulate ? widened<kCount>(to + i) + sum : sum + S{}, to + i);
  };
  int64_t row = 0;
  for (; row + N <= count; row += N) {
    bool some_empty = false;
    for (int i = 0; i < N; ++i) some_empty |= is_empty(row + i);
    if (accumulate && some_empty)
      for (int i = 0; i < N; ++i) {
        if (!is_empty(row + i)) write(std::integral_constant<int, 1>(), row + i);
      }
    else
      write(std::integral_constant<int, N>(), row);
  }
  for (; row < count; ++row)
    if (!accumulate || !is_empty(row)) write(std::integral_constant<int, 1>(), row);
}

template <class T, class V>
SparseDeltaToken token_of_values(bool wide_col) {
  using S = typename Compute<T>::type;
  return {std::is_same_v<T, S> ? nullptr : widen_token<T>,
          wide_col ? token_sums<S, V, int32_t> : token_sums<S, V, uint16_t>, write_token<T>, sizeof(S)};
}

template <class T>
SparseDeltaToken token_of(Element own, Element value, bool wide_col) {
  if constexpr (!std::is_same_v<T, typename Compute<T>::type>)
    if (value != own) return token_of_values<T, float>(wide_col);
  return token_of_values<T, T>(wide_col);
}

inline SparseDeltaToken choose_sparse_delta_token(Element x, Element value, bool wide_col) {
  switch (x) {
    case Element::Float64: return token_of<double>(x, value, wide_col);
    case Element::Float32: return token_of<float>(x, value, wide_col);
    case Element::BFloat16: return token_of<BFloat16>(x, value, wide_col);
    case Element::Float16: return token_of<Half>(x, value, wide_col);
    default: return {};
  }
}

}  // namespace shira::SHIRA_ISA
