// Fibres, barriers and the one device of the emulation.
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace peft_kernels {
thread_local __align__(128) char shared[256 << 10];
}

namespace emulation {
namespace {

constexpr size_t kStack = 64 << 10;

struct Barrier {
  int arrived = 0, passed = 0;
};

struct Warp {
  Barrier barrier;
  Message messages[2][32];
};

struct Fibre {
  ucontext_t context;
  const int* watched = nullptr;  // the fibre waits while this is still `seen`
  int seen = 0;
  bool done = false;
  std::deque<std::vector<std::function<void()>>> copies;
};

struct Device {
  int shared_memory = 227 << 10, multiprocessors = 2, current = 0;
  std::mt19937 random;
} device;

ucontext_t scheduler;
Fibre* running = nullptr;
Barrier whole_block;
std::vector<Warp> warps;
const std::function<void()>* body = nullptr;

void start() {
  (*body)();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

void wait(Barrier& barrier, int members) {
  running->seen = barrier.passed;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
  running->watched = &barrier.passed;
  swapcontext(&running->context, &scheduler);
}

void run_block(std::vector<Fibre>& fibres, std::vector<char>& stacks) {
  whole_block = {};
  warps.assign((fibres.size() + 31) / 32, {});
  for (size_t i = 0; i < fibres.size(); ++i) {
    getcontext(&fibres[i].context);
    fibres[i].context.uc_stack.ss_sp = stacks.data() + i * kStack;
    fibres[i].context.uc_stack.ss_size = kStack;
    makecontext(&fibres[i].context, start, 0);
    fibres[i].done = false;
    fibres[i].watched = nullptr;
    fibres[i].copies.assign(1, {});
  }
  std::vector<size_t> order(fibres.size());
  std::iota(order.begin(), order.end(), 0);
  // One warp runs only when no other can, so that what the others do too early meets what it does late.
  const size_t laggard = device.random() % warps.size();
  bool moved = true;
  for (size_t left = fibres.size(); left > 0;) {
    std::shuffle(order.begin(), order.end(), device.random);
    const bool all = !moved;
    moved = false;
    for (const size_t i : order) {
      running = &fibres[i];
      if (running->done || (running->watched && *running->watched == running->seen)) continue;
      if (i / 32 == laggard && !all) continue;
      moved = true;
      threadIdx = dim3(unsigned(i));
      swapcontext(&scheduler, &running->context);
      left -= running->done;
    }
    if (all && !moved) {
      std::fprintf(stderr, "a barrier that not all threads reach\n");
      std::abort();
    }
  }
}

}  // namespace

std::deque<std::vector<std::function<void()>>>& copies() { return running->copies; }

void block_barrier() { wait(whole_block, int(blockDim.x)); }

const Message* warp_exchange(const Message& mine) {
  Warp& warp = warps[threadIdx.x / 32];
  Message* const messages = warp.messages[warp.barrier.passed % 2];  // the other half may still be read
  messages[threadIdx.x % 32] = mine;
  wait(warp.barrier, 32);
  return messages;
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  if (block.x % 32 || shared > size_t(device.shared_memory)) {
    std::fprintf(stderr, "launch of %u threads, %zu bytes of shared memory\n", block.x, shared);
    std::abort();
  }
  std::vector<Fibre> fibres(block.x);
  std::vector<char> stacks(block.x * kStack);
  body = &kernel;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      std::memset(peft_kernels::shared, 0xff, sizeof(peft_kernels::shared));  // NaN until written
      blockIdx = dim3(x, y), blockDim = block, gridDim = grid;
      run_block(fibres, stacks);
    }
}

}  // namespace emulation

// For the tests: the device's sizes, and the seed of the order in which its threads run.
extern "C" __attribute__((visibility("default"))) void emulate(int shared_memory, int multiprocessors, int seed) {
  emulation::device.shared_memory = shared_memory;
  emulation::device.multiprocessors = multiprocessors;
  emulation::device.random.seed(unsigned(seed));
}

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* current) { return *current = emulation::device.current, cudaSuccess; }
cudaError_t cudaSetDevice(int chosen) { return chosen ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value =
      attribute == cudaDevAttrMultiProcessorCount ? emulation::device.multiprocessors : emulation::device.shared_memory;
  return cudaSuccess;
}
