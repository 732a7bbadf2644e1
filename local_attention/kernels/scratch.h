// Memory of a thread that it keeps from one task to the next: new memory would have to be zeroed by the system each time.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace kernels {

class Scratch {
 public:
  // Room for a number of floats, aligned to cache lines; what it held before is lost.
  float *get(int64_t numbers) {
    if (numbers > size_) {
      constexpr int64_t kLine = 64 / sizeof(float);
      size_ = (numbers + kLine - 1) / kLine * kLine;
      numbers_.reset();
      numbers_.reset(static_cast<float *>(std::aligned_alloc(64, size_ * sizeof(float))));
    }
    return numbers_.get();
  }

 private:
  int64_t size_ = 0;
  std::unique_ptr<float, decltype(&std::free)> numbers_{nullptr, std::free};
};

}  // namespace kernels
