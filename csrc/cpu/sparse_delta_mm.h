// What sparse_delta_mm and its in-place and batched forms share: checks of the form, groups of tokens, and the product.
//
// A call's tokens go in groups of one adapter. All ops are the same from there: checks of the entries, and then blocks
// of a group's tokens times its adapter's rows. A call without adapters is one group. The sums of a token that is alone
// in its group are formed with the check of the entries, which are then read once, and wait for all checks: a number
// for each of its rows, and one for each column where x is widened.
#pragma once

#include <optional>
#include <vector>

#include "csr.h"
#include "memory.h"

namespace shira {

// Rows of an adapter whose entries lie side by side.
struct DeltaPiece {
  CsrRows rows;
  const void* values;
};

// Tokens [begin, end) of a list, which have one adapter.
struct TokenGroup {
  int64_t begin, end;
  DeltaEntries entries;
  std::vector<DeltaPiece> pieces;  // in order they make up all rows; none where a token is alone
};

struct TokenGroups {
  std::vector<int64_t> tokens;  // in the order of the groups
  std::vector<TokenGroup> groups;
  std::vector<std::vector<char>> copies;  // of rows that cross from one page to the next
  SparseDeltaToken alone{};               // for tokens that are alone in their groups
  CallBytes sums;                         // of these, in the order of the groups
};

// The form of a layer's input.
void check_input(const char* op, const Tensor& x);
// The form of values beside col, which was checked.
void check_values(const char* op, const Tensor& values, const Tensor& col, const Tensor& x);
// The form of what is added to.
void check_out(const char* op, const Tensor& out, const Tensor& x);
// The form of stacked adapters with so many rows each.
void check_adapters(const char* op, const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                    const Tensor& col, const Tensor& values, int64_t rows, const std::optional<Tensor>& page_table);
// Neither `read` nor x and values may require grad, nor share memory with out.
void check_in_place(const char* op, const Tensor& out, const Tensor& x, const Tensor& values,
                    std::vector<Argument> read);

// One group of all tokens of a contiguous x. Checks what the matrix holds.
TokenGroups all_tokens(const char* op, const Tensor& x, const CsrRows& all, const Tensor& values);
// The tokens of each adapter that has any, of a contiguous x. Checks what those adapters hold.
TokenGroups tokens_by_adapter(const char* op, const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                              const Tensor& col, const Tensor& values, const std::optional<Tensor>& page_table);

// [..., rows] like x, not initialised.
Tensor new_output(const Tensor& x, int64_t rows);

// Adds to `out`, or writes its tokens that are in a group. x is that of the groups.
void multiply(const TokenGroups& groups, const Tensor& x, const Tensor& values, const Tensor& out, bool accumulate);

}  // namespace shira
