// What the kernels of sparse_delta_mm and its in-place and batched forms take.
#pragma once

#include <cstdint>

#include "../shared/scatter_form.h"
#include "csr_types.h"

namespace shira {

// The entries of one adapter: entry e is at e in the arenas, or, where there are pages, at
// page_of[e / page_size] * page_size + e % page_size.
struct DeltaEntries {
  CsrRows rows;  // all
  const void* values;
  const int32_t* page_of;  // null where there are no pages
  int64_t page_size;
};

// A token that is alone with its adapter.
struct SparseDeltaToken {
  void (*widen)(const void* x, int64_t count, void* to);  // null where sums are of x's own type
  // Writes the sums of rows [begin, end) for a widened x, in whole memory lines, so `begin` is where one begins. Says
  // whether their columns are sorted and unique in each row, and lie in [0, columns). next: the entries that are worth
  // a prefetch when these come to their end, or null.
  bool (*sums)(const void* x, const DeltaEntries&, const DeltaEntries* next, int64_t begin, int64_t end, void* sums);
  // Adds sums to out, where rows without entries keep their bits, or writes them.
  void (*write)(const void* sums, int64_t count, bool accumulate, void* out);
  int64_t number_bytes;  // of a sum
};

using ChooseSparseDeltaToken = SparseDeltaToken (*)(Element x, Element value, bool wide_col);

// Some tokens of one adapter: their rows of x, packed into a panel, and of out.
struct TokenBlock {
  const int64_t* tokens;
  int64_t count;  // no more than a panel has
  const void* x;  // [.., columns]
  int64_t columns;
  void* panel;  // [columns][tokens of a panel]
  void* out;    // [.., rows]
  int64_t rows;
  bool accumulate;  // adds to out, and leaves rows without entries alone; else all is written
};

struct SparseDeltaMm {
  void (*pack)(const TokenBlock&, int64_t begin, int64_t end);  // these columns
  void (*run)(const TokenBlock&, const CsrRows&, const void* values);
  int64_t tokens;       // of a panel
  int64_t token_bytes;  // of one token in a column of a panel
};

// Chooses the kernel of the panel that suits `tokens` tokens; `value` is the element type of values, `columns` what a
// panel holds.
using ChooseSparseDeltaMm = SparseDeltaMm (*)(Element x, Element value, bool wide_col, int64_t columns, int64_t tokens);

}  // namespace shira
