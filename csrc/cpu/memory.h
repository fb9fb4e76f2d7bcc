#pragma once

#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Memory that lasts from call to call, on pages of 2 MB where the system gives them: what is read here and there is
// then found without a walk through tables, and the pages need not be cleared each time.
class KeptBytes {
 public:
  KeptBytes() = default;
  KeptBytes(const KeptBytes&) = delete;
  KeptBytes& operator=(const KeptBytes&) = delete;
  ~KeptBytes() { release(); }

  // What was there before is lost.
  char* at_least(int64_t size) {
    if (size > size_) {
      release();
      reserve((size + kPage - 1) / kPage * kPage);
    }
    return bytes_;
  }

 private:
  static constexpr int64_t kPage = 1 << 21;

#ifdef __linux__
  void reserve(int64_t size) {
    void* all =
        mmap(nullptr, static_cast<size_t>(size + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    all_ = all;
    size_ = size;
    bytes_ = reinterpret_cast<char*>((reinterpret_cast<intptr_t>(all) + kPage - 1) / kPage * kPage);
    madvise(bytes_, static_cast<size_t>(size), MADV_HUGEPAGE);  // where it is refused, small pages do
  }
  void release() {
    if (all_) munmap(all_, static_cast<size_t>(size_ + kPage));
    all_ = nullptr;
    size_ = 0;
  }
  void* all_ = nullptr;
  char* bytes_ = nullptr;
#else
  void reserve(int64_t size) {
    all_ = aligned_bytes(size);
    bytes_ = all_.get();
    size_ = size;
  }
  void release() {
    all_.reset();
    size_ = 0;
  }
  AlignedBytes all_;
  char* bytes_ = nullptr;
#endif
  int64_t size_ = 0;
};

// Memory for one call: the thread's kept one until its next call, or, where that would be too much to keep, its own.
class CallBytes {
 public:
  CallBytes() = default;
  CallBytes(KeptBytes& kept, int64_t size, int64_t most_kept)
      : own_(size > most_kept ? aligned_bytes(size) : nullptr), bytes_(own_ ? own_.get() : kept.at_least(size)) {}

  char* get() const { return bytes_; }

 private:
  AlignedBytes own_;
  char* bytes_ = nullptr;
};

}  // namespace shira
