// scatter_switch_batched in CUDA C++: one launch over both lists.
//
//   entry i of the new list, at j of the old one if it is there too: w = old_saved[j] | weight[indices[i]];
//     saved[i] = w; weight[indices[i]] <- v | w + alpha (v - w) | w + alpha v, v = values[i]
//   entry j of the old list alone: weight[old_indices[j]] <- old_saved[j]
//
// Shapes: each list as in scatter_apply_batched. The first blocks have kChunk neighbours each of the new list, the
// others of the old one. An entry of both lists belongs to the new one; the old list's blocks leave it alone. So each
// entry has one owner, and nobody reads what another writes: no atomics, no race. float32 arithmetic (float64 for
// float64), rounded once. Deterministic.
// Nothing outside is read or written whatever the lists hold: indices are compared with their weight's size, places in
// a list with its length. Of lists that are not sorted entries of both may not be found.
//
// Speed: bytes are those of both lists plus a sector of 32 bytes of the weight for each one touched, read for the new
// list, written for both. Chain: indices -> the ends of the block's window in the other list, two trips to memory up to
// 2^16 entries of a part and three up to 2^24, taken by the whole block -> the window, into shared memory, where each
// entry searches -> stores. Values and old entries are loaded before that and lie beside it, so memory is busy through
// it. Where a block lies in several parts, or its window is too large, each entry searches its part in memory: a trip
// to the cache for every doubling.
#pragma once

#include "scatter_apply.cuh"

namespace shira {

enum : int { kNew = 0, kOld = 1 };  // the lists of a batch
template <class Index>
constexpr int kWindow = 16384 / sizeof(Index);

// int32 where both lists are; else each of either, which a flag tells.
template <bool kWide>
struct IndexList {
  using Index = std::conditional_t<kWide, int64_t, int32_t>;
  const void* indices;
  bool wide;

  __device__ Index operator[](int64_t i) const {
    if (kWide && wide) return static_cast<Index>(static_cast<const int64_t*>(indices)[i]);
    return static_cast<const int32_t*>(indices)[i];
  }
};

template <bool kWide, class T, class V>
struct SwitchLists {
  IndexList<kWide> indices[2];
  const V* values;
  const T* old_saved;
  T* saved;
};

// Places [low, high) of a list, of which one is looked for; the whole block narrows them by the number of its pivots
// that come before that one.
struct Places {
  int64_t low, high;

  __device__ int64_t step() const { return (high - low + kThreads - 1) / kThreads; }
  __device__ int64_t pivot() const { return low + (threadIdx.x + 1) * step() - 1; }
  __device__ void narrow(int before) {
    const int64_t by = step();
    low += before * by;
    high = min(low + by - 1, high);
  }
};

// The part of a target in a list, inside the list whatever the borders are.
template <class Target, int kParts>
__device__ inline Places part_places(const Batch<Target, kParts>& batch, int list, int part) {
  const ListRange& range = batch.lists[list];
  const int64_t low = min(max(border(batch, list, part), range.begin), range.end);
  return {low, min(max(border(batch, list, part + 1), low), range.end)};
}

// Where the other list has what equals the entries of a run that lies in one part; called by all threads.
template <int kOwn, bool kWide, int kParts>
__device__ inline Places window_of(const Batch<WeightTarget<2>, kParts>& batch, const IndexList<kWide> (&indices)[2],
                                   const Run& run) {
  const IndexList<kWide>& list = indices[1 - kOwn];
  const auto first = indices[kOwn][run.begin], last = indices[kOwn][run.end - 1];
  Places from = part_places(batch, 1 - kOwn, run.first_part), to = from;
#pragma unroll 1
  while (from.low < from.high || to.low < to.high) {
    const int64_t at = from.pivot(), to_at = to.pivot();
    const bool before = at < from.high && list[at] < first;
    const bool not_after = to_at < to.high && list[to_at] <= last;
    from.narrow(__syncthreads_count(before));
    to.narrow(__syncthreads_count(not_after));
  }
  return {from.low, max(from.low, to.low)};
}

// Calls f(k, place in the other list) for the entries i = start + k * kThreads of a run that are there too; called by
// all threads. The searches of a thread go side by side.
template <int kOwn, bool kWide, int kParts, class Index, class F>
__device__ inline void for_each_found(const Batch<WeightTarget<2>, kParts>& batch, const IndexList<kWide> (&indices)[2],
                                      const Run& run, const int (&parts)[kEntries], const Index (&index)[kEntries],
                                      Index (&window)[kWindow<Index>], const F& f) {
  const IndexList<kWide>& list = indices[1 - kOwn];
  if (run.first_part == run.last_part) {
    const Places places = window_of<kOwn>(batch, indices, run);
    if (places.high - places.low <= kWindow<Index>) {
      const auto size = static_cast<int>(places.high - places.low);
      for (int at = threadIdx.x; at < size; at += kThreads) window[at] = list[places.low + at];
      __syncthreads();
      int at[kEntries] = {};
#pragma unroll 1
      for (int step = kWindow<Index>; step > 0; step >>= 1) {
        if (step > size) continue;
#pragma unroll
        for (int k = 0; k < kEntries; ++k)
          if (at[k] + step <= size && window[at[k] + step - 1] < index[k]) at[k] += step;
      }
#pragma unroll
      for (int k = 0; k < kEntries; ++k)
        if (at[k] < size && window[at[k]] == index[k]) f(k, places.low + at[k]);
      return;
    }
  }
  Places places[kEntries];
  int64_t longest = 0;
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    places[k] = part_places(batch, 1 - kOwn, parts[k]);
    longest = max(longest, places[k].high - places[k].low);
  }
  unsigned hits = 0;
#pragma unroll 1
  for (; longest > 0; longest >>= 1) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      if (places[k].low >= places[k].high) continue;
      const int64_t middle = (places[k].low + places[k].high) >> 1;
      const auto other = list[middle];
      if (other < index[k]) {
        places[k].low = middle + 1;
      } else {
        places[k].high = middle;
        if (other == index[k]) places[k].low = middle, hits |= 1u << k;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kEntries; ++k)
    if (hits >> k & 1) f(k, places[k].low);
}

