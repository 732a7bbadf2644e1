// Attention of a sequence to itself within windows, forward and backward, tile by tile: the scores of a tile of queries
// live in the memory of a thread, and only the log-sum-exp of each row is kept (FlashAttention-2, Dao 2023, arXiv
// 2307.08691). See backends/fused.py.
//
// A task of the forward pass is a tile; one of the backward pass is a whole head of a sequence, tile after tile, so that
// the gradients of keys are summed in an order that does not depend on the number of threads.

#include <cmath>
#include <vector>

#include "attend.h"
#include "gemm.h"
#include "operator.h"
#include "scratch.h"
#include "thread_pool.h"

namespace {

using namespace kernels;

constexpr int64_t kTile = 64;                 // queries per tile; fused.py has the same number
constexpr float kUnseen = -3.4028235e38f / 8;  // half of MASK_VALUE: a score below it means that the key is not seen

// Arguments of both operators, by position; those of the backward pass go on where these end.
enum {
  kQ, kK,     // (b, n, h d)
  kV,         // (b, n, h e)
  kSizes,     // int32: window, look_backward, look_forward, causal, exact_windowsize
  kFactors,   // (h, 2): scale of the scores; what is added to that of a token for itself
  kRotation,  // optional (2, n, d): cosines and sines
  kDecay,     // optional (2, offsets, d): of queries and of keys, at offsets from the first query of a tile
  kKeep,      // optional (rows, n): 0 where a key must not be seen
  kBias,      // optional (heads, window, window span)
  kInputs,
};

class Attention {
 public:
  Attention(const Tensors &tensors, void **data, int64_t **shapes) {
    const int32_t *sizes = tensors.integers(kSizes);
    batch = shapes[kQ][0], n = shapes[kQ][1], heads = shapes[kFactors][0];
    d = shapes[kQ][2] / heads, e = shapes[kV][2] / heads;
    window = sizes[0], back = sizes[1], ahead = sizes[2], causal = sizes[3], exact = sizes[4];
    scale = tensors[kFactors][0], self_value = tensors[kFactors][1];
    rotation = tensors.optional(kRotation), decay = tensors.optional(kDecay);
    offsets = decay ? shapes[kDecay][1] : 0;
    keep = tensors.optional(kKeep), bias = tensors.optional(kBias);
    groups_per_keep = keep ? batch * heads / shapes[kKeep][0] : 1;
    bias_heads = bias ? shapes[kBias][0] : 1;
    tiles = (n + kTile - 1) / kTile;
  }

  // The keys that a query sees are those from first_key to before key_end, if they are kept.
  int64_t first_key(int64_t query) const {
    const int64_t by_window = (query / window - back) * window;
    return std::max<int64_t>({0, by_window, exact ? query - window * back : 0});
  }
  int64_t key_end(int64_t query) const {
    int64_t end = std::min(n, (query / window + ahead + 1) * window);
    if (causal) return std::min(end, query + 1);
    return exact ? std::min(end, query + window * ahead + 1) : end;
  }

  // Head h of a tensor (b, n, h width), as a matrix (n, width).
  Matrix head(float *x, int64_t group, int64_t width) const {
    return {x + group / heads * n * heads * width + group % heads * width, heads * width};
  }

  // Rows of the first query or key on: scaled, rotated, and with their decay, at offsets from `origin`.
  void load(Matrix x, int64_t first, int64_t rows, float factor, int64_t origin, bool of_keys, float *out) const;
  // The gradient of `load`: from that of its result, rows of d numbers, to that of x.
  void unload(Matrix grad, int64_t first, int64_t rows, float factor, Matrix out) const;
  void apply_decay(float *x, int64_t first, int64_t rows, int64_t origin, bool of_keys) const;
  // Add the bias and the like to the scores (tile, span), and make those of unseen keys minus infinity.
  void mask(int64_t group, int64_t first, int64_t rows, int64_t keys, int64_t span, float *scores) const;
  void softmax(int64_t first, int64_t rows, int64_t keys, int64_t span, float *scores, float *lse, float *totals) const;
  void probabilities(int64_t first, int64_t rows, int64_t keys, int64_t span, float *scores, const float *lse) const;
  void add_bias_gradient(int64_t first, int64_t rows, int64_t keys, int64_t span, const float *ds, float *out) const;

