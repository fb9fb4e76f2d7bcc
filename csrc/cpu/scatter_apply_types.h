// What the kernels of scatter_apply take.
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
  int64_t ahead;  // how many entries follow the run that are worth a prefetch
};

using ScatterApply = void (*)(const ScatterRun&, double alpha);

}  // namespace shira
