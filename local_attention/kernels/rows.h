// How operators on rows divide their work among threads, so that no sum depends on the number of threads.

#pragma once

#include <vector>

#include "gemm.h"
#include "layer_norm.h"
#include "scratch.h"
#include "thread_pool.h"

namespace kernels {

constexpr int64_t kRows = 64;    // rows per tile: their activations stay in the second-level cache
constexpr int64_t kChunk = 1024;  // rows whose gradients are kept until those of the weights are summed
constexpr int64_t kTilesPerChunk = kChunk / kRows;

// Call task(tile, first, rows) for each tile of the rows first … end - 1.
template <typename Task>
void for_each_tile(int64_t first, int64_t end, const Task &task) {
  ThreadPool::instance().parallel_for((end - first + kRows - 1) / kRows, [&](int64_t tile) {
    const int64_t begin = first + tile * kRows;
    task(tile, begin, std::min(kRows, end - begin));
  });
}

// What a linear layer with the weight (out, in) gives to the gradient of its weight: dyᵀ x.
struct WeightGradient {
  Factor dy, x;  // (rows, out), (rows, in)
  float *dw;     // (out, in)
  int64_t out, in;
};

// Set or add the gradients of weights over a number of rows; each part of a weight is one thread's.
inline void sum_weight_gradients(const std::vector<WeightGradient> &gradients, int64_t rows, Add add) {
  std::vector<int64_t> ends;
  for (const WeightGradient &gradient : gradients)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (gradient.out + kRows - 1) / kRows);
  ThreadPool::instance().parallel_for(ends.back(), [&](int64_t i) {
    const size_t which = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
    const WeightGradient &g = gradients[which];
    const int64_t first = (i - (which ? ends[which - 1] : 0)) * kRows;
    gemm_tn(std::min(kRows, g.out - first), g.in, rows, g.dy.from_column(first), g.x, {g.dw + first * g.in, g.in}, add);
  });
}

// Sums of the gradients of gamma and beta, first by tile, then over the tiles in their order.
class NormGradient {
 public:
  explicit NormGradient(int64_t dim) : dim_(dim), of_tiles_(2 * dim * kTilesPerChunk), sums_(2 * dim) {}
  float *gamma_of(int64_t tile) { return &of_tiles_[2 * tile * dim_]; }
  float *beta_of(int64_t tile) { return gamma_of(tile) + dim_; }
  void add_tiles(int64_t count) {
    for (int64_t tile = 0; tile < count; ++tile)
      for (int64_t c = 0; c < 2 * dim_; ++c) sums_[c] += of_tiles_[2 * tile * dim_ + c];
  }
  void copy_to(float *dgamma, float *dbeta) const {
    std::copy_n(sums_.begin(), dim_, dgamma);
    std::copy_n(sums_.begin() + dim_, dim_, dbeta);
  }

 private:
  int64_t dim_;
  std::vector<float> of_tiles_, sums_;
};

}  // namespace kernels
