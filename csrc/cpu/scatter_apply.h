#pragma once

#include "../host/scatter_call.h"
#include "lists.h"

namespace shira {

// A checked call, ready to write.
struct ScatterWriter {
  const ScatterCall& call;
  Lists lists;
  ScatterApply apply;

  // Checks the index values. The call has weights and outlives this.
  ScatterWriter(const ScatterCall& checked, const CpuKernels& kernels);

  // Writes entries [begin, end) of a part; those up to `stop` will follow, so prefetches reach on.
  void write(const Lists::Part& part, int64_t begin, int64_t end, int64_t stop) const;
};

// Checks the index values, then writes; shared by scatter_apply and scatter_apply_batched.
void scatter_apply_cpu(const ScatterCall& call);

}  // namespace shira
