// The module shira_kernels._C. Importing it registers the C++ kernels; what it offers itself are facts and the choice
// of the instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "cpu/isa_choice.h"
#include "cpu/split.h"
#include "cuda/facts.h"

PYBIND11_MODULE(_C, m) {
  m.def("runnable_isas", shira::runnable_isas,
        "Instruction sets with kernels that this processor runs, the best last.");
  m.def("isa", [] { return shira::cpu_kernels().name; }, "The instruction set in use.");
  m.def("set_isa", shira::set_isa, "Chooses the instruction set; ValueError if this processor does not run it.");
  m.def("calls_by_isa", shira::calls_by_isa, "How many op calls each instruction set has run in this process.");
  m.def(
      "next_line",
      [](const std::vector<int64_t>& indices, int64_t i, uintptr_t address, int64_t element_size) {
        return shira::next_line(i, 0, static_cast<int64_t>(indices.size()), address, element_size,
                                [&](int64_t at) { return indices[at]; });
      },
      "Where a thread's share that nominally begins at entry i begins; for tests.");
  m.def("line_begin", shira::line_begin, "The first position that begins a cache line, from one on; for tests.");
  m.def("cuda_ops", shira::cuda_ops, "Ops with a CUDA C++ kernel in this build.");
  m.def("cuda_calls", shira::cuda_calls, "How many op calls CUDA C++ kernels have run in this process.");
  m.def("set_check_indices", shira::set_check_indices, "Whether CUDA C++ kernels check indices first, which waits.");
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["compiler"] = __VERSION__;
    facts["torch headers"] = TORCH_VERSION;
#ifdef SHIRA_CUDA_ARCHITECTURES
    facts["cuda architectures"] = SHIRA_CUDA_ARCHITECTURES;
#endif
    return facts;
  });
}
