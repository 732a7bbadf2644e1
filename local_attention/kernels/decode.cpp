// Attention to the KV cache and feed-forward of one decoded token, each as one operator of MindSpore on a CPU; see
// backends/cached_cpu.py.
//
// A token needs every weight once, so it takes at least as long as reading the weights from memory. With MindSpore's own
// operators, 25 per layer at about 10 µs each, it takes twice as long.
//
// Numbers are float32 unless stated otherwise, tensors are contiguous. The threads divide the rows of weights and the
// heads among them. Each sum is computed by one thread, so results do not depend on the number of threads.

#include <cmath>
#include <cstdlib>
#include <memory>

#include "attend.h"
#include "operator.h"
#include "thread_pool.h"

namespace {

using namespace kernels;

constexpr int64_t kCacheLine = 64;  // bytes
constexpr int64_t kBlock = 32;      // rows of weights per task
constexpr int64_t kAhead = 2048;    // prefetch distance, in numbers
constexpr int64_t kThreads = 8;     // as many use the whole bandwidth of the memory

int64_t blocks(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

template <typename Task>
void parallel_for(int64_t count, const Task &task) {
  ThreadPool::instance().parallel_for(count, task, kThreads);
}

// A matrix whose rows are aligned to cache lines: else every second access would touch two of them.
class AlignedMatrix {
 public:
  AlignedMatrix(int64_t rows, int64_t columns)
      : stride((columns * sizeof(float) + kCacheLine - 1) / kCacheLine * kCacheLine / sizeof(float)),
        numbers_(static_cast<float *>(std::aligned_alloc(kCacheLine, rows * stride * sizeof(float))), std::free) {}
  float *operator[](int64_t row) const { return numbers_.get() + row * stride; }
  const int64_t stride;

 private:
  std::unique_ptr<float, decltype(&std::free)> numbers_;
};

INLINE void prefetch(const float *x, int64_t n) {
  for (int64_t c = 0; c < n; c += kCacheLine / sizeof(float)) __builtin_prefetch(x + c);
}

// The dot products of a row and eight others, which are x_stride apart; the row is read once.
INLINE void eight_dots(const float *row, const float *x, int64_t x_stride, int64_t n, float *out, int64_t out_stride) {
  const float *x1 = x + x_stride, *x2 = x1 + x_stride, *x3 = x2 + x_stride, *x4 = x3 + x_stride, *x5 = x4 + x_stride,
              *x6 = x5 + x_stride, *x7 = x6 + x_stride;
  float sum = 0, sum1 = 0, sum2 = 0, sum3 = 0, sum4 = 0, sum5 = 0, sum6 = 0, sum7 = 0;
  for (int64_t c = 0; c < n; ++c) {
    sum += row[c] * x[c];
    sum1 += row[c] * x1[c];
    sum2 += row[c] * x2[c];
    sum3 += row[c] * x3[c];
    sum4 += row[c] * x4[c];
    sum5 += row[c] * x5[c];
    sum6 += row[c] * x6[c];
    sum7 += row[c] * x7[c];
  }
  const float sums[] = {sum, sum1, sum2, sum3, sum4, sum5, sum6, sum7};
  for (int64_t i = 0; i < 8; ++i) out[i * out_stride] = sums[i];
}

// to += factor * x, of n numbers.
INLINE void add_multiple(float *to, float factor, const float *x, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] += factor * x[c];
}

// to += factors[0] * x[0] + … + factors[7] * x[7], of eight rows of n numbers.
INLINE void add_eight_multiples(float *to, const float *factors, const float *x, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    to[c] += factors[0] * x[c] + factors[1] * x[n + c] + factors[2] * x[2 * n + c] + factors[3] * x[3 * n + c] +
             factors[4] * x[4 * n + c] + factors[5] * x[5 * n + c] + factors[6] * x[6 * n + c] + factors[7] * x[7 * n + c];
  }
}

// Columns begin … end - 1 of out = x weightᵀ, weight: (…, n).
FOR_EACH_PROCESSOR void multiply(const AlignedMatrix &x, int64_t batch, const float *weight, int64_t n, int64_t begin,
                                 int64_t end, float *out, int64_t out_stride) {
  for (int64_t r = begin; r < end; ++r) {
    const float *row = weight + r * n;
    prefetch(row + kAhead, n);
    int64_t i = 0;
    for (; i + 8 <= batch; i += 8) eight_dots(row, x[i], x.stride, n, out + i * out_stride + r, out_stride);
    for (; i < batch; ++i) out[i * out_stride + r] = dot(row, x[i], n);
  }
}

