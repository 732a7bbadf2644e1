// What operators of attention share: rotary embeddings and the softmax of a row of scores.

#pragma once

#include <cmath>
#include <vector>

#include "gemm.h"
#include "vector.h"

namespace kernels {

// Both halves of the channels, (first, second), have the same angles: they become (first cos - second sin, second cos +
// first sin).
INLINE void rotate(const float *first, const float *second, const float *cos, const float *sin, int64_t half,
                   float *RESTRICT out, float *RESTRICT second_out) {
  for (int64_t c = 0; c < half; ++c) {
    const float x = first[c], y = second[c];
    out[c] = x * cos[c] - y * sin[c];
    second_out[c] = y * cos[c] + x * sin[c];
  }
}

FOR_EACH_PROCESSOR static void rotate_rows(Matrix x, const float *cos, const float *sin, int64_t rows, int64_t d, float factor,
                                    float *out) {
  const int64_t half = d / 2;
  for (int64_t r = 0; r < rows; ++r, cos += d, sin += d, out += d) {
    const float *row = x[r];
    rotate(row, row + half, cos, sin, half, out, out + half);
    if (d % 2) out[d - 1] = row[d - 1] * cos[d - 1];  // without rotary embeddings: all sines are 0
    if (factor != 1)
      for (int64_t c = 0; c < d; ++c) out[c] *= factor;
  }
}

// From scores[begin … end - 1] to numbers proportional to their softmax, zeros elsewhere. `total` is set to their sum.
// Returns the log-sum-exp of the scores, infinity where no key is seen.
FOR_EACH_PROCESSOR static float softmax_row(float *scores, int64_t begin, int64_t end, int64_t span, float *total) {
  for (int64_t j = 0; j < begin; ++j) scores[j] = 0;
  for (int64_t j = end; j < span; ++j) scores[j] = 0;
  const float largest = maximum(scores + begin, end - begin);
  *total = 1;
  if (largest == -INFINITY) {
    for (int64_t j = begin; j < end; ++j) scores[j] = scores[j] == -INFINITY ? 0 : NAN;
    return INFINITY;
  }
  float sum = 0;
  for (int64_t j = begin; j < end; ++j) {
    scores[j] = exp_of_negative(scores[j] - largest);
    sum += scores[j];
  }
  *total = sum;
  return largest + std::log(sum);
}

}  // namespace kernels
