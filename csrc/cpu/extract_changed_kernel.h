// extract_changed over one run of two tensors, for one instruction set.
//
//   indices = the positions i of [begin, end) where base[i] and tuned[i] differ, in order;   values = tuned[indices]
//
// Elements are integers of their size. The caller gives each thread its own run and room for all of it: no race.
// Nothing is computed: the same result with any runs. Blocks of elements are compared with no branch inside, and
// entered only where one differs.
#pragma once

#include <cstdint>

#include "extract_changed_types.h"

namespace shira::SHIRA_ISA {

constexpr int kExtractBlock = 32;

template <class Bits, class Index>
int64_t extract_changed_run(const void* base, const void* tuned, int64_t begin, int64_t end, void* indices,
                            void* values) {
  const Bits* __restrict w = static_cast<const Bits*>(base);
  const Bits* __restrict v = static_cast<const Bits*>(tuned);
  Index* __restrict positions = static_cast<Index*>(indices);
  Bits* __restrict entries = static_cast<Bits*>(values);
  int64_t found = 0, i = begin;
  for (; i + kExtractBlock <= end; i += kExtractBlock) {
    Bits any = 0;
    for (int j = 0; j < kExtractBlock; ++j) any |= static_cast<Bits>(w[i + j] ^ v[i + j]);
    if (any == 0) continue;
    uint32_t differs = 0;
    for (int j = 0; j < kExtractBlock; ++j) differs |= static_cast<uint32_t>(w[i + j] != v[i + j]) << j;
    for (; differs; differs &= differs - 1) {
      const int64_t at = i + __builtin_ctz(differs);
      positions[found] = static_cast<Index>(at);
      entries[found++] = v[at];
    }
  }
  for (; i < end; ++i) {
    if (w[i] == v[i]) continue;
    positions[found] = static_cast<Index>(i);
    entries[found++] = v[i];
  }
  return found;
}

inline ExtractChanged choose_extract_changed(int64_t element_size, bool wide) {
  switch (element_size) {
    case 1: return wide ? extract_changed_run<uint8_t, int64_t> : extract_changed_run<uint8_t, int32_t>;
    case 2: return wide ? extract_changed_run<uint16_t, int64_t> : extract_changed_run<uint16_t, int32_t>;
    case 4: return wide ? extract_changed_run<uint32_t, int64_t> : extract_changed_run<uint32_t, int32_t>;
    default: return wide ? extract_changed_run<uint64_t, int64_t> : extract_changed_run<uint64_t, int32_t>;
  }
}

}  // namespace shira::SHIRA_ISA
