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
// rows, for as many rows as have theirs in the first cache together, and are summed by rows from there; rows of up to
// 64 entries go 16 at a time without a branch that depends on the length of one.
// NOTES.md says what was measured.
#pragma once

#include "sparse_delta_types.h"
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
template <class Col>
struct ColumnFacts {
  int64_t falls;
  Col largest;
};

// Gathers the facts of at most kProducts columns.
template <class Col>
inline ColumnFacts<Col> facts_of(const Col* col, int64_t count) {
  constexpr int N = kLanes<Col>;
  using Cols = Lanes<Col, N>;
  Cols falls{}, largest{};
  int64_t e = 0;
  for (; e + N < count; e += N) {
    const auto before = load<Cols>(col + e), own = load<Cols>(col + e + 1);
    falls -= (Cols)(own <= before);
    largest = before > largest ? before : largest;
  }
  Col count_of_falls = 0, largest_of_all = 0;
  for (int i = 0; i < N; ++i) {
    count_of_falls += falls[i];
    largest_of_all = largest[i] > largest_of_all ? largest[i] : largest_of_all;
  }
  ColumnFacts<Col> all{count_of_falls, largest_of_all};
  for (int64_t tail = e; e < count; ++e) {
    all.falls += e > tail && col[e] <= col[e - 1];
    all.largest = col[e] > all.largest ? col[e] : all.largest;
  }
  return all;
}

// Entries of an adapter that lie side by side.
template <class V, class Col>
struct Entries {
  const Col* col;
  const V* values;
};

// products[e] = x[col[e]] * value[e], and prefetches of what will be needed later.
template <class S, class V, class Col>
inline void form_products(const S* x, Entries<V, Col> now, Entries<V, Col> later, int64_t count, S* products) {
  constexpr int N = kLanes<S>;
  int64_t e = 0;
#if SHIRA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<S, float>) {
    const auto form = [&](__mmask16 in) {
      __builtin_prefetch(later.col + e);
      __builtin_prefetch(later.values + e);
      __m512i at;
      if constexpr (sizeof(Col) == 2)
        at = (__m512i)zero_extended<N>((Lanes<uint16_t, N>)_mm256_maskz_loadu_epi16(in, now.col + e));
      else
        at = _mm512_maskz_loadu_epi32(in, now.col + e);
      __m512 number;
      if constexpr (std::is_same_v<V, float>)
        number = _mm512_maskz_loadu_ps(in, now.values + e);
      else if constexpr (std::is_same_v<V, BFloat16>)
        number = (__m512)(zero_extended<N>((Lanes<uint16_t, N>)_mm256_maskz_loadu_epi16(in, now.values + e)) << 16);
      else
        number = _mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(in, now.values + e));
      const __m512 product = number * _mm512_mask_i32gather_ps(__m512{}, in, at, x, sizeof(S));
      memcpy(products + e, &product, sizeof(product));
    };
    for (; e + N <= count; e += N) form(0xffff);
    if (e < count) form(static_cast<__mmask16>((1u << (count - e)) - 1));
    return;
  }
#endif
  for (; e + N <= count; e += N) {
    __builtin_prefetch(later.col + e);
    __builtin_prefetch(later.values + e);
    S gathered[N];
    for (int i = 0; i < N; ++i) gathered[i] = x[now.col[e + i]];
    const Vector<S> product = load<Vector<S>>(gathered) * widened<N>(now.values + e);
    memcpy(products + e, &product, sizeof(product));
  }
  for (; e < count; ++e) products[e] = x[now.col[e]] * static_cast<S>(widen(now.values[e]));
}

// Adds neighbouring products to lanes. A vector of what lies behind the last one is read, too.
template <class S>
inline Vector<S> add_lanes(Vector<S> added, const S* products, int64_t count) {
  constexpr int N = kLanes<S>;
  using Number = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  static constexpr Number kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int64_t e = 0;
  for (; e + N <= count; e += N) added = added + load<Vector<S>>(products + e);
  const Lanes<Number, N> in = load<Lanes<Number, N>>(kLane) < static_cast<Number>(count - e);
  return added + (Vector<S>)((Lanes<Number, N>)load<Vector<S>>(products + e) & in);
}

// Neighbouring rows: where the entries of each begin among those of all, and how many there are.
template <int N>
struct RowSpans {
  alignas(64) int32_t begin[N];
  alignas(64) int32_t count[N];

