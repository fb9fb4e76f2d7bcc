#pragma once

#include "../host/scatter_call.h"

namespace shira {

// Checks the index values, then writes; shared by scatter_apply and scatter_apply_batched.
void scatter_apply_cpu(const ScatterCall& call);

}  // namespace shira
