#pragma once

#include "../host/scatter_call.h"

namespace shira {

// Launches on the current stream of the weights' device; shared by scatter_apply and scatter_apply_batched.
void scatter_apply_cuda(const ScatterCall& call);

}  // namespace shira
