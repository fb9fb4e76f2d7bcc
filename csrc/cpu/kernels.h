// The C++ kernels of one instruction set, as function pointers: what a kernel header offers to the rest of csrc/cpu.
#pragma once

#include <cstdint>

#include "../shared/scatter_form.h"

namespace shira {

// One run of the sorted list of one weight. The pointers but `weight` are at the run's first entry.
struct ScatterRun {
  void* weight;
  const void* indices;
  const void* values;
  void* saved;  // null where old entries are not kept
  int64_t count;
};

using ScatterApply = void (*)(const ScatterRun&, double alpha);

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

struct CpuKernels {
  const char* name;
  ScatterApply (*scatter_apply)(const ScatterForm&);
  // Whether count indices (int64 where wide, else int32) are strictly rising.
  bool (*strictly_rising)(const void* indices, int64_t count, bool wide);
  TopkIndices (*topk_indices)(int64_t element_size);
};

extern const CpuKernels base_kernels;
#if defined(__x86_64__)
extern const CpuKernels avx2_kernels;
extern const CpuKernels avx512_kernels;
#endif

// The kernels in use: the best that this processor runs, or what set_isa chose.
const CpuKernels& cpu_kernels();

// Counts one call of an op that ran these kernels: tests ask which kernel ran.
void count_call(const CpuKernels& kernels);

}  // namespace shira
