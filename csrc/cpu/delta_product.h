// The product of token groups with their adapters: what sparse_delta_mm and its in-place and batched forms end with.
#pragma once

#include "token_groups.h"

namespace shira {

// [..., rows] like x, not initialised.
Tensor new_output(const char* op, const Tensor& x, int64_t rows);

// Adds the product to `out`, or writes the tokens of `out` that are in a group. x is that of the groups.
void multiply(const TokenGroups& groups, const Tensor& x, const Tensor& values, const Tensor& out, bool accumulate);

}  // namespace shira
