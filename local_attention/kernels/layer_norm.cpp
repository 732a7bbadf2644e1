#include "layer_norm.h"

#include <cmath>

#include "vector.h"

namespace kernels {

namespace {

struct Moments {
  float mean, inverse_deviation;
};

INLINE Moments moments(const float *x, int64_t n) {
  float mean = 0, variance = 0;
  for (int64_t c = 0; c < n; ++c) mean += x[c];
  mean /= n;
  for (int64_t c = 0; c < n; ++c) variance += (x[c] - mean) * (x[c] - mean);
  return {mean, 1 / std::sqrt(variance / n + 1e-5f)};
}

FOR_EACH_PROCESSOR void normalise_rows(const float *x, const float *gamma, const float *beta, int64_t rows, int64_t n,
                                       float *RESTRICT out) {
  for (int64_t r = 0; r < rows; ++r, x += n, out += n) {
    const Moments m = moments(x, n);
    for (int64_t c = 0; c < n; ++c) out[c] = (x[c] - m.mean) * m.inverse_deviation * gamma[c] + beta[c];
  }
}

FOR_EACH_PROCESSOR void normalise_rows_backward(const float *x, const float *gamma, const float *dout, int64_t rows,
                                                int64_t n, float *RESTRICT dx, float *RESTRICT dgamma,
                                                float *RESTRICT dbeta) {
  std::fill_n(dgamma, n, 0.0f);
  std::fill_n(dbeta, n, 0.0f);
  for (int64_t r = 0; r < rows; ++r, x += n, dout += n, dx += n) {
    const Moments m = moments(x, n);
    float sum = 0, along = 0;
    for (int64_t c = 0; c < n; ++c) {
      const float standardised = (x[c] - m.mean) * m.inverse_deviation, grad = dout[c] * gamma[c];
      dgamma[c] += dout[c] * standardised;
      dbeta[c] += dout[c];
      sum += grad;
      along += grad * standardised;
    }
    sum /= n;
    along /= n;
    for (int64_t c = 0; c < n; ++c) {
      const float standardised = (x[c] - m.mean) * m.inverse_deviation;
      dx[c] = (dout[c] * gamma[c] - sum - standardised * along) * m.inverse_deviation;
    }
  }
}

}  // namespace

void LayerNorm::forward(const float *x, int64_t rows, float *out) const {
  normalise_rows(x, gamma, beta, rows, dim, out);
}

void LayerNorm::backward(const float *x, const float *dout, int64_t rows, float *dx, float *dgamma, float *dbeta) const {
  normalise_rows_backward(x, gamma, dout, rows, dim, dx, dgamma, dbeta);
}

}  // namespace kernels
