// How threads share a sorted list of entries.
#pragma once

#include <cstdint>

namespace shira {

constexpr uintptr_t kCacheLine = 64;  // bytes

// Moves position i of the part [begin, end) on to the first entry that lies on another cache line than the one before
// it. index(i) is the flat position of entry i in the weight, which begins at `address`.
template <class Index>
int64_t next_line(int64_t i, int64_t begin, int64_t end, uintptr_t address, int64_t element_size, const Index& index) {
  const auto line = [&](int64_t at) {
    return (address + static_cast<uintptr_t>(index(at) * element_size)) / kCacheLine;
  };
  while (i > begin && i < end && line(i) == line(i - 1)) ++i;
  return i;
}

// The first position at or after the given one that begins a cache line of the weight, which begins at `address`.
inline int64_t line_begin(int64_t position, uintptr_t address, int64_t element_size) {
  const uintptr_t at = address + static_cast<uintptr_t>(position * element_size);
  const uintptr_t line = (at + kCacheLine - 1) / kCacheLine * kCacheLine;
  return (static_cast<int64_t>(line - address) + element_size - 1) / element_size;
}

}  // namespace shira
