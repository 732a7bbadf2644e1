// A step of Muon for k matrices of one shape: momentum, Newton-Schulz iterations, division of rows. See training/optimizer.py.

#include <cmath>

#include "operator.h"
#include "rows.h"
#include "vector.h"

namespace {

using namespace kernels;

// The first input. Then k gradients, k momentum buffers and k weights follow, each (m, n), and the mean squares of rows,
// (k, m, 1), absent if rows are not divided.
enum { kMomentum, kRate, kRowDecay };

// buffer = momentum * old + gradient; update = momentum * buffer + gradient, of which the sum of squares is returned.
FOR_EACH_PROCESSOR float add_momentum(const float *gradient, const float *old, float momentum, int64_t n,
                                      float *RESTRICT buffer, float *RESTRICT update) {
  for (int64_t c = 0; c < n; ++c) {
    buffer[c] = old[c] * momentum + gradient[c];
    update[c] = buffer[c] * momentum + gradient[c];
  }
  return dot(update, update, n);
}

FOR_EACH_PROCESSOR void scale(float *RESTRICT x, float factor, int64_t n) {
  for (int64_t c = 0; c < n; ++c) x[c] *= factor;
}

FOR_EACH_PROCESSOR void subtract(const float *weight, const float *update, float rate, int64_t n, float *RESTRICT out) {
  for (int64_t c = 0; c < n; ++c) out[c] = weight[c] - update[c] * rate;
}

// out = a square + b out.
FOR_EACH_PROCESSOR void add_square(const float *square, float a, float b, int64_t n, float *RESTRICT out) {
  for (int64_t c = 0; c < n; ++c) out[c] = square[c] * a + out[c] * b;
}

// Call task(matrix, first, rows, tile) for all tiles of rows of k matrices.
template <typename Task>
void for_each_tile_of(int64_t k, int64_t rows, const Task &task) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  ThreadPool::instance().parallel_for(k * tiles, [&](int64_t i) {
    const int64_t first = i % tiles * kRows;
    task(i / tiles, first, std::min(kRows, rows - first), i);
  });
}

// The sums over the tiles of each matrix.
std::vector<float> sums(const std::vector<float> &of_tiles, int64_t k) {
  std::vector<float> of_matrices(k);
  for (size_t i = 0; i < of_tiles.size(); ++i) of_matrices[i / (of_tiles.size() / k)] += of_tiles[i];
  return of_matrices;
}

// Of a symmetric matrix (s, s), of which a tile of rows was computed from the diagonal on: the same columns below it.
void mirror(float *matrix, int64_t s, int64_t first, int64_t rows) {
  for (int64_t row = first + rows; row < s; ++row)
    for (int64_t column = first; column < first + rows; ++column) matrix[row * s + column] = matrix[column * s + row];
}

// Five iterations for x (k, m, n), which begin with y as memory of the same size and end with the result in either;
// square and polynomial are memory for (k, s, s) with s = min(m, n). Returns where the result is.
float *newton_schulz(int64_t k, int64_t m, int64_t n, float *x, float *y, float *square, float *polynomial) {
  const bool is_tall = m > n;
  const int64_t s = std::min(m, n), size = m * n;
  for (int iteration = 0; iteration < 5; ++iteration) {
    // S = x xᵀ (tall: xᵀ x) and the polynomial 3.4445 - 4.7750 S + 2.0315 S² are symmetric.
    for_each_tile_of(k, s, [&](int64_t i, int64_t first, int64_t rows, int64_t) {
      const Matrix all{x + i * size, n};
      float *out = square + i * s * s, *diagonal = out + first * s + first;
      if (is_tall)
        gemm_tn(rows, s - first, m, Factor(all).from_column(first), Factor(all).from_column(first), {diagonal, s});
      else
        gemm_nt(rows, s - first, n, {all[first], n}, {all[first], n}, {diagonal, s});
      mirror(out, s, first, rows);
    });
    for_each_tile_of(k, s, [&](int64_t i, int64_t first, int64_t rows, int64_t) {
      const Matrix all{square + i * s * s, s}, out{polynomial + i * s * s, s};
      gemm(rows, s - first, s, {all[first], s}, Factor(all).from_column(first), {out[first] + first, s});
      for (int64_t row = first; row < first + rows; ++row) {
        add_square(all[row] + first, -4.7750f, 2.0315f, s - first, out[row] + first);
        out[row][row] += 3.4445f;
      }
      mirror(out.data, s, first, rows);
    });
    for_each_tile_of(k, m, [&](int64_t i, int64_t first, int64_t rows, int64_t) {
      const int64_t matrix = i * size, begin = matrix + first * n;
      const Matrix factor{polynomial + i * s * s, s};
      if (is_tall)
        gemm(rows, n, s, {x + begin, n}, factor, {y + begin, n});
      else
        gemm(rows, n, s, {factor[first], s}, {x + matrix, n}, {y + begin, n});
    });
    std::swap(x, y);
  }
  return x;
}

