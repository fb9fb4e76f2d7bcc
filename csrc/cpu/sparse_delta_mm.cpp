// sparse_delta_mm on the CPU, and what its other forms share: see sparse_delta_mm.h.
//
// Blocks of tokens go in waves, as many as have their panels in the threads' caches at a time. All threads pack the
// wave's panels, then each goes over its share of all the wave's rows. With as many like blocks as threads that is a
// block for each thread, which has packed it, too; with one block, or many small ones, threads share rows by cost.
// Before that come the tokens that are alone, all at once.
#include "sparse_delta_mm.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "lists.h"
#include "memory.h"

namespace shira {
namespace {

constexpr int64_t kWaveBytes = 3 << 19;  // of panels, for each thread
constexpr int64_t kRowsTogether = 32;    // of a thread's share: what a kernel writes at a time
constexpr int64_t kBlockCost = 12;       // an entry costs as much as this many tokens in it
constexpr int64_t kAloneCost = kBlockCost + 1;
constexpr int64_t kCostPerThread = 16384 * kAloneCost;  // below this a thread costs more than it saves
constexpr int64_t kNumbersPerThread = 1 << 14;          // of those packed, the same
constexpr int64_t kMostKept = 4 << 20;                  // bytes of sums that stay from call to call, and of panels

std::string of_adapter(const char* argument, int64_t adapter) {
  return std::string(argument) + " of adapter " + std::to_string(adapter);
}

int64_t tokens_of(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  return tokens;
}

int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// The arenas of a call's adapters.
struct Arenas {
  const int32_t* page_table;                    // null where there are no pages, or none for any adapter
  int64_t pages, page_size, pages_per_adapter;  // page_size is 0 where there are no pages

  Arenas(const Tensor& columns, const std::optional<Tensor>& table)
      : page_table(table ? static_cast<const int32_t*>(table->data_ptr()) : nullptr),
        pages(columns.size(0)),
        page_size(table ? columns.size(1) : 0),
        pages_per_adapter(table ? table->size(1) : 0) {}

  int64_t room() const { return page_size > 0 ? pages_per_adapter * page_size : pages; }
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

bool is_alone(const TokenGroup& group) { return group.end - group.begin == 1; }

// One block of tokens of a group, in a wave.
struct Block {
  const TokenGroup* group;
  SparseDeltaMm kernel;
  TokenBlock block;
  int64_t panel_begin;  // bytes in the wave's panels
  int64_t entry_cost;

