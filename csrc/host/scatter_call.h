// The arguments of scatter_apply and its batched forms, checked: what a kernel of any device starts from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checks.h"

namespace shira {

struct ScatterCall {
  const char* op;
  std::vector<WeightPart> parts;
  const Tensor* offsets;  // null for scatter_apply
  const Tensor& indices;
  const Tensor& values;
  double alpha;
  const std::optional<Tensor>& saved;
  ScatterForm form;
  ListNames names;
};

// Checks everything that needs no index value. The result refers to the arguments.
ScatterCall check_scatter(const char* op, std::vector<WeightPart> parts, const Tensor* offsets, const Tensor& indices,
                          const Tensor& values, double alpha, bool additive, const std::optional<Tensor>& saved,
                          const ListNames& names = {});

ScatterCall check_scatter_batched(const char* op, const std::vector<Tensor>& weights, const Tensor& offsets,
                                  const Tensor& indices, const Tensor& values, double alpha, bool additive,
                                  const std::optional<Tensor>& saved, const ListNames& names = {});

// One adapter out of several weights, `from`, and another in, `to`.
struct SwitchCall {
  ScatterCall from, to;
};

// The weights, which both lists share, are checked once.
SwitchCall check_switch(const char* op, const std::vector<Tensor>& weights, const Tensor& old_offsets,
                        const Tensor& old_indices, const Tensor& old_saved, const Tensor& offsets,
                        const Tensor& indices, const Tensor& values, double alpha, bool additive,
                        const std::optional<Tensor>& saved);

// Tells autograd what is about to be written; refuses what requires grad outside no_grad. Call it before the first
// write.
void announce_writes(const ScatterCall& call);

}  // namespace shira
