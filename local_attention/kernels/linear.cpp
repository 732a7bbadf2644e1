// LayerNorm followed by one or several linear layers: y_i = layer_norm(x) w_iᵀ. See layers.py.

#include "operator.h"
#include "rows.h"

namespace {

using namespace kernels;

enum {
  kX,             // (rows, dim)
  kGamma, kBeta,  // (1, dim)
  kWeights,       // each (out_i, dim)
};

thread_local Scratch of_thread, of_chunk;

std::vector<Rounded> round_weights(const Tensors &tensors, int64_t **shapes, int weights) {
  std::vector<Rounded> rounded;
  for (int i = 0; i < weights; ++i) {
    const int64_t *shape = shapes[kWeights + i];
    rounded.emplace_back(Matrix{tensors[kWeights + i], shape[1]}, shape[0], shape[1]);
  }
  return rounded;
}

}  // namespace

OPERATOR(norm_linear_forward) {
  if (!all_float(count, types) || (count - kWeights) % 2) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kX][0], dim = shapes[kX][1];
  const int weights = (count - kWeights) / 2, results = kWeights + weights;
  const LayerNorm norm{tensors[kGamma], tensors[kBeta], dim};
  const std::vector<Rounded> rounded = round_weights(tensors, shapes, weights);
  for_each_tile(0, rows, [&](int64_t, int64_t first, int64_t size) {
    float *normed = of_thread.get(size * dim);
    norm.forward(tensors[kX] + first * dim, size, normed);
    const Rounded x{{normed, dim}, size, dim};
    for (int i = 0; i < weights; ++i) {
      const int64_t out = shapes[kWeights + i][0];
      gemm_nt(size, out, dim, x, rounded[i], {tensors[results + i] + first * out, out});
    }
  });
  return 0;
}

// The gradients of x, gamma, beta and the weights, from those of the results.
OPERATOR(norm_linear_backward) {
  if (!all_float(count, types) || count % 3) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kX][0], dim = shapes[kX][1];
  const int weights = (count - 2 * kWeights) / 3, dys = kWeights + weights, dx = dys + weights;
  const LayerNorm norm{tensors[kGamma], tensors[kBeta], dim};
  const std::vector<Rounded> rounded = round_weights(tensors, shapes, weights);
  NormGradient norm_gradient(dim);
  float *normed = of_chunk.get(kChunk * dim);
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, rows);
    for_each_tile(begin, end, [&](int64_t tile, int64_t first, int64_t size) {
      float *dnormed = of_thread.get(size * dim);
      for (int i = 0; i < weights; ++i) {
        const int64_t out = shapes[kWeights + i][0];
        gemm(size, dim, out, Rounded{{tensors[dys + i] + first * out, out}, size, out}, rounded[i], {dnormed, dim},
             i ? Add::kYes : Add::kNo);
      }
      norm.forward(tensors[kX] + first * dim, size, normed + (first - begin) * dim);
      norm.backward(tensors[kX] + first * dim, dnormed, size, tensors[dx] + first * dim, norm_gradient.gamma_of(tile),
                    norm_gradient.beta_of(tile));
    });
    norm_gradient.add_tiles((end - begin + kRows - 1) / kRows);
    const int64_t size = end - begin;
    const Rounded x{{normed, dim}, size, dim};
    std::vector<Rounded> dy;
    std::vector<WeightGradient> gradients;
    for (int i = 0; i < weights; ++i) {
      const int64_t out = shapes[kWeights + i][0];
      dy.emplace_back(Matrix{tensors[dys + i] + begin * out, out}, size, out);
      gradients.push_back({dy.back(), x, tensors[dx + kWeights + i], out, dim});
    }
    sum_weight_gradients(gradients, size, begin ? Add::kYes : Add::kNo);
  }
  norm_gradient.copy_to(tensors[dx + kGamma], tensors[dx + kBeta]);
  return 0;
}
