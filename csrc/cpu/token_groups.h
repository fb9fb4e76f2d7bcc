// The tokens of a call by their adapters, for sparse_delta_mm and its in-place and batched forms.
//
// A call's tokens go in groups of one adapter. All ops are the same from there: checks of the entries, and then blocks
// of a group's tokens times its adapter's rows. A call without adapters is one group. The sums of a token that is alone
// in its group are formed with the check of the entries, which are then read once, and wait for all checks: a number
// for each of its rows, and one for each column where x is widened.
#pragma once

#include <optional>
#include <vector>

#include "../host/delta_checks.h"
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

inline bool is_alone(const TokenGroup& group) { return group.end - group.begin == 1; }

// The groups of tokens that are alone.
std::vector<const TokenGroup*> alone_in(const TokenGroups& groups);

// One group of all tokens of a contiguous x. Checks what the matrix holds.
TokenGroups all_tokens(const char* op, const Tensor& x, const Tensor& row_ptr, const Tensor& col, const Tensor& values);
// The tokens of each adapter that has any, of a contiguous x. Checks what those adapters hold.
TokenGroups tokens_by_adapter(const char* op, const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                              const Tensor& col, const Tensor& values, const std::optional<Tensor>& page_table);

}  // namespace shira
