// The per-element math of masked_adamw, the same for g++ and nvcc: torch's order of operations, none contracted.
#pragma once

#include <cmath>

#include "adamw_form.h"
#include "element.h"

namespace shira::SHIRA_ISA {

SHIRA_HD float square_root(float x) { return sqrtf(x); }
SHIRA_HD double square_root(double x) { return sqrt(x); }

// beta^step by squaring: multiplications round alike on every device, which pow does not.
SHIRA_HD double power(double beta, int64_t step) {
  double result = 1.0;
  for (; step > 0; step >>= 1) {
    if (step & 1) result *= beta;
    beta *= beta;
  }
  return result;
}

// What is the same for all entries: computed in float64, rounded once to C.
template <class C>
struct AdamW {
  C decay, lerp, beta2, one_minus_beta2, bias_correction2_sqrt, eps, negative_step_size;
  bool from_old;  // whether exp_avg's own end is the nearer one, from which torch.lerp starts

  static SHIRA_HD AdamW of(const AdamWNumbers& numbers, int64_t step) {
    AdamW a;
    a.decay = static_cast<C>(1 - numbers.lr * numbers.weight_decay);
    a.lerp = static_cast<C>(1 - numbers.beta1);
    a.from_old = a.lerp < static_cast<C>(0.5);
    if (!a.from_old) a.lerp -= 1;
    a.beta2 = static_cast<C>(numbers.beta2);
    a.one_minus_beta2 = static_cast<C>(1 - numbers.beta2);
    a.bias_correction2_sqrt = static_cast<C>(square_root(1 - power(numbers.beta2, step)));
    a.eps = static_cast<C>(numbers.eps);
    a.negative_step_size = static_cast<C>(-(numbers.lr / (1 - power(numbers.beta1, step))));
    return a;
  }

  // w, m = exp_avg and v = exp_avg_sq of one entry, by its gradient g.
  SHIRA_HD void update(C& w, C g, C& m, C& v) const {
    w = w * decay;
    m = (from_old ? m : g) + (g - m) * lerp;
    v = v * beta2 + g * one_minus_beta2 * g;
    const C denom = square_root(v) / bias_correction2_sqrt + eps;
    w = w + m * negative_step_size / denom;
  }
};

}  // namespace shira::SHIRA_ISA
