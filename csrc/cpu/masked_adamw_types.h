// What the kernels of masked_adamw take.
#pragma once

#include <cstdint>

#include "../shared/adamw_form.h"

namespace shira {

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

}  // namespace shira
