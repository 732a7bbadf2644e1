// Rows divided by their length and multiplied by a scale per channel, and the gradients: queries and keys of each head, with
// qk_rmsnorm. See mha.py.

#include <vector>

#include "operator.h"
#include "rows.h"
#include "vector.h"

namespace {

using namespace kernels;

enum { kX, kScale, kInputs };  // (rows, d), (d)

FOR_EACH_PROCESSOR void normalise(const float *x, const float *scale, int64_t rows, int64_t d, float *RESTRICT out) {
  for (int64_t r = 0; r < rows; ++r, x += d, out += d) {
    const float inverse = inverse_length(dot(x, x, d));
    for (int64_t c = 0; c < d; ++c) out[c] = x[c] * inverse * scale[c];
  }
}

FOR_EACH_PROCESSOR void normalise_backward(const float *x, const float *scale, const float *dout, int64_t rows, int64_t d,
                                           float *RESTRICT dx, float *RESTRICT dscale) {
  std::fill_n(dscale, d, 0.0f);
  for (int64_t r = 0; r < rows; ++r, x += d, dout += d, dx += d) {
    const float square = dot(x, x, d), inverse = inverse_length(square);
    float along = 0;
    for (int64_t c = 0; c < d; ++c) {
      const float product = x[c] * inverse * dout[c];
      dscale[c] += product;
      along += product * scale[c];
    }
    if (square <= kShortestSquare) along = 0;  // the row was divided by a constant
    for (int64_t c = 0; c < d; ++c) dx[c] = (dout[c] * scale[c] - x[c] * inverse * along) * inverse;
  }
}

}  // namespace

OPERATOR(l2_norm_forward) {
  enum { kOut = kInputs };
  if (!fit("ff" "f", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kX][0], d = shapes[kX][1];
  for_each_tile(0, rows, [&](int64_t, int64_t first, int64_t size) {
    normalise(tensors[kX] + first * d, tensors[kScale], size, d, tensors[kOut] + first * d);
  });
  return 0;
}

OPERATOR(l2_norm_backward) {
  enum { kDOut = kInputs, kDX, kDScale };
  if (!fit("ff" "f" "ff", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kX][0], d = shapes[kX][1], tiles = (rows + kRows - 1) / kRows;
  std::vector<float> of_tiles(tiles * d);
  for_each_tile(0, rows, [&](int64_t tile, int64_t first, int64_t size) {
    normalise_backward(tensors[kX] + first * d, tensors[kScale], tensors[kDOut] + first * d, size, d,
                       tensors[kDX] + first * d, &of_tiles[tile * d]);
  });
  std::fill_n(tensors[kDScale], d, 0.0f);
  for (int64_t i = 0; i < tiles * d; ++i) tensors[kDScale][i % d] += of_tiles[i];
  return 0;
}
