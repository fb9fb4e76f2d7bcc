// The C++ kernels of one instruction set, as function pointers: what a kernel header offers to the rest of csrc/cpu.
#pragma once

#include <cstdint>

#include "../shared/adamw_form.h"
#include "../shared/scatter_form.h"

namespace shira {

// One run of the sorted list of one weight. The pointers but `weight` are at the run's first entry.
struct ScatterRun {
  void* weight;
  const void* indices;
  const void* values;
  void* saved;  // null where old entries are not kept
  int64_t count;
  int64_t ahead;  // how many entries follow the run that are worth a prefetch
};

using ScatterApply = void (*)(const ScatterRun&, double alpha);

// Panels of masked_grad: for each column of an operand, its elements of one block of tokens as one vector. Measured
// over 4096 x 4096 and 1024 x 1024: vectors of 512 bytes and 2048 columns, which together stay in a second cache of 2
// MB, are 10 % faster than 1024 columns, and than 1024 columns of 1024 bytes; a wider panel saves packings of the other
// operand. The cache line at each end spreads the columns over the cache's sets.
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

// Rows [begin, end) of a matrix in CSR form, whose entries lie side by side: entry e of row r, where
// border(r) <= e < border(r + 1), is at col[e + shift].
struct CsrRows {
  const void* row_ptr;
  const void* col;
  bool wide_row_ptr, wide_col;  // int64 rather than int32, int32 rather than uint16
  int64_t columns;
  int64_t begin, end;
  int64_t shift;

  int64_t border(int64_t row) const {
    return wide_row_ptr ? static_cast<const int64_t*>(row_ptr)[row] : static_cast<const int32_t*>(row_ptr)[row];
  }
  int64_t count() const { return border(end) - border(begin); }
};

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

// The kernel of the panel that suits so many tokens; `value` is the element type of values, `columns` what a panel
// holds.
using ChooseSparseDeltaMm = SparseDeltaMm (*)(Element x, Element value, bool wide_col, int64_t columns, int64_t tokens);

// One run of the sorted list of one weight. The pointers but `weight` and a dense `grad` are at the run's first entry.
struct AdamWRun {
  void* weight;
  const void* indices;
  const void* grad;
  bool dense;  // whether grad has the weight's shape
  void* exp_avg;
  void* exp_avg_sq;
  void* master;  // null where there is none
  int64_t count;
};

using MaskedAdamW = void (*)(const AdamWRun&, const AdamWNumbers&, int64_t step);

// One digit of the keys of scores, from bit `shift`: which keys count, and at which place of the table.
struct TopkDigit {
  int64_t low, high;
  int64_t infinity;  // the key of infinity: what is further out is a NaN
  int64_t mask, flip;
  int shift;
};

// The scores that a digit counted: where in the run, and their bits.
struct TopkKept {
  uint32_t* positions;
  void* scores;
  int64_t room;
  int64_t count;  // -1 if there was too little room
};

// The kernels of topk_indices for elements of one size.
struct TopkIndices {
  int64_t (*key)(const void* score, int64_t i);
  // Adds to four tables of mask + 1 counters each, whose sum counts, and keeps what it counts unless `kept` is null.
  // Says whether there is a NaN.
  bool (*count)(const void* score, int64_t count, const TopkDigit& digit, uint32_t* counts, TopkKept* kept);
  // Writes, in order, the positions of [begin, end) whose key is above the threshold, and the first `ties` at it.
  void (*emit)(const void* score, int64_t begin, int64_t end, int64_t threshold, int64_t ties, void* indices,
               bool wide);
};

enum class FusePolicy : uint8_t { Sum, Mean, Last, Ties };

// What is left of one adapter's sorted list in a run of positions.
struct FuseList {
  const void* indices;
  const void* values;
  int64_t count;
  bool wide;  // int64 indices rather than int32
  float weight;
};

constexpr int64_t kFuseWindow = 16384;  // positions that are summed at a time

// Of one window: a bit for each position that a list has, its sums, and the places of the bits. Zero between calls but
// for `last` and `places`. The sums are float32 or float64.
struct FuseScratch {
  uint64_t map[kFuseWindow / 64];
  double sums[kFuseWindow];
  double agreeing[kFuseWindow];
  uint32_t numbers[kFuseWindow];
  uint64_t last[kFuseWindow];
  uint16_t places[kFuseWindow + 4];
};

// Writes the union and its values, at pointers to their first entries; `wide`: int64 indices rather than int32.
using FuseWrite = void (*)(FuseList* lists, int64_t number, FuseScratch& scratch, void* indices, bool wide,
                           void* values);

struct FuseAdapters {
  int64_t (*count)(FuseList* lists, int64_t number, FuseScratch& scratch);  // how many positions the union has
  FuseWrite write;
};

// Writes the positions of [begin, end) where two tensors differ, and the second's elements there, where there is room
// for all; returns how many.
using ExtractChanged = int64_t (*)(const void* base, const void* tuned, int64_t begin, int64_t end, void* indices,
                                   void* values);

// A block of coded indices: see docs/format.md.
struct IndexBlock {
  const uint8_t* gaps;
  const uint8_t* escapes;
  const uint8_t* escapes_end;
  int64_t count;
  int64_t before;  // the index before the block's first, or -1
  int64_t last;    // what its last index must be, or -1 where that is open
  int64_t limit;   // all must be below
};

enum class DecodeError : uint8_t { None, EscapesEnd, EscapesLeft, LongEscape, Outside, Border };

struct CpuKernels {
  const char* name;
  ScatterApply (*scatter_apply)(const ScatterForm&);
  ChooseMaskedGrad masked_grad;  // wide_col: int32 rather than uint16
  MaskedAdamW (*masked_adamw)(const AdamWForm&);
  TopkIndices (*topk_indices)(int64_t element_size);
  FuseAdapters (*fuse_adapters)(Element value, FusePolicy policy);
  ExtractChanged (*extract_changed)(int64_t element_size, bool wide);  // wide: int64 rather than int32 indices
  // Whether count indices (int64 where wide, else int32) are strictly rising.
  bool (*strictly_rising)(const void* indices, int64_t count, bool wide);
  ChooseSparseDeltaMm sparse_delta_mm;
  ChooseSparseDeltaToken sparse_delta_token;
  // Whether borders (int64 where wide, else int32) never fall.
  bool (*row_ptr_rises)(const void* row_ptr, int64_t count, bool wide);
  // Whether columns are sorted and unique in each row, and lie in [0, columns).
  bool (*columns_fit)(const CsrRows&);
  // Writes block.count indices; on an error what they hold is undefined.
  DecodeError (*decode_indices)(const IndexBlock& block, void* indices, bool wide);
  // How many bytes the escapes of count indices take, and the code; `before` is the index before the first, or -1.
  int64_t (*escape_bytes)(const void* indices, bool wide, int64_t count, int64_t before);
  void (*encode_indices)(const void* indices, bool wide, int64_t count, int64_t before, uint8_t* gaps,
                         uint8_t* escapes);
};

extern const CpuKernels base_kernels;
#if defined(__x86_64__)
extern const CpuKernels avx2_kernels;
extern const CpuKernels avx512_kernels;
extern const ChooseMaskedGrad avx512_bf16_masked_grad;  // all else is as in avx512_kernels
#endif

// The kernels in use: the best that this processor runs, or what set_isa chose.
const CpuKernels& cpu_kernels();

// Counts one call of an op that ran these kernels: tests ask which kernel ran.
void count_call(const CpuKernels& kernels);

}  // namespace shira
