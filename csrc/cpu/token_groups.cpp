#include "token_groups.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "delta_shares.h"

namespace shira {
namespace {

std::string of_adapter(const char* argument, int64_t adapter) {
  return std::string(argument) + " of adapter " + std::to_string(adapter);
}

// The arenas of a call's adapters.
struct Arenas {
  const int32_t* page_table;                    // null where there are no pages, or none for any adapter
  int64_t pages, page_size, pages_per_adapter;  // page_size is 0 where there are no pages

  Arenas(const Tensor& columns, const std::optional<Tensor>& table)
      : page_table(table ? static_cast<const int32_t*>(table->data_ptr()) : nullptr),
        pages(columns.size(0)),
        page_size(table ? columns.size(1) : 0),
        pages_per_adapter(table ? table->size(1) : 0) {}

  // Without a page there is no entry, however long its pages would be.
  int64_t room() const { return page_size == 0 ? pages : pages == 0 ? 0 : pages_per_adapter * page_size; }
};

void check_pages(const char* op, const Arenas& arenas, int64_t adapter, const DeltaEntries& entries) {
  const int64_t first = entries.rows.border(0), last = entries.rows.border(entries.rows.end);
  for (int64_t page = first / arenas.page_size; first < last && page * arenas.page_size < last; ++page)
    if (entries.page_of[page] < 0 || entries.page_of[page] >= arenas.pages)
      fail(op, of_adapter("page_table", adapter),
           "must lie in [0, " + std::to_string(arenas.pages) + ") where it has entries");
}

// The pieces of an adapter. With pages: the rows inside each page, and each row that lies in several of them, copied.
std::vector<DeltaPiece> pieces_of(const DeltaEntries& entries, int64_t value_size,
                                  std::vector<std::vector<char>>& copies) {
  const CsrRows& all = entries.rows;
  if (!entries.page_of) return {{all, entries.values}};
  const int32_t* page_of = entries.page_of;
  const int64_t size = entries.page_size, col_size = all.wide_col ? 4 : 2;
  std::vector<DeltaPiece> pieces;
  const auto add = [&](int64_t begin, int64_t end, int64_t shift, const void* col, const void* values) {
    CsrRows rows = all;
    rows.col = col;
    rows.begin = begin;
    rows.end = end;
    rows.shift = shift;
    pieces.push_back({rows, values});
  };
  const auto copied = [&](const void* arena, int64_t element_size, int64_t begin, int64_t end) {
    std::vector<char>& copy = copies.emplace_back((end - begin) * element_size);
    for (int64_t e = begin; e < end;) {
      const int64_t stop = std::min(end, (e / size + 1) * size), at = page_of[e / size] * size + e % size;
      std::copy_n(static_cast<const char*>(arena) + at * element_size, (stop - e) * element_size,
                  copy.data() + (e - begin) * element_size);
      e = stop;
    }
    return copy.data();
  };
  int64_t row = 0;
  while (row < all.end) {
    const int64_t begin = all.border(row), page = begin / size, page_end = (page + 1) * size;
    // The first row that ends beyond the page.
    int64_t low = row, high = all.end;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (all.border(middle + 1) <= page_end)
        low = middle + 1;
      else
        high = middle;
    }
    if (low > row) {
      const bool empty = begin == all.border(low);  // perhaps at the end of the last page
      add(row, low, empty ? 0 : (page_of[page] - page) * size, all.col, entries.values);
    }
    row = low;
    if (row == all.end || all.border(row) == page_end) continue;
    const int64_t from = all.border(row), to = all.border(row + 1);
    const auto* col = copied(all.col, col_size, from, to);
    add(row, row + 1, -from, col, copied(entries.values, value_size, from, to));
    ++row;
  }
  return pieces;
}

// Forms the sums of the tokens that are alone; says whether their adapters' columns fit.
bool add_sums(const Tensor& x, const Tensor& values, TokenGroups& groups) {
  const std::vector<const TokenGroup*> alone = alone_in(groups);
  if (alone.empty()) return true;
  const CsrRows& rows = alone[0]->entries.rows;
  const auto count = static_cast<int64_t>(alone.size());
  groups.alone = cpu_kernels().sparse_delta_token(element_of(dtype_of(x)), element_of(dtype_of(values)), rows.wide_col);
  const SparseDeltaToken& kernel = groups.alone;
  const auto* numbers = static_cast<const char*>(x.data_ptr());
  const auto x_of = [&](int64_t i) {
    return numbers + groups.tokens[alone[i]->begin] * rows.columns * static_cast<int64_t>(x.element_size());
  };
  const int64_t widened_bytes = aligned_size(rows.columns * kernel.number_bytes);
  const int64_t sum_bytes = aligned_size(rows.end * kernel.number_bytes), all_sums = count * sum_bytes;
  const int64_t bytes = all_sums + (kernel.widen ? count * widened_bytes : 0);
  thread_local KeptBytes kept;
  groups.sums = CallBytes(kept, bytes, kMostKept);
  char* sums = groups.sums.get();
  char* widened = sums + all_sums;
  if (kernel.widen) {
    const int64_t chunks = std::min(count, threads_for(count * rows.columns, kNumbersPerThread));
    over_chunks(chunks, [&](int64_t chunk) {
      for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i)
        kernel.widen(x_of(i), rows.columns, widened + i * widened_bytes);
    });
  }
  const auto cost = [&](size_t i) { return kAloneCost * cost_of(alone[i]->entries.rows); };
  int64_t total = 0;
  for (size_t i = 0; i < alone.size(); ++i) total += cost(i);
  std::atomic<bool> fit{true};
  share_costs(0, alone.size(), threads_for(total, kCostPerThread), cost, [&](size_t i, int64_t begin, int64_t end) {
    const auto [first, last] = share_of(alone[i]->entries.rows, kAloneCost, begin, end);
    const auto at = static_cast<int64_t>(i);
    const void* own = kernel.widen ? widened + at * widened_bytes : x_of(at);
    const DeltaEntries* next = i + 1 < alone.size() ? &alone[i + 1]->entries : nullptr;
    if (!kernel.sums(own, alone[i]->entries, next, first, last, sums + at * sum_bytes)) fit = false;
  });
  return fit;
}