thread_local Scratch of_matrices;

}  // namespace

// New momentum buffers, weights and mean squares of rows.
OPERATOR(muon_step) {
  if (!all_float(count, types) || count < 8 || (count - 3) % 5) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t k = (count - 3) / 5, m = shapes[1][0], n = shapes[1][1], s = std::min(m, n), size = m * n;
  const int gradients = 1, buffers = gradients + k, weights = buffers + k, rows = weights + k, new_buffers = rows + 1,
            new_weights = new_buffers + k, new_rows = new_weights + k;
  const float *settings = tensors[0], *squares = tensors.optional(rows);

  float *x = of_matrices.get(2 * k * (size + s * s)), *y = x + k * size, *square = y + k * size;
  const int64_t tiles = (m + kRows - 1) / kRows;
  std::vector<float> before(k * tiles), after(k * tiles);
  for_each_tile_of(k, m, [&](int64_t i, int64_t first, int64_t count, int64_t tile) {
    const int64_t begin = first * n;
    before[tile] = add_momentum(tensors[gradients + i] + begin, tensors[buffers + i] + begin, settings[kMomentum],
                                count * n, tensors[new_buffers + i] + begin, x + i * size + begin);
  });
  std::vector<float> norms = sums(before, k);
  for_each_tile_of(k, m, [&](int64_t i, int64_t first, int64_t count, int64_t) {
    scale(x + i * size + first * n, 1 / (std::sqrt(norms[i]) + 1e-7f), count * n);
  });

  float *updates = newton_schulz(k, m, n, x, y, square, square + k * s * s);
  std::vector<float> rates(k, settings[kRate] * std::sqrt(std::max(1.0f, float(m) / n)));
  if (squares) {
    for_each_tile_of(k, m, [&](int64_t i, int64_t first, int64_t count, int64_t tile) {
      before[tile] = after[tile] = 0;
      for (int64_t row = i * m + first; row < i * m + first + count; ++row) {
        const float sum = sum_of_squares(updates + row * n, n);
        const float mean = squares[row] * settings[kRowDecay] + sum / n * (1 - settings[kRowDecay]);
        tensors[new_rows][row] = mean;
        scale(updates + row * n, 1 / std::sqrt(mean + 1e-10f), n);
        before[tile] += sum;
        after[tile] += sum / (mean + 1e-10f);
      }
    });
    // back to the norm that the matrix had; 1e-20, as all is zero in a matrix without a gradient
    const std::vector<float> sums_before = sums(before, k), sums_after = sums(after, k);
    for (int64_t i = 0; i < k; ++i) rates[i] *= std::sqrt(sums_before[i] / (sums_after[i] + 1e-20f));
  } else {
    tensors[new_rows][0] = 0;
  }
  for_each_tile_of(k, m, [&](int64_t i, int64_t first, int64_t count, int64_t) {
    const int64_t begin = first * n;
    subtract(tensors[weights + i] + begin, updates + i * size + begin, rates[i], count * n, tensors[new_weights + i] + begin);
  });
  return 0;
}
