// The norm of all gradients, and their product with a factor that clips it. See training/step.py.

#include <cfloat>
#include <cmath>
#include <numeric>
#include <vector>

#include "operator.h"
#include "thread_pool.h"
#include "vector.h"

namespace {

using namespace kernels;

constexpr int64_t kNumbers = 1 << 15;  // per task

FOR_EACH_PROCESSOR void multiply_or_zero(const float *x, float factor, int64_t n, float *RESTRICT out) {
  for (int64_t c = 0; c < n; ++c) out[c] = std::abs(x[c] * factor) <= FLT_MAX ? x[c] * factor : 0;
}

// A piece of one of several tensors.
struct Piece {
  int tensor;
  int64_t first, count;
};

// The tensors first … end - 1 in pieces.
std::vector<Piece> pieces_of(int first, int end, const int *axes, int64_t **shapes) {
  std::vector<Piece> pieces;
  for (int i = first; i < end; ++i) {
    const int64_t size = std::accumulate(shapes[i], shapes[i] + axes[i], int64_t(1), std::multiplies<int64_t>());
    for (int64_t begin = 0; begin < size; begin += kNumbers) pieces.push_back({i, begin, std::min(kNumbers, size - begin)});
  }
  return pieces;
}

}  // namespace

// The root of the sum of all squares, of any number of tensors of any shape: (1).
OPERATOR(global_norm) {
  if (!all_float(count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const std::vector<Piece> pieces = pieces_of(0, count - 1, axes, shapes);
  std::vector<float> sums(pieces.size());
  ThreadPool::instance().parallel_for(pieces.size(), [&](int64_t i) {
    sums[i] = sum_of_squares(tensors[pieces[i].tensor] + pieces[i].first, pieces[i].count);
  });
  tensors[count - 1][0] = std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0f));
  return 0;
}

// Products of a factor, of one number, with any number of tensors; 0 where they are not finite.
OPERATOR(times_or_zero) {
  if (!all_float(count, types) || count % 2 == 0) return 1;
  const Tensors tensors{data, axes, shapes};
  const int results = count / 2;
  const std::vector<Piece> pieces = pieces_of(1, 1 + results, axes, shapes);
  ThreadPool::instance().parallel_for(pieces.size(), [&](int64_t i) {
    const auto [tensor, first, size] = pieces[i];
    multiply_or_zero(tensors[tensor] + first, tensors[0][0], size, tensors[tensor + results] + first);
  });
  return 0;
}
