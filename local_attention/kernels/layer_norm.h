// LayerNorm of tiles of rows, and its gradient (Ba et al. 2016, arXiv 1607.06450).

#pragma once

#include <cstdint>

namespace kernels {

struct LayerNorm {
  const float *gamma, *beta;  // (dim)
  int64_t dim;

  // x: (rows, dim) to out, the same shape.
  void forward(const float *x, int64_t rows, float *out) const;
  // From the gradient dout of `forward`'s result to dx; dgamma and dbeta are set to the sums over these rows.
  void backward(const float *x, const float *dout, int64_t rows, float *dx, float *dgamma, float *dbeta) const;
};

}  // namespace kernels
