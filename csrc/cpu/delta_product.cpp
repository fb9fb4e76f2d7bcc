// Blocks of tokens go in waves, as many as have their panels in the threads' caches at a time. All threads pack the
// wave's panels, then each goes over its share of all the wave's rows. With as many like blocks as threads that is a
// block for each thread, which has packed it, too; with one block, or many small ones, threads share rows by cost.
// Before that come the tokens that are alone, all at once.
#include "delta_product.h"

#include <algorithm>

#include "delta_shares.h"

namespace shira {
namespace {

constexpr int64_t kWaveBytes = 3 << 19;  // of panels, for each thread

// One block of tokens of a group, in a wave.
struct Block {
  const TokenGroup* group;
  SparseDeltaMm kernel;
  TokenBlock block;
  int64_t panel_begin;  // bytes in the wave's panels
  int64_t entry_cost;

  int64_t cost() const { return cost_of(group->entries.rows) * entry_cost; }
};

// The blocks of all groups, in their order.
std::vector<Block> blocks_of(const TokenGroups& groups, const CpuKernels& kernels, Element element, Element value,
                             TokenBlock block) {
  std::vector<Block> blocks;
  for (const TokenGroup& group : groups.groups) {
    if (is_alone(group)) continue;
    for (int64_t t = group.begin; t < group.end;) {
      const SparseDeltaMm kernel =
          kernels.sparse_delta_mm(element, value, group.entries.rows.wide_col, block.columns, group.end - t);
      block.tokens = groups.tokens.data() + t;
      block.count = std::min(kernel.tokens, group.end - t);
      blocks.push_back({&group, kernel, block, 0, kBlockCost + kernel.tokens});
      t += block.count;
    }
  }
  return blocks;
}

void run_wave(const std::vector<Block>& blocks, size_t wave_begin, size_t wave_end, int64_t chunks) {
  const int64_t columns = blocks[wave_begin].block.columns;
  const int64_t all_columns = static_cast<int64_t>(wave_end - wave_begin) * columns;
  int64_t numbers = 0;
  for (size_t i = wave_begin; i < wave_end; ++i) numbers += columns * blocks[i].kernel.tokens;
  const int64_t packers = std::clamp<int64_t>(numbers / kNumbersPerThread, 1, chunks);
  over_chunks(packers, [&](int64_t chunk) {
    const auto border = [&](int64_t k) { return k == packers ? all_columns : all_columns * k / packers / 16 * 16; };
    int64_t begin = border(chunk), end = border(chunk + 1);
    for (size_t i = wave_begin; i < wave_end; ++i, begin -= columns, end -= columns)
      if (begin < columns && end > 0)
        blocks[i].kernel.pack(blocks[i].block, std::max<int64_t>(begin, 0), std::min(end, columns));
  });
  share_costs(
      wave_begin, wave_end, chunks, [&](size_t i) { return blocks[i].cost(); },
      [&](size_t i, int64_t begin, int64_t end) {
        const Block& block = blocks[i];
        const auto [first, last] = share_of(block.group->entries.rows, block.entry_cost, begin, end);
        for (const DeltaPiece& piece : block.group->pieces) {
          CsrRows rows = piece.rows;
          rows.begin = std::max(rows.begin, first);
          rows.end = std::min(rows.end, last);
          if (rows.begin < rows.end) block.kernel.run(block.block, rows, piece.values);
        }
      });
}

// Adds the sums of the tokens that are alone to `out`, or writes them.
void write_sums(const TokenGroups& groups, const Tensor& out, bool accumulate) {
  const std::vector<const TokenGroup*> alone = alone_in(groups);
  if (alone.empty()) return;
  const auto count = static_cast<int64_t>(alone.size());
  const int64_t rows = last_size(out), sum_bytes = aligned_size(rows * groups.alone.number_bytes);
  const int64_t chunks = std::min(count, threads_for(count * rows, kNumbersPerThread));
  over_chunks(chunks, [&](int64_t chunk) {
    for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i) {
      const int64_t at = groups.tokens[alone[i]->begin] * rows * static_cast<int64_t>(out.element_size());
      groups.alone.write(groups.sums.get() + i * sum_bytes, rows, accumulate, static_cast<char*>(out.data_ptr()) + at);
    }
  });
}

}  // namespace

Tensor new_output(const char* op, const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(rows);
  try {
    return torch::stable::new_empty(x, shape);
  } catch (const std::runtime_error&) {  // which says nothing of why
    fail(op, "x", "must have a result that fits in memory, got shape " + shape_of(x));
  }
}

void multiply(const TokenGroups& groups, const Tensor& x, const Tensor& values, const Tensor& out, bool accumulate) {
  const CpuKernels& kernels = cpu_kernels();
  count_call(kernels);
  const TokenBlock operands{nullptr,        0,         x.data_ptr(), last_size(x), nullptr, out.data_ptr(),
                            last_size(out), accumulate};
  if (operands.rows == 0) return;
  std::vector<Block> blocks =
      blocks_of(groups, kernels, element_of(dtype_of(x)), element_of(dtype_of(values)), operands);
  int64_t cost = 0;
  for (const Block& block : blocks) cost += block.cost();
  const int64_t chunks = threads_for(cost, kCostPerThread);

  std::vector<size_t> waves = {0};
  int64_t bytes = 0, most_bytes = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t panel_bytes = aligned_size(blocks[i].kernel.tokens * blocks[i].kernel.token_bytes * operands.columns);
    if (bytes > 0 && bytes + panel_bytes > chunks * kWaveBytes) {
      waves.push_back(i);
      bytes = 0;
    }
    blocks[i].panel_begin = bytes;
    bytes += panel_bytes;
    most_bytes = std::max(most_bytes, bytes);
  }
  waves.push_back(blocks.size());
  thread_local KeptBytes kept;
  const CallBytes panels(kept, most_bytes, std::max(kMostKept, chunks * kWaveBytes));
  for (Block& block : blocks) block.block.panel = panels.get() + block.panel_begin;
  write_sums(groups, out, accumulate);  // now that there is memory for all
  for (size_t wave = 0; wave + 1 < waves.size(); ++wave)
    if (waves[wave] < waves[wave + 1]) run_wave(blocks, waves[wave], waves[wave + 1], chunks);
}

}  // namespace shira
