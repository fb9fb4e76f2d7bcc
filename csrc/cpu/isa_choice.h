#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "kernels.h"

namespace shira {

// Names of the instruction sets that have kernels here and that this processor runs, the best last.
std::vector<std::string> runnable_isas();

// Chooses the kernels of all later calls. Throws std::invalid_argument if this processor does not run them.
void set_isa(const std::string& isa);

// How many op calls each instruction set has run in this process.
std::map<std::string, int64_t> calls_by_isa();

}  // namespace shira
