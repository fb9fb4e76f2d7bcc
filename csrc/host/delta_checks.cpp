#include "delta_checks.h"

#include <limits>

namespace shira {
namespace {

void check_place(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  if (!same_device(tensor, like)) fail(op, argument, "must be on the device of x");
  check_storage(op, argument, tensor);
  if (!tensor.is_contiguous()) fail(op, argument, "must be contiguous");
}

// The two index tensors of a matrix, of any shape: dtypes, the device of `like`, contiguous.
void check_csr_dtypes(const char* op, const Tensor& row_ptr, const Tensor& col, const Tensor& like) {
  const int32_t row_dtype = dtype_of(row_ptr), col_dtype = dtype_of(col);
  if (row_dtype != aoti_torch_dtype_int64() && row_dtype != aoti_torch_dtype_int32())
    fail(op, "row_ptr", "must be int32 or int64, got " + dtype_name(row_dtype));
  if (col_dtype != aoti_torch_dtype_int32() && col_dtype != aoti_torch_dtype_uint16())
    fail(op, "col", "must be int32 or uint16, got " + dtype_name(col_dtype));
  check_place(op, "row_ptr", row_ptr, like);
  check_place(op, "col", col, like);
}

}  // namespace

void check_csr(const char* op, const Tensor& row_ptr, const Tensor& col, const Tensor& like, int64_t rows,
               const char* what) {
  check_csr_dtypes(op, row_ptr, col, like);
  for (const Argument& argument : {Argument{"row_ptr", row_ptr}, Argument{"col", col}})
    if (argument.tensor.dim() != 1) fail(op, argument.name, "must be 1-D, got shape " + shape_of(argument.tensor));
  if (rows < 0) fail(op, "out_features", "must not be negative, got " + std::to_string(rows));
  if (row_ptr.numel() - 1 != rows)
    fail(op, "row_ptr",
         "must have one entry more than " + std::string(what) + " (" + std::to_string(static_cast<uint64_t>(rows) + 1) +
             "), got " + std::to_string(row_ptr.numel()));
}

void check_input(const char* op, const Tensor& x) {
  const int32_t dtype = dtype_of(x);
  if (element_of(dtype) == Element::Other)
    fail(op, "x", "must be float64, float32, bfloat16 or float16, got " + dtype_name(dtype));
  if (x.dim() == 0) fail(op, "x", "must have at least one dimension, [..., in]");
  check_storage(op, "x", x);
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
  check_storage(op, "values", values);
}

void check_out(const char* op, const Tensor& out, const Tensor& x) {
  if (dtype_of(out) != dtype_of(x))
    fail(op, "out", "must be " + dtype_name(dtype_of(x)) + " like x, got " + dtype_name(dtype_of(out)));
  if (!same_device(out, x)) fail(op, "out", "must be on the device of x");
  bool same = out.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = out.size(i) == x.size(i);
  if (!same) fail(op, "out", "must be [..., out] beside x [..., in] " + shape_of(x) + ", got " + shape_of(out));
  if (!out.is_contiguous()) fail(op, "out", "must be contiguous");
  check_storage(op, "out", out);
}

void check_adapters(const char* op, const Tensor& x, const Tensor& token_adapter, const Tensor& row_ptr,
                    const Tensor& col, const Tensor& values, int64_t rows, const std::optional<Tensor>& page_table) {
  check_input(op, x);
  if (dtype_of(token_adapter) != aoti_torch_dtype_int32())
    fail(op, "token_adapter", "must be int32, got " + dtype_name(dtype_of(token_adapter)));
  if (token_adapter.dim() != 1) fail(op, "token_adapter", "must be 1-D, got shape " + shape_of(token_adapter));
  check_place(op, "token_adapter", token_adapter, x);
  if (token_adapter.numel() != tokens_of(x))
    fail(op, "token_adapter",
         "must have one entry per row of x (" + std::to_string(tokens_of(x)) + "), got " +
             std::to_string(token_adapter.numel()));
  check_csr_dtypes(op, row_ptr, col, x);
  if (rows < 0) fail(op, "out_features", "must not be negative, got " + std::to_string(rows));
  if (row_ptr.dim() != 2 || row_ptr.size(1) - 1 != rows)
    fail(op, "row_ptr", "must be [adapters, out + 1] with out " + std::to_string(rows) + ", got " + shape_of(row_ptr));
  if (!page_table) {
    if (col.dim() != 1) fail(op, "col", "must be 1-D unless there is a page_table, got shape " + shape_of(col));
    return check_values(op, values, col, x);
  }
  check_place(op, "page_table", *page_table, x);
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

int64_t tokens_of(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i)  // without columns there may be more than a number holds
    if (__builtin_mul_overflow(tokens, x.size(i), &tokens)) tokens = std::numeric_limits<int64_t>::max();
  return tokens;
}

int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

}  // namespace shira