  // Reads `rows` rows, whose first entry is `first` or later; the others have no entries.
  template <class Index>
  RowSpans(const Index* borders, int64_t rows, int64_t first) {
    Index filled[N + 1];
    if (rows < N) {
      for (int i = 0; i <= N; ++i) filled[i] = borders[i < rows ? i : rows];
      borders = filled;
    }
    if constexpr (N * sizeof(Index) <= SHIRA_VECTOR_BYTES) {
      using Borders = Lanes<Index, N>;
      const auto from = load<Borders>(borders), to = load<Borders>(borders + 1);
      store(from - static_cast<Index>(first), begin);
      store(to - from, count);
    } else {
      for (int i = 0; i < N; ++i) begin[i] = static_cast<int32_t>(borders[i] - first);
      for (int i = 0; i < N; ++i) count[i] = static_cast<int32_t>(borders[i + 1] - borders[i]);
    }
    asm("" : "+m"(begin), "+m"(count));  // compilers would take the vectors apart rather than load a number
  }

 private:
  template <class Numbers>
  static void store(Numbers numbers, int32_t (&to)[N]) {
    const auto narrow = __builtin_convertvector(numbers, Lanes<int32_t, N>);
    memcpy(to, &narrow, sizeof(to));
  }
};

// How often a row's first column does not rise over the last of the row before.
template <class Col, int N>
inline int64_t falls_between(const Col* col, const RowSpans<N>& rows) {
  int64_t falls = 0;
#if SHIRA_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    const __m512i begin = _mm512_load_si512(rows.begin);
    const __mmask16 in =
        _mm512_test_epi32_mask(begin, begin) & _mm512_cmpgt_epi32_mask(_mm512_load_si512(rows.count), __m512i{});
    const auto gathered = [&](int64_t shift) {
      return _mm512_mask_i32gather_epi32(__m512i{}, in, begin, reinterpret_cast<const char*>(col) + shift, sizeof(Col));
    };
    if constexpr (sizeof(Col) == 2) {  // both at once
      const __m512i two = gathered(-2);
      return __builtin_popcount(
          _mm512_mask_cmple_epu32_mask(in, _mm512_maskz_srli_epi32(0xffff, two, 16), two & _mm512_set1_epi32(0xffff)));
    } else {
      return __builtin_popcount(_mm512_mask_cmple_epu32_mask(in, gathered(0), gathered(-4)));
    }
  }
#endif
  for (int i = 0; i < N; ++i)
    if (const int32_t at = rows.begin[i]; at > 0 && rows.count[i] > 0) falls += col[at] <= col[at - 1];
  return falls;
}

#if SHIRA_VECTOR_BYTES == 64
// Sums of rows of at most 16 kVectors products.
template <int kVectors>
inline __m512 sums_of_short_rows(const float* products, const RowSpans<16>& rows) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i count = _mm512_set1_epi32(rows.count[i]);
    const float* own = products + rows.begin[i];
    sums[i] = _mm512_maskz_loadu_ps(_mm512_cmplt_epi32_mask(lane, count), own);
#pragma GCC unroll 4
    for (int k = 1; k < kVectors; ++k) {
      const __m512i own_lane = lane + _mm512_set1_epi32(16 * k);
      sums[i] += _mm512_maskz_loadu_ps(_mm512_cmplt_epi32_mask(own_lane, count), own + 16 * k);
    }
  }
  // Halves, quarters, pairs of lanes, and single ones, as sums_of_lanes has them.
  constexpr __mmask16 kAll = 0xffff;  // without a mask, compilers warn of what the intrinsics do
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = sums[i + i / 4 * 4], b = sums[i + i / 4 * 4 + 4];
    sums[i] = _mm512_maskz_shuffle_f32x4(kAll, a, b, 0x44) + _mm512_maskz_shuffle_f32x4(kAll, a, b, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    sums[i] = _mm512_maskz_shuffle_f32x4(kAll, sums[i], sums[i + 4], 0x88) +
              _mm512_maskz_shuffle_f32x4(kAll, sums[i], sums[i + 4], 0xdd);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    sums[i] =
        _mm512_maskz_unpacklo_ps(kAll, sums[i], sums[i + 2]) + _mm512_maskz_unpackhi_ps(kAll, sums[i], sums[i + 2]);
  const __m512 all =
      _mm512_maskz_unpacklo_ps(kAll, sums[0], sums[1]) + _mm512_maskz_unpackhi_ps(kAll, sums[0], sums[1]);
  return all + __m512{};  // no -0, which is the sum of a row without entries
}
#endif