// A block of the list kOwn, the block-th of it.
template <int kOwn, Mode kMode, int kParts, bool kWide, class T, class V>
__device__ inline void switch_block(
    const Batch<WeightTarget<2>, kParts>& batch, const SwitchLists<kWide, T, V>& lists, int64_t block, double alpha,
    typename IndexList<kWide>::Index (&window)[kWindow<typename IndexList<kWide>::Index>]) {
  const int64_t begin = batch.lists[kOwn].begin + block * kChunk;
  const int64_t end = min(begin + kChunk, batch.lists[kOwn].end), start = begin + threadIdx.x;
  typename IndexList<kWide>::Index index[kEntries];
  V v[kEntries];
  T w[kEntries];  // what the entry is without any adapter
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    index[k] = -1;
    if (i >= end) continue;
    index[k] = lists.indices[kOwn][i];
    if (kOwn == kNew)
      v[k] = lists.values[i];
    else
      w[k] = lists.old_saved[i];
  }
  const Run run = run_of(batch, kOwn, begin, end);
  if (run.begin >= run.end) return;  // all threads of the block
  int parts[kEntries];
  parts_of(batch, kOwn, run, start, parts);
  T* entries[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const int64_t i = start + k * kThreads;
    entries[k] = nullptr;
    if (i < run.begin || i >= run.end) continue;
    const auto& target = batch.targets[parts[k]];
    if (!is_inside(index[k], target.numel)) continue;
    entries[k] = static_cast<T*>(target.weight) + index[k];
    if (kOwn == kNew) w[k] = *entries[k];
  }
  for_each_found<kOwn>(batch, lists.indices, run, parts, index, window, [&](int k, int64_t place) {
    if (entries[k] == nullptr) return;
    if (kOwn == kNew)
      w[k] = lists.old_saved[place];
    else
      entries[k] = nullptr;  // the new list's
  });
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    if (entries[k] == nullptr) continue;
    if (kOwn == kNew) {
      lists.saved[start + k * kThreads] = w[k];
      *entries[k] = updated<kMode>(w[k], v[k], alpha);
    } else {
      *entries[k] = w[k];
    }
  }
}

template <Mode kMode, int kParts, bool kWide, class T, class V>
__global__ void __launch_bounds__(kThreads, kWide || sizeof(T) == 8 ? 3 : 4)  // registers: none spilled
    scatter_switch_kernel(const __grid_constant__ Batch<WeightTarget<2>, kParts> batch,
                          const __grid_constant__ SwitchLists<kWide, T, V> lists, unsigned new_blocks, double alpha) {
  using Index = typename IndexList<kWide>::Index;
  __shared__ Index window[kWindow<Index>];
  if (blockIdx.x < new_blocks)
    switch_block<kNew, kMode>(batch, lists, blockIdx.x, alpha, window);
  else
    switch_block<kOld, kMode>(batch, lists, blockIdx.x - new_blocks, alpha, window);
}

}  // namespace shira
