// The blocks of a launch on the CPU, and what the tests call through ctypes.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "../../../csrc/cuda/facts.h"
#include "../../../csrc/host/torch_stable.h"
#include "cuda_runtime.h"

namespace cuda_on_host {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t context;
  bool done;
};

// One block at a time runs, on the thread that launched it; ops of several threads at once are not for here.
ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<char> stacks;
void (*body_of_block)(void*);
void* state_of_block;
unsigned current, turn;
int sums[2];  // of predicates: what threads add to in this turn, and what they read that they added to in the last

void run_fiber() {
  body_of_block(state_of_block);
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (unsigned done = 0; done < threads;) {
    ++turn;
    sums[turn % 2] = 0;
    done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      current = turn % 2 ? i : threads - 1 - i;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
      done += fibers[current].done;
    }
    if (done != 0 && done != threads) {
      std::fprintf(stderr, "a barrier that %u of %u threads do not reach\n", done, threads);
      std::abort();
    }
  }
}

}  // namespace

void run_blocks(unsigned blocks, unsigned threads, void (*body)(void*), void* state) {
  if (fibers.size() < threads) {
    fibers.resize(threads);
    stacks.resize(threads * kStackBytes);
  }
  body_of_block = body;
  state_of_block = state;
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = counts.launches % 2 ? i : blocks - 1 - i;
    run_block(threads);
  }
}

}  // namespace cuda_on_host

void __syncthreads() {
  using namespace cuda_on_host;
  swapcontext(&fibers[current].context, &scheduler);
}

int __syncthreads_count(int predicate) {
  using namespace cuda_on_host;
  int& sum = sums[turn % 2];
  sum += predicate != 0;
  __syncthreads();
  return sum;
}

namespace {

std::vector<void*> host_tensors;  // addresses of tensors that count as tensors on the CPU

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// All tensors are on the CPU; those that are not in host_tensors count as tensors on the device.
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  const bool on_host = std::find(host_tensors.begin(), host_tensors.end(), data) != host_tensors.end();
  *type = on_host ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  return 0;
}

EXPORTED void forget_host_tensors() { host_tensors.clear(); }
EXPORTED void add_host_tensor(void* data) { host_tensors.push_back(data); }

EXPORTED int64_t calls() { return shira::cuda_calls(); }
EXPORTED void set_check_indices(bool enabled) { shira::set_check_indices(enabled); }
EXPORTED void set_launches_do_nothing(bool nothing) { cuda_on_host::launches_do_nothing = nothing; }
EXPORTED cuda_on_host::Counts* counts() { return &cuda_on_host::counts; }
EXPORTED const char* ops() {
  static const std::string names = [] {
    std::string all;
    for (const std::string& op : shira::cuda_ops()) all += op + " ";
    return all;
  }();
  return names.c_str();
}
}
