// Kernels for every processor.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define SHIRA_ISA base
#include "isa.h"
