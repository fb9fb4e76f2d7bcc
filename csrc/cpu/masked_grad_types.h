// What the kernels of masked_grad take.
#pragma once

#include <cstdint>

#include "../shared/scatter_form.h"

namespace shira {

// Panels hold for each column of an operand its elements of one block of tokens as one vector. The cache line at each
// end spreads the columns over the cache's sets; NOTES.md says what was measured of sizes.
constexpr int64_t kPanelVectorBytes = 512;
constexpr int64_t kPanelBytes = kPanelVectorBytes + 64;  // from one column to the next
constexpr int64_t kPanelColumns = 2048;
constexpr int64_t kPanelRows = 64;  // columns of grad_output, which are rows of the weight, packed at a time

// A block of an operand to pack into a panel. Rows of the operand are tokens, `pitch` elements apart.
struct PackBlock {
  const void* operand;
  int64_t pitch, tokens, columns;
  void* panel;
};

// Rows of the weight whose entries get the products of one block of tokens.
struct RowBlock {
  const void* g_panel;   // a vector for each row
  const void* x_panel;   // a vector for each column from first_column on
  const void* col;       // of all entries
  void* sums;            // of all entries
  const int64_t* begin;  // the entries of each row with a column in the panel
  const int64_t* end;
  int64_t rows, tokens, first_column;
};

struct MaskedGrad {
  void (*pack)(const PackBlock&);
  void (*add_rows)(const RowBlock&);
  int64_t tokens;  // of a block
};

using ChooseMaskedGrad = MaskedGrad (*)(Element operand, bool wide_col);

}  // namespace shira