  int64_t cost() const { return cost_of(group->entries.rows) * entry_cost; }
};

// The blocks of all groups, in their order.
std::vector<Block> blocks_of(const TokenGroups& groups, const CpuKernels& kernels, Element element, Element value,
                             TokenBlock block) {
  std::vector<Block> blocks;
  for (const TokenGroup& group : groups.groups) {
    if (is_alone(group)) continue;
    for (int64_t t = group.begin; t < group.end;) {
      const SparseDeltaMm kernel =
          kernels.sparse_delta_mm(element, value, group.entries.rows.wide_col, block.columns, group.end - t);
      block.tokens = groups.tokens.data() + t;
      block.count = std::min(kernel.tokens, group.end - t);
      blocks.push_back({&group, kernel, block, 0, kBlockCost + kernel.tokens});
      t += block.count;
    }
  }
  return blocks;
}

// The rows that lie in the part [begin, end) of a cost that is entry_cost for each entry.
std::pair<int64_t, int64_t> share_of(const CsrRows& all, int64_t entry_cost, int64_t begin, int64_t end) {
  const auto row = [&](int64_t cost) {
    if (cost <= 0) return all.begin;
    const int64_t at = row_at(all, (cost + entry_cost - 1) / entry_cost);
    return std::min(all.end, (at + kRowsTogether - 1) / kRowsTogether * kRowsTogether);
  };
  return {row(begin), row(end)};
}

// Threads share things that have costs: f(i, begin, end) for what each has of a share's cost.
template <class Cost, class F>
void share_costs(size_t first, size_t last, int64_t chunks, const Cost& cost, const F& f) {
  int64_t total = 0;
  for (size_t i = first; i < last; ++i) total += cost(i);
  over_chunks(chunks, [&](int64_t chunk) {
    int64_t begin = total * chunk / chunks, end = total * (chunk + 1) / chunks;
    for (size_t i = first; i < last && end > 0; ++i) {
      const int64_t own = cost(i);
      if (begin < own) f(i, begin, std::min(end, own));
      begin -= own;
      end -= own;
    }
  });
}

int64_t threads_for(int64_t cost, int64_t cost_per_thread) {
  return std::clamp<int64_t>(cost / cost_per_thread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
}

void run_wave(const std::vector<Block>& blocks, size_t wave_begin, size_t wave_end, int64_t chunks) {
  const int64_t columns = blocks[wave_begin].block.columns;
  const int64_t all_columns = static_cast<int64_t>(wave_end - wave_begin) * columns;
  int64_t numbers = 0;
  for (size_t i = wave_begin; i < wave_end; ++i) numbers += columns * blocks[i].kernel.tokens;
  const int64_t packers = std::clamp<int64_t>(numbers / kNumbersPerThread, 1, chunks);
  over_chunks(packers, [&](int64_t chunk) {
    const auto border = [&](int64_t k) { return k == packers ? all_columns : all_columns * k / packers / 16 * 16; };
    int64_t begin = border(chunk), end = border(chunk + 1);
    for (size_t i = wave_begin; i < wave_end; ++i, begin -= columns, end -= columns)
      if (begin < columns && end > 0)
        blocks[i].kernel.pack(blocks[i].block, std::max<int64_t>(begin, 0), std::min(end, columns));
  });
  share_costs(
      wave_begin, wave_end, chunks, [&](size_t i) { return blocks[i].cost(); },
      [&](size_t i, int64_t begin, int64_t end) {
        const Block& block = blocks[i];
        const auto [first, last] = share_of(block.group->entries.rows, block.entry_cost, begin, end);
        for (const DeltaPiece& piece : block.group->pieces) {
          CsrRows rows = piece.rows;
          rows.begin = std::max(rows.begin, first);
          rows.end = std::min(rows.end, last);
          if (rows.begin < rows.end) block.kernel.run(block.block, rows, piece.values);
        }
      });
}

std::vector<const TokenGroup*> alone_in(const TokenGroups& groups) {
  std::vector<const TokenGroup*> alone;
  for (const TokenGroup& group : groups.groups)
    if (is_alone(group)) alone.push_back(&group);
  return alone;
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

// Adds them to `out`, or writes them.
void write_sums(const TokenGroups& groups, const Tensor& out, bool accumulate) {
  const std::vector<const TokenGroup*> alone = alone_in(groups);
  if (alone.empty()) return;
  const auto count = static_cast<int64_t>(alone.size());
  const int64_t rows = last_size(out), sum_bytes = aligned_size(rows * groups.alone.number_bytes);
  const int64_t chunks = std::min(count, threads_for(count * rows, kNumbersPerThread));
  over_chunks(chunks, [&](int64_t chunk) {
    for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i) {
      const int64_t at = groups.tokens[alone[i]->begin] * rows * static_cast<int64_t>(out.element_size());
      groups.alone.write(groups.sums.get() + i * sum_bytes, rows, accumulate, static_cast<char*>(out.data_ptr()) + at);
    }
  });
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

void check_input(const char* op, const Tensor& x) {
  const int32_t dtype = dtype_of(x);
  if (element_of(dtype) == Element::Other)
    fail(op, "x", "must be float64, float32, bfloat16 or float16, got " + dtype_name(dtype));
  if (x.dim() == 0) fail(op, "x", "must have at least one dimension, [..., in]");
}

void check_values(const char* op, const Tensor& values, const Tensor& col, const Tensor& x) {
  const int32_t dtype = dtype_of(x), value_dtype = dtype_of(values);
  if (value_dtype != dtype && (element_of(dtype) == Element::Float64 || value_dtype != aoti_torch_dtype_float32()))
    fail(op, "values",
         "must be " + dtype_name(dtype) + " like x, or float32 beside fewer bits, got " + dtype_name(value_dtype));
  if (!same_device(values, x)) fail(op, "values", "must be on the device of x");
  bool same = values.dim() == col.dim();
  for (int64_t i = 0; same && i < col.dim(); ++i) same = values.size(i) == col.size(i);
  if (!same) fail(op, "values", "must have the shape of col " + shape_of(col) + ", got " + shape_of(values));
  if (!values.is_contiguous()) fail(op, "values", "must be contiguous");
}

void check_out(const char* op, const Tensor& out, const Tensor& x) {
  if (dtype_of(out) != dtype_of(x))
    fail(op, "out", "must be " + dtype_name(dtype_of(x)) + " like x, got " + dtype_name(dtype_of(out)));
  if (!same_device(out, x)) fail(op, "out", "must be on the device of x");
  bool same = out.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = out.size(i) == x.size(i);
  if (!same) fail(op, "out", "must be [..., out] beside x [..., in] " + shape_of(x) + ", got " + shape_of(out));
  if (!out.is_contiguous()) fail(op, "out", "must be contiguous");
}

void check_adapters(const char* op, const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                    const Tensor& col, const Tensor& values, int64_t rows, const std::optional<Tensor>& page_table) {
  check_input(op, x);
  if (dtype_of(token_adapter) != aoti_torch_dtype_int32())
    fail(op, "token_adapter", "must be int32, got " + dtype_name(dtype_of(token_adapter)));
  if (token_adapter.dim() != 1) fail(op, "token_adapter", "must be 1-D, got shape " + shape_of(token_adapter));
  if (!token_adapter.is_contiguous()) fail(op, "token_adapter", "must be contiguous");
  if (!same_device(token_adapter, x)) fail(op, "token_adapter", "must be on the device of x");
  if (token_adapter.numel() != tokens_of(x))
    fail(op, "token_adapter",
         "must have one entry per row of x (" + std::to_string(tokens_of(x)) + "), got " +
             std::to_string(token_adapter.numel()));
  check_csr_dtypes(op, row_ptr, col, x);
  if (rows < 0) fail(op, "out_features", "must not be negative, got " + std::to_string(rows));
  if (row_ptr.dim() != 2 || row_ptr.size(1) != rows + 1)
    fail(op, "row_ptr", "must be [adapters, out + 1] with out " + std::to_string(rows) + ", got " + shape_of(row_ptr));
  if (!page_table) {
    if (col.dim() != 1) fail(op, "col", "must be 1-D unless there is a page_table, got shape " + shape_of(col));
    return check_values(op, values, col, x);
  }
  if (!same_device(*page_table, x)) fail(op, "page_table", "must be on the device of x");
  if (!page_table->is_contiguous()) fail(op, "page_table", "must be contiguous");
  if (col.dim() != 2 || col.size(1) == 0)
    fail(op, "col", "must be [pages, page_size] beside a page_table, got shape " + shape_of(col));
  check_values(op, values, col, x);
  if (dtype_of(*page_table) != aoti_torch_dtype_int32())
    fail(op, "page_table", "must be int32, got " + dtype_name(dtype_of(*page_table)));
  if (page_table->dim() != 2 || page_table->size(0) != row_ptr.size(0))
    fail(op, "page_table",
         "must be [adapters, pages] with " + std::to_string(row_ptr.size(0)) + " adapters, got shape " +
             shape_of(*page_table));
}

void check_in_place(const char* op, const Tensor& out, const Tensor& x, const Tensor& values,
                    std::vector<Argument> read) {
  refuse_grad(op, {"out", out});
  refuse_grad(op, {"x", x});
  refuse_grad(op, {"values", values});
  read.push_back({"x", x});
  read.push_back({"values", values});
  check_overlap(op, {{"out", out}}, read);
}

TokenGroups all_tokens(const char* op, const Tensor& x, const CsrRows& all, const Tensor& values) {
  check_borders(op, all, values.numel(), cpu_kernels());
  TokenGroups result;
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

Tensor new_output(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(rows);
  return torch::stable::new_empty(x, shape);
}

void multiply(const TokenGroups& groups, const Tensor& x, const Tensor& values, const Tensor& out, bool accumulate) {
  const CpuKernels& kernels = cpu_kernels();
  count_call(kernels);
  const TokenBlock operands{nullptr,        0,         x.data_ptr(), last_size(x), nullptr, out.data_ptr(),
                            last_size(out), accumulate};
  if (operands.rows == 0) return;
  std::vector<Block> blocks =
      blocks_of(groups, kernels, element_of(dtype_of(x)), element_of(dtype_of(values)), operands);
  int64_t cost = 0;
  for (const Block& block : blocks) cost += block.cost();
  const int64_t chunks = threads_for(cost, kCostPerThread);

  std::vector<size_t> waves = {0};
  int64_t bytes = 0, most_bytes = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t panel_bytes = aligned_size(blocks[i].kernel.tokens * blocks[i].kernel.token_bytes * operands.columns);
    if (bytes > 0 && bytes + panel_bytes > chunks * kWaveBytes) {
      waves.push_back(i);
      bytes = 0;
    }
    blocks[i].panel_begin = bytes;
    bytes += panel_bytes;
    most_bytes = std::max(most_bytes, bytes);
  }
  waves.push_back(blocks.size());
  thread_local KeptBytes kept;
  const CallBytes panels(kept, most_bytes, std::max(kMostKept, chunks * kWaveBytes));
  for (Block& block : blocks) block.block.panel = panels.get() + block.panel_begin;
  write_sums(groups, out, accumulate);  // now that there is memory for all
  for (size_t wave = 0; wave + 1 < waves.size(); ++wave)
    if (waves[wave] < waves[wave + 1]) run_wave(blocks, waves[wave], waves[wave + 1], chunks);
}

static Tensor sparse_delta_mm(const Tensor& x, const Tensor& row_ptr, const Tensor& col, const Tensor& values,
                              int64_t out_features) {
  constexpr const char* kOp = "sparse_delta_mm";
  check_input(kOp, x);
  const CsrRows all = check_csr(kOp, row_ptr, col, x, out_features, last_size(x), "out_features");
  check_values(kOp, values, col, x);
  const Tensor inputs = as_contiguous(x);
  const TokenGroups groups = all_tokens(kOp, inputs, all, values);
  Tensor out = new_output(x, out_features);
  multiply(groups, inputs, values, out, false);
  return out;
}

}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) { m.impl("sparse_delta_mm", TORCH_BOX(&shira::sparse_delta_mm)); }