// LayerNorm of x: (batch, n).
FOR_EACH_PROCESSOR void layer_norm(const float *x, const float *gamma, const float *beta, int64_t batch, int64_t n,
                                   const AlignedMatrix &out) {
  for (int64_t i = 0; i < batch; ++i) {
    const float *row = x + i * n;
    float *normed = out[i], mean = 0, variance = 0;
    for (int64_t c = 0; c < n; ++c) mean += row[c];
    mean /= n;
    for (int64_t c = 0; c < n; ++c) variance += (row[c] - mean) * (row[c] - mean);
    const float scale = 1 / std::sqrt(variance / n + 1e-5f);
    for (int64_t c = 0; c < n; ++c) normed[c] = (row[c] - mean) * scale * gamma[c] + beta[c];
  }
}

// value *= gelu(gate), the exact GELU.
FOR_EACH_PROCESSOR void geglu(float *value, const float *gate, int64_t n) {
  for (int64_t c = 0; c < n; ++c) value[c] *= gate[c] * (0.5f + 0.5f * erf(gate[c] * 0.707106781f));
}

// x with unit length, times scale if it is not null.
INLINE void normalise(float *x, const float *scale, int64_t d) {
  const float inverse = inverse_length(dot(x, x, d));
  for (int64_t c = 0; c < d; ++c) x[c] *= inverse * (scale ? scale[c] : 1);
}

// One head, and the `span` slots of keys and values, of d numbers each, in its cache.
struct Head {
  int64_t span, d;
  const float *q_cos, *q_sin, *k_cos, *k_sin;  // (d); those of the query times the scale of the scores
  const float *q_scale, *k_scale;              // (d), or null
  bool unit_keys;
  const float *decay;    // (span, d), or null
  const float *mask;     // (span), additive
  float *keys, *values;  // (span, d)
  int64_t own;           // the slot that takes the new key and value
};

// Attend to the cache: from the projections q, k, v to out, each of d numbers; scratch has room for d + span numbers.
FOR_EACH_PROCESSOR void attend(const Head &head, float *q, float *k, const float *v, float *scratch, float *out) {
  const int64_t span = head.span, d = head.d;
  float *query = scratch, *scores = scratch + d;
  if (head.q_scale) {
    normalise(q, head.q_scale, d);
    normalise(k, head.k_scale, d);
  }
  if (head.unit_keys) normalise(k, nullptr, d);
  rotate_rows({q, d}, head.q_cos, head.q_sin, 1, d, 1, query);
  rotate_rows({k, d}, head.k_cos, head.k_sin, 1, d, 1, head.keys + head.own * d);
  std::copy_n(v, d, head.values + head.own * d);
  int64_t s = 0;
  if (head.decay) {
    for (; s < span; ++s) {
      const float *key = head.keys + s * d, *decay = head.decay + s * d;
      scores[s] = 0;
      for (int64_t c = 0; c < d; ++c) scores[s] += query[c] * (key[c] * decay[c]);
    }
  } else {
    for (; s + 8 <= span; s += 8) {
      prefetch(head.keys + s * d + kAhead, 8 * d);
      eight_dots(query, head.keys + s * d, d, d, scores + s, 1);
    }
    for (; s < span; ++s) scores[s] = dot(query, head.keys + s * d, d);
  }
  for (s = 0; s < span; ++s) scores[s] += head.mask[s];
  const float largest = maximum(scores, span);
  float total = 0;
  for (s = 0; s < span; ++s) scores[s] = exp_of_negative(scores[s] - largest);
  for (s = 0; s < span; ++s) total += scores[s];
  for (s = 0; s < span; ++s) scores[s] /= total;
  std::fill_n(out, d, 0.0f);
  for (s = 0; s + 8 <= span; s += 8) {
    prefetch(head.values + s * d + kAhead, 8 * d);
    add_eight_multiples(out, scores + s, head.values + s * d, d);
  }
  for (; s < span; ++s) add_multiple(out, scores[s], head.values + s * d, d);
}

}  // namespace

