#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace shira {

constexpr int64_t kAlignment = 64;  // a cache line

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

inline std::unique_ptr<char, AlignedDelete> aligned_bytes(int64_t size) {
  return std::unique_ptr<char, AlignedDelete>(
      static_cast<char*>(::operator new(static_cast<size_t>(size), std::align_val_t{kAlignment})));
}

}  // namespace shira
