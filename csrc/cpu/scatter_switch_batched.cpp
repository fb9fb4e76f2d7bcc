// scatter_switch_batched on the CPU: the kernels of scatter_apply over both lists, in turn by small blocks.
//
//   entries of the old list: w = old_saved[i]; then of the new one, as in scatter_apply: saved[j] = w, w = f(w, v)
//
// A block is kBlock old entries and the new ones at positions before the next block; its lines stay in the first cache
// from the one to the other, so memory sees one pass, and an entry of both lists gets its base back before the new one
// keeps it. Threads split the positions of the weights at the beginning of a cache line, both lists at the same: no two
// threads write one line, every entry belongs to one, no race. The bits do not depend on the number of threads.
//
// NOTES.md says what was measured, and what a merge of the lists costs.
#include "scatter_apply.h"

namespace shira {
namespace {

constexpr int64_t kBlock = 64;

// Positions in both lists.
struct Cut {
  int64_t old_entry, new_entry;
};

// The cut before which `entries` entries of both lists together lie, moved on to the next cache line.
Cut cut_after(int64_t entries, const Lists& old_lists, const Lists& new_lists) {
  if (entries == 0) return {0, 0};
  if (entries == old_lists.nnz + new_lists.nnz) return {old_lists.nnz, new_lists.nnz};
  size_t i = 0;
  while (old_lists.parts[i].end + new_lists.parts[i].end <= entries) ++i;
  const Lists::Part &old_part = old_lists.parts[i], &new_part = new_lists.parts[i];
  const auto cut_at = [&](int64_t position) {
    return Cut{old_lists.find(old_part, position), new_lists.find(new_part, position)};
  };
  int64_t low = 0, high = 0;
  if (old_part.begin < old_part.end) high = old_lists.index(old_part.end - 1) + 1;
  if (new_part.begin < new_part.end) high = std::max(high, new_lists.index(new_part.end - 1) + 1);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const Cut cut = cut_at(middle);
    if (cut.old_entry + cut.new_entry < entries)
      low = middle + 1;
    else
      high = middle;
  }
  return cut_at(line_begin(low, reinterpret_cast<uintptr_t>(old_part.weight), old_lists.element_size));
}

void switch_between(const ScatterWriter& old_writer, const ScatterWriter& new_writer, const Cut& begin,
                    const Cut& end) {
  for (size_t part = 0; part < old_writer.lists.parts.size(); ++part) {
    const Lists::Part &old_part = old_writer.lists.parts[part], &new_part = new_writer.lists.parts[part];
    int64_t i = std::clamp(begin.old_entry, old_part.begin, old_part.end);
    int64_t j = std::clamp(begin.new_entry, new_part.begin, new_part.end);
    const int64_t old_end = std::clamp(end.old_entry, old_part.begin, old_part.end);
    const int64_t new_end = std::clamp(end.new_entry, new_part.begin, new_part.end);
    while (i < old_end || j < new_end) {
      const int64_t i_end = std::min(i + kBlock, old_end);
      int64_t j_end = new_end;
      if (i_end < old_end) {
        const int64_t next = old_writer.lists.index(i_end);
        for (j_end = j; j_end < new_end && new_writer.lists.index(j_end) < next;) ++j_end;
      }
      old_writer.write(old_part, i, i_end, old_end);
      new_writer.write(new_part, j, j_end, new_end);
      i = i_end, j = j_end;
    }
  }
}

void scatter_switch_batched(const std::vector<Tensor>& weights, const Tensor& old_offsets, const Tensor& old_indices,
                            const Tensor& old_saved, const Tensor& offsets, const Tensor& indices, const Tensor& values,
                            const Tensor& saved, double alpha, bool additive) {
  const char* op = "scatter_switch_batched";
  const std::optional<Tensor> keep(saved);
  const SwitchCall call =
      check_switch(op, weights, old_offsets, old_indices, old_saved, offsets, indices, values, alpha, additive, keep);
  if (weights.empty()) return;
  const CpuKernels& kernels = cpu_kernels();
  const ScatterWriter old_writer(call.from, kernels), new_writer(call.to, kernels);

  announce_writes(call.to);
  count_call(kernels);
  const int64_t entries = old_writer.lists.nnz + new_writer.lists.nnz;
  over_threads(entries, [&](int64_t chunk, int64_t chunks) {
    const auto cut = [&](int64_t at) { return cut_after(at * entries / chunks, old_writer.lists, new_writer.lists); };
    switch_between(old_writer, new_writer, cut(chunk), cut(chunk + 1));
  });
}

}  // namespace
}  // namespace shira

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) {
  m.impl("scatter_switch_batched", TORCH_BOX(&shira::scatter_switch_batched));
}