// Checks what the adapters hold, and forms the sums of tokens that are alone.
void check_groups(const char* op, const Tensor& x, const Tensor& values, TokenGroups& groups) {
  const auto value_size = static_cast<int64_t>(values.element_size());
  const auto check = [&](TokenGroup& group) {
    group.pieces = pieces_of(group.entries, value_size, groups.copies);
    for (const DeltaPiece& piece : group.pieces) check_columns(op, piece.rows, cpu_kernels());
  };
  for (TokenGroup& group : groups.groups)
    if (!is_alone(group)) check(group);
  if (add_sums(x, values, groups)) return;
  for (TokenGroup& group : groups.groups)  // says what is wrong
    if (is_alone(group)) check(group);
  fail(op, "col", "changed while it was read");
}

}  // namespace

std::vector<const TokenGroup*> alone_in(const TokenGroups& groups) {
  std::vector<const TokenGroup*> alone;
  for (const TokenGroup& group : groups.groups)
    if (is_alone(group)) alone.push_back(&group);
  return alone;
}

TokenGroups all_tokens(const char* op, const Tensor& x, const Tensor& row_ptr, const Tensor& col,
                       const Tensor& values) {
  const CsrRows all = rows_of(row_ptr, col, last_size(x));
  check_borders(op, all, values.numel(), cpu_kernels());
  TokenGroups result;
  if (all.end == 0) return result;  // there is nothing to write, for however many tokens
  result.tokens.resize(static_cast<size_t>(tokens_of(x)));
  std::iota(result.tokens.begin(), result.tokens.end(), 0);
  result.groups.push_back({0, tokens_of(x), {all, values.data_ptr(), nullptr, 0}, {}});
  check_groups(op, x, values, result);
  return result;
}

TokenGroups tokens_by_adapter(const char* op, const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                              const Tensor& col, const Tensor& values, const std::optional<Tensor>& page_table) {
  const auto* adapter_of = static_cast<const int32_t*>(token_adapter.data_ptr());
  const int64_t tokens = token_adapter.numel(), adapters = row_ptr.size(0), rows = row_ptr.size(1) - 1;
  // The tokens of adapter a end at ends[a] when they are counted, and begin there when they are written.
  std::vector<int64_t> ends(static_cast<size_t>(adapters));
  for (int64_t t = 0; t < tokens; ++t) {
    if (adapter_of[t] < -1 || adapter_of[t] >= adapters)
      fail(op, "token_adapter",
           "must lie in [-1, " + std::to_string(adapters) + "), got " + std::to_string(adapter_of[t]));
    if (adapter_of[t] >= 0) ++ends[adapter_of[t]];
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  const int64_t with_adapter = ends.empty() ? 0 : ends.back();
  TokenGroups result;
  result.tokens.resize(static_cast<size_t>(with_adapter));
  for (int64_t t = tokens - 1; t >= 0; --t)
    if (adapter_of[t] >= 0) result.tokens[--ends[adapter_of[t]]] = t;

  const CpuKernels& kernels = cpu_kernels();
  const Arenas arenas(col, page_table);
  result.groups.reserve(static_cast<size_t>(std::min(with_adapter, adapters)));
  for (int64_t begin = 0; begin < with_adapter;) {
    const int64_t adapter = adapter_of[result.tokens[begin]];
    const int64_t end = adapter + 1 < adapters ? ends[adapter + 1] : with_adapter;
    CsrRows all{static_cast<const char*>(row_ptr.data_ptr()) + adapter * (rows + 1) * row_ptr.element_size(),
                col.data_ptr(),
                row_ptr.element_size() == 8,
                col.element_size() == 4,
                last_size(x),
                0,
                rows,
                0};
    const int64_t first = all.border(0), last = all.border(rows);
    if (first < 0 || last > arenas.room() || !kernels.row_ptr_rises(all.row_ptr, rows + 1, all.wide_row_ptr))
      fail(op, of_adapter("row_ptr", adapter),
           "must rise within [0, " + std::to_string(arenas.room()) + "], got from " + std::to_string(first) + " to " +
               std::to_string(last));
    const int32_t* page_of = arenas.page_table ? arenas.page_table + adapter * arenas.pages_per_adapter : nullptr;
    result.groups.push_back({begin, end, {all, values.data_ptr(), page_of, arenas.page_size}, {}});
    if (page_of) check_pages(op, arenas, adapter, result.groups.back().entries);
    begin = end;
  }
  check_groups(op, x, values, result);
  return result;
}

}  // namespace shira
