// What the kernels of extract_changed take.
#pragma once

#include <cstdint>

namespace shira {

// Writes the positions of [begin, end) where two tensors differ, and the second's elements there, where there is room
// for all; returns how many.
using ExtractChanged = int64_t (*)(const void* base, const void* tuned, int64_t begin, int64_t end, void* indices,
                                   void* values);

}  // namespace shira
