// Which instruction sets this processor runs, and which is in use.
#include <atomic>
#include <stdexcept>

#include "isa_choice.h"

namespace shira {

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names = {"base"};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    names.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      names.push_back("avx512");
      if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
    }
  }
#endif
  return names;
}

static const CpuKernels& kernels_of(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512_bf16") {
    static const CpuKernels with_bf16 = [] {
      CpuKernels kernels = avx512_kernels;
      kernels.name = "avx512_bf16";
      kernels.masked_grad = avx512_bf16_masked_grad;
      return kernels;
    }();
    return with_bf16;
  }
  if (isa == "avx512") return avx512_kernels;
  if (isa == "avx2") return avx2_kernels;
#endif
  return base_kernels;
}

static std::atomic<int64_t>& calls_of(const CpuKernels& kernels) {
  static std::atomic<int64_t> base, avx2, avx512, avx512_bf16;
  const std::string name = kernels.name;
  return name == "avx512_bf16" ? avx512_bf16 : name == "avx512" ? avx512 : name == "avx2" ? avx2 : base;
}

void count_call(const CpuKernels& kernels) { calls_of(kernels).fetch_add(1, std::memory_order_relaxed); }

std::map<std::string, int64_t> calls_by_isa() {
  std::map<std::string, int64_t> result;
  for (const std::string& isa : runnable_isas()) result[isa] = calls_of(kernels_of(isa));
  return result;
}

static std::atomic<const CpuKernels*>& active() {
  static std::atomic<const CpuKernels*> kernels{&kernels_of(runnable_isas().back())};
  return kernels;
}

const CpuKernels& cpu_kernels() { return *active().load(std::memory_order_relaxed); }

void set_isa(const std::string& isa) {
  std::string runnable;
  for (const std::string& name : runnable_isas()) {
    if (name == isa) {
      active() = &kernels_of(isa);
      return;
    }
    runnable += (runnable.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument("instruction set must be one that this processor runs (" + runnable + "), got '" + isa +
                              "'");
}

}  // namespace shira