  int64_t batch, n, heads, d, e, window, back, ahead, offsets, groups_per_keep, bias_heads, tiles;
  bool causal, exact;
  float scale, self_value;
  const float *rotation, *decay, *keep, *bias;
};

// By the opposite angles; `out` may be `x`.
FOR_EACH_PROCESSOR void rotate_rows_back(Matrix x, const float *cos, const float *sin, int64_t rows, int64_t d,
                                         float factor, Matrix out) {
  const int64_t half = d / 2;
  std::vector<float> rotated(d);
  for (int64_t r = 0; r < rows; ++r, cos += d, sin += d) {
    const float *row = x[r];
    rotate(row + half, row, cos, sin, half, &rotated[half], &rotated[0]);
    float *to = out[r];
    for (int64_t c = 0; c < d; ++c) to[c] = rotated[c] * factor;
  }
}

void Attention::load(Matrix x, int64_t first, int64_t rows, float factor, int64_t origin, bool of_keys, float *out) const {
  x.data = x[first];
  if (rotation) {
    rotate_rows(x, rotation + first * d, rotation + (n + first) * d, rows, d, factor, out);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < d; ++c) out[r * d + c] = x[r][c] * factor;
  }
  if (decay) apply_decay(out, first, rows, origin, of_keys);
}

void Attention::unload(Matrix grad, int64_t first, int64_t rows, float factor, Matrix out) const {
  out.data = out[first];
  if (rotation) {
    rotate_rows_back(grad, rotation + first * d, rotation + (n + first) * d, rows, d, factor, out);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < d; ++c) out[r][c] = grad[r][c] * factor;
  }
}

void Attention::apply_decay(float *x, int64_t first, int64_t rows, int64_t origin, bool of_keys) const {
  const int64_t offset = first - origin + (back + 1) * window;
  const float *factors = decay + ((of_keys ? offsets : 0) + offset) * d;
  for (int64_t i = 0; i < rows * d; ++i) x[i] *= factors[i];
}

void Attention::mask(int64_t group, int64_t first, int64_t rows, int64_t keys, int64_t span, float *scores) const {
  for (int64_t r = 0; r < rows; ++r, scores += span) {
    const int64_t query = first + r, begin = first_key(query) - keys, end = key_end(query) - keys;
    if (bias) {
      const int64_t window_begin = (query / window - back) * window;
      const float *row = bias + (group % bias_heads * window + query % window) * (back + 1 + ahead) * window;
      for (int64_t j = begin; j < end; ++j) scores[j] += row[keys + j - window_begin];
    }
    if (self_value != 0 && begin <= query - keys && query - keys < end) scores[query - keys] += self_value;
    if (keep) {
      const float *row = keep + group / groups_per_keep * n + keys;
      for (int64_t j = begin; j < end; ++j) scores[j] = row[j] != 0 ? scores[j] : -INFINITY;
    }
    if (bias)
      for (int64_t j = begin; j < end; ++j) scores[j] = scores[j] < kUnseen ? -INFINITY : scores[j];
  }
}

FOR_EACH_PROCESSOR void probabilities_row(float *scores, int64_t begin, int64_t end, int64_t span, float lse) {
  for (int64_t j = 0; j < begin; ++j) scores[j] = 0;
  for (int64_t j = begin; j < end; ++j) scores[j] = exp_of_negative(scores[j] - lse);
  for (int64_t j = end; j < span; ++j) scores[j] = 0;
}

// The gradient of the scores, from that of the weights: ds = p (dp - out · dout).
FOR_EACH_PROCESSOR void scores_gradient(const float *p, const float *out, const float *dout, int64_t e, int64_t span,
                                        float *RESTRICT dp) {
  const float delta = dot(out, dout, e);
  for (int64_t j = 0; j < span; ++j) dp[j] = p[j] * (dp[j] - delta);
}

FOR_EACH_PROCESSOR void add(const float *x, int64_t count, float *RESTRICT to) {
  for (int64_t i = 0; i < count; ++i) to[i] += x[i];
}

void Attention::softmax(int64_t first, int64_t rows, int64_t keys, int64_t span, float *scores, float *lse,
                        float *totals) const {
  for (int64_t r = 0; r < rows; ++r)
    lse[r] = softmax_row(scores + r * span, first_key(first + r) - keys, key_end(first + r) - keys, span, totals + r);
}

void Attention::probabilities(int64_t first, int64_t rows, int64_t keys, int64_t span, float *scores, const float *lse) const {
  for (int64_t r = 0; r < rows; ++r)
    probabilities_row(scores + r * span, first_key(first + r) - keys, key_end(first + r) - keys, span, lse[r]);
}

void Attention::add_bias_gradient(int64_t first, int64_t rows, int64_t keys, int64_t span, const float *ds, float *out) const {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = first + r, begin = first_key(query) - keys, end = key_end(query) - keys,
                  window_begin = (query / window - back) * window;
    float *row = out + query % window * (back + 1 + ahead) * window + keys + begin - window_begin;
    add(ds + r * span + begin, end - begin, row);
  }
}

thread_local Scratch scratch;

}  // namespace

