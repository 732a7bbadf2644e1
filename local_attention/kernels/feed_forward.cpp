// The feed-forward branch for many rows, forward and backward: LayerNorm, two products, GEGLU, product; see layers.py.
// (That of a decoded token, which waits for weights from memory, is in decode.cpp.)

#include "operator.h"
#include "rows.h"
#include "vector.h"

namespace {

using namespace kernels;

enum {
  kX,                 // (rows, dim)
  kGamma, kBeta,      // (1, dim)
  kToValue, kToGate,  // (inner, dim)
  kToOut,             // (dim, inner)
  kInputs,
};

INLINE float normal_cdf(float x) { return 0.5f + 0.5f * erf(x * 0.707106781f); }
INLINE float normal_density(float x) { return 0.398942280f * exp_of_negative(-0.5f * x * x); }

// out = value gelu(gate), the exact GELU.
FOR_EACH_PROCESSOR void geglu(const float *value, const float *gate, int64_t n, float *RESTRICT out) {
  for (int64_t c = 0; c < n; ++c) out[c] = value[c] * gate[c] * normal_cdf(gate[c]);
}

// The same again, and the gradients of value and gate from that of the result.
FOR_EACH_PROCESSOR void geglu_backward(const float *value, const float *gate, const float *dout, int64_t n,
                                       float *RESTRICT out, float *RESTRICT dvalue, float *RESTRICT dgate) {
  for (int64_t c = 0; c < n; ++c) {
    const float cdf = normal_cdf(gate[c]);
    out[c] = value[c] * gate[c] * cdf;
    dvalue[c] = dout[c] * gate[c] * cdf;
    dgate[c] = dout[c] * value[c] * (cdf + gate[c] * normal_density(gate[c]));
  }
}

thread_local Scratch of_thread, of_chunk;

}  // namespace

OPERATOR(feed_forward_forward) {
  enum { kOut = kInputs, kValues, kGates };  // (rows, dim), and for the backward pass twice (rows, inner)
  if (!fit("ffffff" "fff", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kX][0], dim = shapes[kX][1], inner = shapes[kToValue][0];
  const LayerNorm norm{tensors[kGamma], tensors[kBeta], dim};
  const Rounded to_value{{tensors[kToValue], dim}, inner, dim}, to_gate{{tensors[kToGate], dim}, inner, dim},
      to_out{{tensors[kToOut], inner}, dim, inner};
  for_each_tile(0, rows, [&](int64_t, int64_t first, int64_t size) {
    float *normed = of_thread.get(size * (dim + inner)), *activated = normed + size * dim,
          *values = tensors[kValues] + first * inner, *gates = tensors[kGates] + first * inner;
    norm.forward(tensors[kX] + first * dim, size, normed);
    const Rounded x{{normed, dim}, size, dim};
    gemm_nt(size, inner, dim, x, to_value, {values, inner});
    gemm_nt(size, inner, dim, x, to_gate, {gates, inner});
    geglu(values, gates, size * inner, activated);
    gemm_nt(size, dim, inner, Rounded{{activated, inner}, size, inner}, to_out, {tensors[kOut] + first * dim, dim});
  });
  return 0;
}

OPERATOR(feed_forward_backward) {
  enum {
    kValues = kInputs, kGates, kDOut,                 // of the forward pass, and the gradient of its result
    kDX, kDGamma, kDBeta, kDToValue, kDToGate, kDToOut,  // the gradients of the inputs
  };
  if (!fit("ffffff" "fff" "ffffff", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t rows = shapes[kX][0], dim = shapes[kX][1], inner = shapes[kToValue][0];
  const LayerNorm norm{tensors[kGamma], tensors[kBeta], dim};
  const Rounded to_value{{tensors[kToValue], dim}, inner, dim}, to_gate{{tensors[kToGate], dim}, inner, dim},
      to_out{{tensors[kToOut], inner}, dim, inner};
  NormGradient norm_gradient(dim);
  float *normed = of_chunk.get(kChunk * (dim + 3 * inner)), *activated = normed + kChunk * dim,
        *dvalues = activated + kChunk * inner, *dgates = dvalues + kChunk * inner;
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, rows);
    for_each_tile(begin, end, [&](int64_t tile, int64_t first, int64_t size) {
      const int64_t in_chunk = (first - begin) * inner;
      float *dactivated = of_thread.get(size * (inner + dim)), *dnormed = dactivated + size * inner;
      gemm(size, inner, dim, Rounded{{tensors[kDOut] + first * dim, dim}, size, dim}, to_out, {dactivated, inner});
      geglu_backward(tensors[kValues] + first * inner, tensors[kGates] + first * inner, dactivated, size * inner,
                     activated + in_chunk, dvalues + in_chunk, dgates + in_chunk);
      gemm(size, dim, inner, Rounded{{dvalues + in_chunk, inner}, size, inner}, to_value, {dnormed, dim});
      gemm(size, dim, inner, Rounded{{dgates + in_chunk, inner}, size, inner}, to_gate, {dnormed, dim}, Add::kYes);
      norm.forward(tensors[kX] + first * dim, size, normed + (first - begin) * dim);
      norm.backward(tensors[kX] + first * dim, dnormed, size, tensors[kDX] + first * dim, norm_gradient.gamma_of(tile),
                    norm_gradient.beta_of(tile));
    });
    norm_gradient.add_tiles((end - begin + kRows - 1) / kRows);
    const int64_t size = end - begin;
    const Rounded x{{normed, dim}, size, dim}, dvalue{{dvalues, inner}, size, inner}, dgate{{dgates, inner}, size, inner},
        dout{{tensors[kDOut] + begin * dim, dim}, size, dim}, out{{activated, inner}, size, inner};
    sum_weight_gradients(
        {
            {dvalue, x, tensors[kDToValue], inner, dim},
            {dgate, x, tensors[kDToGate], inner, dim},
            {dout, out, tensors[kDToOut], dim, inner},
        },
        size, begin ? Add::kYes : Add::kNo);
  }
  norm_gradient.copy_to(tensors[kDGamma], tensors[kDBeta]);
  return 0;
}
