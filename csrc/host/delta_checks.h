// The form of the arguments of ops that multiply with the entries of a delta, in the words of
// shira_kernels/ops/_checks.py, for every device: what can be checked without their data.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"

namespace shira {

// Checks a matrix in CSR form with `rows` rows, on the device of `like`; `what` says in errors whose rows these are.
void check_csr(const char* op, const Tensor& row_ptr, const Tensor& col, const Tensor& like, int64_t rows,
               const char* what);
// Checks a layer's input.
void check_input(const char* op, const Tensor& x);
// Checks values beside col, which was checked.
void check_values(const char* op, const Tensor& values, const Tensor& col, const Tensor& x);
// Checks what is added to.
void check_out(const char* op, const Tensor& out, const Tensor& x);
// Checks stacked adapters with `rows` rows each, and their input.
void check_adapters(const char* op, const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                    const Tensor& col, const Tensor& values, int64_t rows, const std::optional<Tensor>& page_table);
// Refuses x, values and out where they require grad, and `read`, x and values where they share memory with out.
void check_in_place(const char* op, const Tensor& out, const Tensor& x, const Tensor& values,
                    std::vector<Argument> read);

// Counts the rows of x, its leading dimensions flattened.
int64_t tokens_of(const Tensor& x);
int64_t last_size(const Tensor& tensor);

}  // namespace shira
