// The arguments of masked_adamw, checked: what a kernel of any device starts from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../shared/adamw_form.h"
#include "checks.h"

namespace shira {

struct AdamWCall {
  const char* op;
  std::vector<WeightPart> parts;
  const Tensor& offsets;
  const Tensor& indices;
  const std::vector<Tensor>& grads;
  std::vector<bool> dense;  // of each gradient, whether it has its weight's shape
  const Tensor& exp_avg;
  const Tensor& exp_avg_sq;
  const std::optional<Tensor>& master;
  const Tensor& step;
  int64_t step_count;  // 0 where `step` is on a device, unread
  AdamWNumbers numbers;
  AdamWForm form;
};

// Checks everything that needs no index value. The result refers to the arguments.
AdamWCall check_adamw(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets, const Tensor& indices,
                      const std::vector<Tensor>& grads, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                      const std::optional<Tensor>& master, const Tensor& step, const AdamWNumbers& numbers);

// The number of a step read from `step`: whole and at least 1.
int64_t check_step(const char* op, float step);

// One entry per index of its weight in each compact gradient; for `borders` that only a device knew at first.
void check_compact(const AdamWCall& call, const int64_t* borders);

// Tells autograd what is about to be written; refuses what requires grad outside no_grad. Call it before the first
// write.
void announce_writes(const AdamWCall& call);

}  // namespace shira
