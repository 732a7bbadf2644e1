// The cross-entropy of labels given logits, in nats, and its gradient.

#include <cmath>

#include "operator.h"
#include "thread_pool.h"
#include "vector.h"

namespace {

using namespace kernels;

enum { kLogits, kLabels };  // (rows, classes); (rows) int32

constexpr int64_t kRowsPerTask = 64;

FOR_EACH_PROCESSOR float log_sum_exp(const float *logits, int64_t n) {
  const float largest = maximum(logits, n);
  float sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += exp_of_negative(logits[c] - largest);
  return largest + std::log(sum);
}

// out = factor * softmax(logits), given their log-sum-exp.
FOR_EACH_PROCESSOR void scaled_softmax(const float *logits, float lse, float factor, int64_t n, float *out) {
  for (int64_t c = 0; c < n; ++c) out[c] = factor * exp_of_negative(logits[c] - lse);
}

template <typename Task>
void for_each_row(int64_t rows, const Task &task) {
  ThreadPool::instance().parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t i) {
    for (int64_t row = i * kRowsPerTask; row < std::min((i + 1) * kRowsPerTask, rows); ++row) task(row);
  });
}

bool in_range(const int32_t *labels, int64_t rows, int64_t classes) {
  return std::all_of(labels, labels + rows, [=](int32_t label) { return label >= 0 && label < classes; });
}

}  // namespace

OPERATOR(cross_entropy_forward) {
  enum { kLosses = kLabels + 1 };  // (rows)
  if (!fit("fif", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kLogits][0], classes = shapes[kLogits][1];
  if (!in_range(tensors.integers(kLabels), rows, classes)) return 2;
  for_each_row(rows, [&](int64_t row) {
    const float *logits = tensors[kLogits] + row * classes;
    tensors[kLosses][row] = log_sum_exp(logits, classes) - logits[tensors.integers(kLabels)[row]];
  });
  return 0;
}

OPERATOR(cross_entropy_backward) {
  enum { kDLosses = kLabels + 1, kDLogits };  // (rows); (rows, classes)
  if (!fit("fiff", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kLogits][0], classes = shapes[kLogits][1];
  if (!in_range(tensors.integers(kLabels), rows, classes)) return 2;
  for_each_row(rows, [&](int64_t row) {
    const float *logits = tensors[kLogits] + row * classes, factor = tensors[kDLosses][row];
    float *out = tensors[kDLogits] + row * classes;
    scaled_softmax(logits, log_sum_exp(logits, classes), factor, classes, out);
    out[tensors.integers(kLabels)[row]] -= factor;
  });
  return 0;
}