// The sums of rows [begin, end), and whether their columns fit: sorted and unique in each row, in [0, columns).
template <class S, class V, class Col>
class TokenSums {
 public:
  // next: what will be read after `entries`, or null.
  TokenSums(const S* x, const DeltaEntries& entries, const DeltaEntries* next)
      : x_(x), entries_(entries), next_(next), end_(entries.rows.border(entries.rows.end)) {}

  bool form(int64_t begin, int64_t end, S* sums) {
    const CsrRows& rows = entries_.rows;
    for (int64_t row = begin; row < end;) {
      // As many squares of rows as have their products in the first cache together.
      int64_t stop = row;
      const int64_t most = rows.border(row) + kProducts;
      while (stop < end) {
        const int64_t after = stop + N < end ? stop + N : end;
        if (rows.border(after) > most) break;
        stop = after;
      }
      if (stop > row) {
        if (rows.wide_row_ptr)
          short_rows(static_cast<const int64_t*>(rows.row_ptr), row, stop, sums);
        else
          short_rows(static_cast<const int32_t*>(rows.row_ptr), row, stop, sums);
      } else {
        stop = stop + N < end ? stop + N : end;
        long_rows(row, stop, sums + row);
      }
      row = stop;
    }
    return fit_;
  }

 private:
  static constexpr int N = kLanes<S>;

  template <class Index>
  void short_rows(const Index* borders, int64_t begin, int64_t end, S* sums) {
    const int64_t first = borders[begin];
    int64_t falls = form_products(first, borders[end] - first);
    for (int64_t row = begin; row < end; row += N) {
      const RowSpans<N> rows(borders + row, end - row, first);
      falls -= falls_between(now_.col, rows);
      const Vector<S> added = sums_of(rows);
      memcpy(sums + row, &added, sizeof(added));
    }
    fit_ &= falls == 0;
  }

