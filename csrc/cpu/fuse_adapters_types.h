// What the kernels of fuse_adapters take.
#pragma once

#include <cstdint>

#include "../shared/scatter_form.h"

namespace shira {

enum class FusePolicy : uint8_t { Sum, Mean, Last, Ties };

// What is left of one adapter's sorted list in a run of positions.
struct FuseList {
  const void* indices;
  const void* values;
  int64_t count;
  bool wide;  // int64 indices rather than int32
  float weight;
};

constexpr int64_t kFuseWindow = 16384;  // positions that are summed at a time

// What one window needs: a bit for each position that a list has, its sums, and the places of the bits. Zero between
// calls but for `last` and `places`. The sums are float32 or float64.
struct FuseScratch {
  uint64_t map[kFuseWindow / 64];
  double sums[kFuseWindow];
  double agreeing[kFuseWindow];
  uint32_t numbers[kFuseWindow];
  uint64_t last[kFuseWindow];
  uint16_t places[kFuseWindow + 4];
};

// Writes the union and its values, at pointers to their first entries; `wide`: int64 indices rather than int32.
using FuseWrite = void (*)(FuseList* lists, int64_t number, FuseScratch& scratch, void* indices, bool wide,
                           void* values);

struct FuseAdapters {
  int64_t (*count)(FuseList* lists, int64_t number, FuseScratch& scratch);  // how many positions the union has
  FuseWrite write;
};

}  // namespace shira
