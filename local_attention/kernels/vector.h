// Arithmetic on rows of float32, for functions that are compiled for several kinds of processors.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Functions that do most of the work are compiled for several kinds of processors; the loader picks the best, at a time when
// ThreadSanitizer does not work yet.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(__SANITIZE_THREAD__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define RESTRICT __restrict__  // an output that no other argument overlaps: without it some loops are not vectorised
#define INLINE __attribute__((always_inline)) inline  // into those functions, to be compiled like them

namespace kernels {

INLINE float dot(const float *a, const float *b, int64_t n) {
  float sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

FOR_EACH_PROCESSOR static float sum_of_squares(const float *x, int64_t n) { return dot(x, x, n); }

// 1 / the length of a row, from its square; rows shorter than 1e-12 are divided by that.
constexpr float kShortestSquare = 1e-24f;
INLINE float inverse_length(float square) { return 1 / std::sqrt(std::max(square, kShortestSquare)); }

// The largest of n numbers; GCC does not vectorise std::max over them, because of NaN.
INLINE float maximum(const float *x, int64_t n) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes], largest = -INFINITY;
  std::fill_n(lanes, kLanes, -INFINITY);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lanes[lane] < x[j + lane] ? x[j + lane] : lanes[lane];
  for (; j < n; ++j) largest = std::max(largest, x[j]);
  for (float lane : lanes) largest = std::max(largest, lane);
  return largest;
}

// e**x for x <= 0, with an absolute error below 2e-7, and 0 below -87, so that minus infinity has no weight at all. Loops
// over it are vectorised, loops over std::exp are not.
INLINE float exp_of_negative(float x) {
  const float clipped = std::max(x, -87.0f);
  const int32_t power = int32_t(clipped * 1.44269504f - 0.5f), bits = x < -87 ? 0 : (power + 127) << 23;
  const float r = clipped - power * 0.693147181f;
  float two_to_the_power;
  std::memcpy(&two_to_the_power, &bits, sizeof bits);
  return two_to_the_power * (((((r * (1 / 720.0f) + 1 / 120.0f) * r + 1 / 24.0f) * r + 1 / 6.0f) * r + 0.5f) * r * r + r + 1);
}

// The error function with an error below 4e-7, for the same reason: a rational function fitted to it on [-4, 4]; beyond
// that it is ±1.
INLINE float erf(float x) {
  x = std::min(std::max(x, -4.0f), 4.0f);
  const float t = x * x;
  const float above = ((((1.97483246e-6f * t + 2.88039302e-4f) * t + 4.00358074e-3f) * t + 5.34672755e-2f) * t +
                       0.196247551f) * t + 1.12837898f;
  const float below = ((((3.7480776e-5f * t + 1.21634288e-3f) * t + 1.54442922e-2f) * t + 0.116475824f) * t +
                       0.507251023f) * t + 1;
  return std::min(std::max(x * above / below, -1.0f), 1.0f);
}

}  // namespace kernels
