// Which of the variants of masked_adamw a call needs, and its hyperparameters. No torch here.
#pragma once

#include "scatter_form.h"

namespace shira {

struct AdamWForm {
  Element weight;
  Element grad;     // the weight's, or Float32
  bool wide_index;  // int64 rather than int32
  bool master;      // whether `master` is given
};

struct AdamWNumbers {
  double lr, beta1, beta2, eps, weight_decay;
};

}  // namespace shira
