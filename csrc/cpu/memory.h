#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace shira {

constexpr int64_t kAlignment = 64;  // a cache line

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

using AlignedBytes = std::unique_ptr<char, AlignedDelete>;

inline int64_t aligned_size(int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

inline AlignedBytes aligned_bytes(int64_t size) {
  return AlignedBytes(static_cast<char*>(::operator new(static_cast<size_t>(size), std::align_val_t{kAlignment})));
}

}  // namespace shira