// Attention of all heads.
OPERATOR(local_attention_forward) {
  enum { kOut = kInputs, kLse };  // (b, n, h e); (b h, n)
  if (!fit("fffifffff" "ff", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const Attention a(tensors, data, shapes);
  if (a.decay && a.offsets != (a.back + a.ahead + 2) * a.window + kTile) return 2;
  ThreadPool::instance().parallel_for(a.batch * a.heads * a.tiles, [&](int64_t task) {
    const int64_t group = task / a.tiles, first = task % a.tiles * kTile, rows = std::min(kTile, a.n - first),
                  keys = a.first_key(first), span = a.key_end(first + rows - 1) - keys;
    float *q = scratch.get(rows * a.d + span * a.d + rows * span), *k = q + rows * a.d, *scores = k + span * a.d;
    a.load(a.head(tensors[kQ], group, a.d), first, rows, a.scale, first, false, q);
    a.load(a.head(tensors[kK], group, a.d), keys, span, 1, first, true, k);
    gemm_nt(rows, span, a.d, {q, a.d}, {k, a.d}, {scores, span});
    a.mask(group, first, rows, keys, span, scores);
    float totals[kTile];
    a.softmax(first, rows, keys, span, scores, tensors[kLse] + group * a.n + first, totals);
    const Matrix v = a.head(tensors[kV], group, a.e), out = a.head(tensors[kOut], group, a.e);
    gemm(rows, a.e, span, {scores, span}, {v[keys], v.stride}, {out[first], out.stride});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < a.e; ++c) out[first + r][c] /= totals[r];
  });
  return 0;
}

// The gradients of queries, keys, values and bias.
OPERATOR(local_attention_backward) {
  enum {
    kOut = kInputs, kLse, kDOut,  // of the forward pass, and the gradient of kOut
    kDQ, kDK, kDV,                // (b, n, h d), (b, n, h d), (b, n, h e)
    kDBias,                       // (b h, window, window span), to be summed over the sequences; or of one number
  };
  if (!fit("fffifffff" "fff" "ffff", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const Attention a(tensors, data, shapes);
  ThreadPool::instance().parallel_for(a.batch * a.heads, [&](int64_t group) {
    const Matrix q_head = a.head(tensors[kQ], group, a.d), k_head = a.head(tensors[kK], group, a.d),
                 v = a.head(tensors[kV], group, a.e), out = a.head(tensors[kOut], group, a.e),
                 dout = a.head(tensors[kDOut], group, a.e), dq = a.head(tensors[kDQ], group, a.d),
                 dk = a.head(tensors[kDK], group, a.d), dv = a.head(tensors[kDV], group, a.e);
    const int64_t bias_size = a.window * a.window * (a.back + 1 + a.ahead);
    float *dbias = a.bias ? tensors[kDBias] + group * bias_size : nullptr;
    if (dbias) std::fill_n(dbias, bias_size, 0.0f);
    for (int64_t r = 0; r < a.n; ++r) std::fill_n(dk[r], a.d, 0.0f), std::fill_n(dv[r], a.e, 0.0f);
    for (int64_t first = 0; first < a.n; first += kTile) {
      const int64_t rows = std::min(kTile, a.n - first), keys = a.first_key(first),
                    span = a.key_end(first + rows - 1) - keys;
      float *q = scratch.get((rows + 2 * span) * a.d + 2 * rows * span), *k = q + rows * a.d, *p = k + span * a.d,
            *ds = p + rows * span, *grad = ds + rows * span;
      a.load(q_head, first, rows, a.scale, first, false, q);
      a.load(k_head, keys, span, 1, first, true, k);
      gemm_nt(rows, span, a.d, {q, a.d}, {k, a.d}, {p, span});
      a.mask(group, first, rows, keys, span, p);
      a.probabilities(first, rows, keys, span, p, tensors[kLse] + group * a.n + first);
      gemm_nt(rows, span, a.e, {dout[first], dout.stride}, {v[keys], v.stride}, {ds, span});
      for (int64_t r = 0; r < rows; ++r)
        scores_gradient(p + r * span, out[first + r], dout[first + r], a.e, span, ds + r * span);
      gemm_tn(span, a.e, rows, {p, span}, {dout[first], dout.stride}, {dv[keys], dv.stride}, Add::kYes);
      if (dbias) a.add_bias_gradient(first, rows, keys, span, ds, dbias);
      // Rotated keys' gradients are summed in dk, to be rotated back at the end.
      if (a.decay) {
        gemm_tn(span, a.d, rows, {ds, span}, {q, a.d}, {grad, a.d});
        a.apply_decay(grad, keys, span, first, true);
        for (int64_t r = 0; r < span; ++r) add(grad + r * a.d, a.d, dk[keys + r]);
      } else {
        gemm_tn(span, a.d, rows, {ds, span}, {q, a.d}, {dk[keys], dk.stride}, Add::kYes);
      }
      gemm(rows, a.d, span, {ds, span}, {k, a.d}, {grad, a.d});
      if (a.decay) a.apply_decay(grad, first, rows, first, false);
      a.unload({grad, a.d}, first, rows, a.scale, dq);
    }
    if (a.rotation) a.unload(dk, 0, a.n, 1, dk);
  });
  return 0;
}
