// Attention of several tokens of each sequence at once to the KV cache and to themselves; see backends/cached_cpu.py.

#include "attend.h"
#include "operator.h"
#include "scratch.h"
#include "thread_pool.h"

namespace {

using namespace kernels;

thread_local Scratch scratch;

FOR_EACH_PROCESSOR void multiply_into(const float *x, const float *factors, int64_t n, float *out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factors[i];
}

FOR_EACH_PROCESSOR void add(const float *x, int64_t n, float *RESTRICT to) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i];
}

}  // namespace

// A task is a head of a sequence. Keys are those in the slots of its cache, then its own.
OPERATOR(attend_chunk_to_cache) {
  enum {
    kQ, kK, kV,      // (b, n, h d)
    kRotation,       // (4, b h n, d): cosine and sine for queries, times the scale of the scores, and for keys
    kMask,           // (1 or b h, n, slots + n), additive
    kDecay,          // optional (1, slots + n, d)
    kKeys, kValues,  // (b h slots, d), into which the new ones are written
    kSlots,          // (b h n) int32: in these rows
    kOut,            // (b, n, h d)
  };
  if (!fit("ffffffffif", count, types)) return 1;
  const Tensors tensors{data, axes, shapes};
  const int64_t batch = shapes[kQ][0], n = shapes[kQ][1], d = shapes[kKeys][1], heads = shapes[kQ][2] / d,
                slots = shapes[kKeys][0] / (batch * heads), span = slots + n;
  const float *decay = tensors.optional(kDecay);
  ThreadPool::instance().parallel_for(batch * heads, [&](int64_t group) {
    const auto head = [&](int i) {
      return Matrix{tensors[i] + group / heads * n * heads * d + group % heads * d, heads * d};
    };
    const int64_t groups = batch * heads;
    const auto rotation = [&](int64_t which) { return tensors[kRotation] + (which * groups + group) * n * d; };
    float *q = scratch.get((2 * n + (decay ? span : 0)) * d + n * span), *k = q + n * d, *scores = k + n * d;
    Matrix cached_keys{tensors[kKeys] + group * slots * d, d}, values{tensors[kValues] + group * slots * d, d};
    Matrix own_keys{k, d};
    rotate_rows(head(kQ), rotation(0), rotation(1), n, d, 1, q);
    rotate_rows(head(kK), rotation(2), rotation(3), n, d, 1, k);
    if (decay) {  // keys are kept without it
      float *decayed = scores + n * span;
      multiply_into(cached_keys.data, decay, slots * d, decayed);
      multiply_into(k, decay + slots * d, n * d, decayed + slots * d);
      cached_keys = {decayed, d}, own_keys = {decayed + slots * d, d};
    }
    gemm_nt(n, slots, d, {q, d}, cached_keys, {scores, span});
    gemm_nt(n, n, d, {q, d}, own_keys, {scores + slots, span});
    add(tensors[kMask] + (shapes[kMask][0] > 1 ? group * n * span : 0), n * span, scores);
    const Matrix out = head(kOut), own_values = head(kV);
    std::vector<float> totals(n);
    for (int64_t row = 0; row < n; ++row) softmax_row(scores + row * span, 0, span, span, &totals[row]);
    gemm(n, d, slots, {scores, span}, values, out);
    gemm(n, d, n, {scores + slots, span}, own_values, out, Add::kYes);
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t c = 0; c < d; ++c) out[row][c] /= totals[row];
      const int64_t slot = tensors.integers(kSlots)[group * n + row];
      std::copy_n(k + row * d, d, tensors[kKeys] + slot * d);
      std::copy_n(own_values[row], d, tensors[kValues] + slot * d);
    }
  });
  return 0;
}
