// Matrices in CSR form: checks of what they hold, in the words of shira_kernels/ops/_checks.py, and how threads share
// their rows.
#pragma once

#include "../host/checks.h"
#include "kernels.h"

namespace shira {

constexpr int64_t kRowCost = 2;  // going over a row costs as much as this many entries

// All rows of a matrix, its form checked.
CsrRows rows_of(const Tensor& row_ptr, const Tensor& col, int64_t columns);

// row_ptr rises from 0 to nnz.
void check_borders(const char* op, const CsrRows& all, int64_t nnz, const CpuKernels& kernels);

// row_ptr rises so, and columns are sorted and unique in each row, and lie in [0, columns).
void check_csr_contents(const char* op, const CsrRows& all, int64_t nnz, const CpuKernels& kernels);

// The columns alone; borders are right. On several threads.
void check_columns(const char* op, const CsrRows& rows, const CpuKernels& kernels);

// What it costs to go over the rows: an entry is 1.
int64_t cost_of(const CsrRows& rows);

// The first row before which there is at least so much cost.
int64_t row_at(const CsrRows& rows, int64_t cost);

// The row at which the share `chunk` begins: shares cost the same.
int64_t first_row(const CsrRows& rows, int64_t chunk, int64_t chunks);

}  // namespace shira
