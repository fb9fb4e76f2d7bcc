// What the kernels of topk_indices take.
#pragma once

#include <cstdint>

namespace shira {

// One digit of the keys of scores, from bit `shift`: which keys count, and at which place of the table.
struct TopkDigit {
  int64_t low, high;
  int64_t infinity;  // the key of infinity: what is further out is a NaN
  int64_t mask, flip;
  int shift;
};

// The scores that a digit counted: where in the run, and their bits.
struct TopkKept {
  uint32_t* positions;
  void* scores;
  int64_t room;
  int64_t count;  // -1 if there was too little room
};

// The kernels of topk_indices for elements of one size.
struct TopkIndices {
  int64_t (*key)(const void* score, int64_t i);
  // Adds to four tables of mask + 1 counters each, whose sum counts, and keeps what it counts unless `kept` is null.
  // Says whether there is a NaN.
  bool (*count)(const void* score, int64_t count, const TopkDigit& digit, uint32_t* counts, TopkKept* kept);
  // Writes, in order, the positions of [begin, end) whose key is above the threshold, and the first `ties` at it.
  void (*emit)(const void* score, int64_t begin, int64_t end, int64_t threshold, int64_t ties, void* indices,
               bool wide);
};

}  // namespace shira
