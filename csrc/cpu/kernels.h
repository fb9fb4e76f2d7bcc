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
};

using ScatterApply = void (*)(const ScatterRun&, double alpha);

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

struct CpuKernels {
  const char* name;
  ScatterApply (*scatter_apply)(const ScatterForm&);
  MaskedAdamW (*masked_adamw)(const AdamWForm&);
  // Whether count indices (int64 where wide, else int32) are strictly rising.
  bool (*strictly_rising)(const void* indices, int64_t count, bool wide);
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
