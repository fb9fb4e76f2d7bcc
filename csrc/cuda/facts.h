// What CUDA C++ kernels this build has; all empty in a build without CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace shira {

#ifdef USE_CUDA
std::vector<std::string> cuda_ops();
int64_t cuda_calls();
void set_check_indices(bool enabled);
#else
inline std::vector<std::string> cuda_ops() { return {}; }
inline int64_t cuda_calls() { return 0; }
inline void set_check_indices(bool) {}
#endif

}  // namespace shira
