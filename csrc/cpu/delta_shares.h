// How threads share the products of token groups with the rows of their adapters.
#pragma once

#include <algorithm>
#include <utility>

#include "csr.h"
#include "lists.h"

namespace shira {

constexpr int64_t kRowsTogether = 32;  // of a thread's share: what a kernel writes at a time
constexpr int64_t kBlockCost = 12;     // an entry costs as much as this many tokens in it
constexpr int64_t kAloneCost = kBlockCost + 1;
constexpr int64_t kCostPerThread = 16384 * kAloneCost;  // below this a thread costs more than it saves
constexpr int64_t kNumbersPerThread = 1 << 14;          // of those packed, the same
constexpr int64_t kMostKept = 4 << 20;                  // bytes of sums that stay from call to call, and of panels

// The rows that lie in the part [begin, end) of a cost that is entry_cost for each entry.
inline std::pair<int64_t, int64_t> share_of(const CsrRows& all, int64_t entry_cost, int64_t begin, int64_t end) {
  const auto row = [&](int64_t cost) {
    if (cost <= 0) return all.begin;
    const int64_t at = row_at(all, (cost + entry_cost - 1) / entry_cost);
    return std::min(all.end, (at + kRowsTogether - 1) / kRowsTogether * kRowsTogether);
  };
  return {row(begin), row(end)};
}

// Threads share things that have costs: f(i, begin, end) for what each has of a share's cost.
template <class Cost, class F>
void share_costs(size_t first, size_t last, int64_t chunks, const Cost& cost, const F& f) {
  int64_t total = 0;
  for (size_t i = first; i < last; ++i) total += cost(i);
  over_chunks(chunks, [&](int64_t chunk) {
    int64_t begin = total * chunk / chunks, end = total * (chunk + 1) / chunks;
    for (size_t i = first; i < last && end > 0; ++i) {
      const int64_t own = cost(i);
      if (begin < own) f(i, begin, std::min(end, own));
      begin -= own;
      end -= own;
    }
  });
}

inline int64_t threads_for(int64_t cost, int64_t cost_per_thread) {
  return std::clamp<int64_t>(cost / cost_per_thread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
}

}  // namespace shira
