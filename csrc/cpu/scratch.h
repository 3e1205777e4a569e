// Memory that is kept between calls, because fresh pages cost more than the kernels do. Include from baseline files
// only.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace peft_kernels {

struct AlignedBuffer {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<void, Free> data;
  size_t size = 0;

  // At least this many bytes; what was there is lost when the buffer grows.
  void* reserve(size_t bytes) {
    if (size < bytes) {
      data.reset();
      size = 0;
      data.reset(::operator new(bytes, std::align_val_t(64)));
      size = bytes;
    }
    return data.get();
  }
};

}  // namespace peft_kernels