  Vector<S> sums_of(const RowSpans<N>& rows) {
#if SHIRA_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<S, float>) {
      const __m512i count = _mm512_load_si512(rows.count);
      const auto longest_above = [&](int32_t n) { return _mm512_cmpgt_epi32_mask(count, _mm512_set1_epi32(n)) != 0; };
      __m512 sums;
      if (!longest_above(16))
        sums = sums_of_short_rows<1>(products_, rows);
      else if (!longest_above(32))
        sums = sums_of_short_rows<2>(products_, rows);
      else if (!longest_above(48))
        sums = sums_of_short_rows<3>(products_, rows);
      else if (!longest_above(64))
        sums = sums_of_short_rows<4>(products_, rows);
      else
        sums = sums_of_any(rows);
      return _mm512_mask_mov_ps(sums, _mm512_testn_epi32_mask(count, count), _mm512_set1_ps(-0.0f));
    }
#endif
    Vector<S> sums = sums_of_any(rows);
    for (int i = 0; i < N; ++i)
      if (rows.count[i] == 0) sums[i] = -S{};
    return sums;
  }

  Vector<S> sums_of_any(const RowSpans<N>& rows) {
    return sums_of_lanes<1, 0, Vector<S>>(
        [&](int i) { return add_lanes(Vector<S>{}, products_ + rows.begin[i], rows.count[i]); });
  }

  void long_rows(int64_t begin, int64_t end, S* sums) {
    const CsrRows& rows = entries_.rows;
    const auto lanes = [&](int i) {
      return begin + i < end ? long_row(rows.border(begin + i), rows.border(begin + i + 1)) : Vector<S>{};
    };
    const Vector<S> added = sums_of_lanes<1, 0, Vector<S>>(lanes);
    memcpy(sums, &added, sizeof(added));
    for (int64_t row = begin; row < end; ++row)
      if (rows.border(row) == rows.border(row + 1)) sums[row - begin] = -S{};
  }

  Vector<S> long_row(int64_t begin, int64_t end) {
    Vector<S> lanes{};
    Col before = 0;
    for (int64_t e = begin; e < end; e += kProducts) {
      const int64_t count = end - e < kProducts ? end - e : kProducts, falls = form_products(e, count);
      fit_ &= falls == 0 && (e == begin || now_.col[0] > before);
      before = now_.col[count - 1];
      lanes = add_lanes(lanes, products_, count);
    }
    return lanes;
  }

  // Forms the products of entries [begin, begin + count). Returns how often their columns fall, in rows or between
  // them.
  int64_t form_products(int64_t begin, int64_t count) {
    const int64_t columns = entries_.rows.columns;
    now_ = neighbours(begin, count);
    const ColumnFacts<Col> facts = facts_of(now_.col, count);
    // No int32 is larger, also of more columns: what is, was negative.
    if (count > 0 && facts.largest >= (columns < int64_t{1} << 31 ? columns : int64_t{1} << 31)) {
      fit_ = false;
      count = 0;
    }
    SHIRA_ISA::form_products(x_, now_, later(begin + kEntriesAhead), count, products_);
    return facts.falls;
  }

  // Entry e, or what lies as far behind the last one in the next adapter; if there is neither, what is there anyway.
  Entries<V, Col> later(int64_t e) const {
    if (e < end_) return at(entries_, e);
    if (next_ && (e += next_->rows.border(0) - end_) < next_->rows.border(next_->rows.end)) return at(*next_, e);
    return now_;
  }

  static Entries<V, Col> at(const DeltaEntries& entries, int64_t e) {
    if (entries.page_of) e = entries.page_of[e / entries.page_size] * entries.page_size + e % entries.page_size;
    return {static_cast<const Col*>(entries.rows.col) + e, static_cast<const V*>(entries.values) + e};
  }

  // Side by side: in copies where they lie in several pages.
  Entries<V, Col> neighbours(int64_t begin, int64_t count) {
    const int64_t size = entries_.page_size, end = begin + count;
    if (!entries_.page_of || count == 0 || (end - 1) / size == begin / size) return at(entries_, count > 0 ? begin : 0);
    for (int64_t e = begin; e < end;) {
      const int64_t page_end = (e / size + 1) * size, stop = page_end < end ? page_end : end;
      const Entries<V, Col> from = at(entries_, e);
      memcpy(cols_of_pages_ + (e - begin), from.col, static_cast<size_t>(stop - e) * sizeof(Col));
      memcpy(values_of_pages_ + (e - begin), from.values, static_cast<size_t>(stop - e) * sizeof(V));
      e = stop;
    }
    return {cols_of_pages_, values_of_pages_};
  }

  const S* x_;
  const DeltaEntries& entries_;
  const DeltaEntries* next_;
  int64_t end_;
  bool fit_ = true;
  Entries<V, Col> now_;
  alignas(64) Col cols_of_pages_[kProducts];
  alignas(64) V values_of_pages_[kProducts];
  alignas(64) S products_[kProducts + N];  // a vector of a row may end beyond what there is
};

template <class S, class V, class Col>
bool token_sums(const void* x, const DeltaEntries& entries, const DeltaEntries* next, int64_t begin, int64_t end,
                void* sums) {
  if (entries.rows.border(begin) == entries.rows.border(end)) {  // there may be no arrays at all
    for (int64_t row = begin; row < end; ++row) static_cast<S*>(sums)[row] = -S{};
    return true;
  }
  TokenSums<S, V, std::make_unsigned_t<Col>> all(static_cast<const S*>(x), entries, next);
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
  constexpr int64_t kBlock = 16 * N;
  const S* from = static_cast<const S*>(sums);
  T* to = static_cast<T*>(out);
  const auto is_empty = [&](int64_t i) { return load<Bits>(from + i) == Bits{1} << (8 * sizeof(S) - 1); };
  const auto write = [&](auto lanes, int64_t i) {
    constexpr int kCount = decltype(lanes)::value;
    const auto sum = load<Lanes<S, kCount>>(from + i);
    store_narrowed<kCount>(accumulate ? widened<kCount>(to + i) + sum : sum + S{}, to + i);
  };
  for (int64_t row = 0; row < count; row += kBlock) {
    const int64_t end = row + kBlock < count ? row + kBlock : count;
    Bits empty = 0;
    for (int64_t i = row; i < end; ++i) empty += is_empty(i);
    int64_t i = row;
    if (!accumulate || empty == 0)
      for (; i + N <= end; i += N) write(std::integral_constant<int, N>(), i);
    for (; i < end; ++i)
      if (!accumulate || !is_empty(i)) write(std::integral_constant<int, 1>(), i);
  }
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