// One token of each of b sequences through LocalMHA.
OPERATOR(attend_to_cache) {
  enum {
    kX,                    // (b, dim)
    kGamma, kBeta,         // (1, dim)
    kToQ, kToK, kToV,      // (h d, dim)
    kToOut,                // (dim, h d)
    kToGate,               // optional (h, dim)
    kGateBias,             // (h)
    kQScale, kKScale,      // optional (1, d)
    kUnitKeys,             // (1) int32: whether keys are l2-normalised
    kRotation,             // (4, b h, d): cosine and sine for queries, times the scale of the scores, and for keys
    kMask,                 // (1 or b h, 1, span), additive
    kDecay,                // optional (1, span, d)
    kKeys, kValues,        // (b h span, d), into which the new ones are written
    kSlots,                // (b h) int32: in these rows
    kOut,                  // (b, dim)
  };
  if (!fit("fffffffffffifffffif", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t batch = shapes[kX][0], dim = shapes[kX][1], inner = shapes[kToQ][0], d = shapes[kKeys][1],
                heads = inner / d, span = shapes[kKeys][0] / (batch * heads);
  const float *to_gate = tensors.optional(kToGate);
  const AlignedMatrix normed(batch, dim), q(batch, inner), k(batch, inner), v(batch, inner), merged(batch, inner),
      scratch(batch * heads, d + span);

  layer_norm(tensors[kX], tensors[kGamma], tensors[kBeta], batch, dim, normed);
  const float *const weights[] = {tensors[kToQ], tensors[kToK], tensors[kToV]};
  const AlignedMatrix *const projections[] = {&q, &k, &v};
  parallel_for(3 * blocks(inner), [&](int64_t i) {
    const int64_t which = i / blocks(inner), begin = i % blocks(inner) * kBlock, end = std::min(begin + kBlock, inner);
    multiply(normed, batch, weights[which], dim, begin, end, (*projections[which])[0], q.stride);
  });
  parallel_for(batch * heads, [&](int64_t row) {
    const int64_t sequence = row / heads, h = row % heads;
    Head head;
    head.span = span, head.d = d;
    const float *rotation = tensors[kRotation] + row * d;
    head.q_cos = rotation, head.q_sin = rotation + batch * heads * d;
    head.k_cos = rotation + 2 * batch * heads * d, head.k_sin = rotation + 3 * batch * heads * d;
    head.q_scale = tensors.optional(kQScale), head.k_scale = tensors.optional(kKScale);
    head.unit_keys = tensors.integers(kUnitKeys)[0];
    head.decay = tensors.optional(kDecay);
    head.mask = tensors[kMask] + (shapes[kMask][0] > 1 ? row * span : 0);
    head.keys = tensors[kKeys] + row * span * d, head.values = tensors[kValues] + row * span * d;
    head.own = tensors.integers(kSlots)[row] - row * span;
    float *out = merged[sequence] + h * d;
    attend(head, q[sequence] + h * d, k[sequence] + h * d, v[sequence] + h * d, scratch[row], out);
    if (to_gate) {
      const float gate = dot(normed[sequence], to_gate + h * dim, dim) + tensors[kGateBias][h];
      for (int64_t c = 0; c < d; ++c) out[c] /= 1 + std::exp(-gate);
    }
  });
  parallel_for(blocks(dim), [&](int64_t i) {
    multiply(merged, batch, tensors[kToOut], inner, i * kBlock, std::min((i + 1) * kBlock, dim), tensors[kOut], dim);
  });
  return 0;
}

// One token of each of b sequences through FeedForward.
OPERATOR(feed_forward) {
  enum {
    kX,                 // (b, dim)
    kGamma, kBeta,      // (1, dim)
    kToValue, kToGate,  // (inner, dim)
    kToOut,             // (dim, inner)
    kOut,               // (b, dim)
  };
  if (!fit("fffffff", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t batch = shapes[kX][0], dim = shapes[kX][1], inner = shapes[kToValue][0];
  const AlignedMatrix normed(batch, dim), values(batch, inner), gates(batch, inner);

  layer_norm(tensors[kX], tensors[kGamma], tensors[kBeta], batch, dim, normed);
  parallel_for(blocks(inner), [&](int64_t i) {
    const int64_t begin = i * kBlock, end = std::min(begin + kBlock, inner);
    multiply(normed, batch, tensors[kToValue], dim, begin, end, values[0], values.stride);
    multiply(normed, batch, tensors[kToGate], dim, begin, end, gates[0], gates.stride);
    for (int64_t row = 0; row < batch; ++row) geglu(values[row] + begin, gates[row] + begin, end - begin);
  });
  parallel_for(blocks(dim), [&](int64_t i) {
    multiply(values, batch, tensors[kToOut], inner, i * kBlock, std::min((i + 1) * kBlock, dim), tensors[kOut], dim);
  });
  return 0;
}
