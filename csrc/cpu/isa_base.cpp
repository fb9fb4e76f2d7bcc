// Kernels for every processor.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define SHIRA_ISA base
#define SHIRA_VECTOR_BYTES 16
#include "isa.h"
