// Calls all operators with made-up tensors, first one after another, then from several threads at once, and says whether
// all outputs are written and the same. `make sanitize` builds it with sanitizers, which end it at the first error.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../local_attention/kernels/thread_pool.h"

using Operator = int(int, void **, int *, int64_t **, const char **, void *, void *);
extern "C" int multiply_in_bfloat16(int);
extern "C" Operator local_attention_forward, local_attention_backward, norm_linear_forward, norm_linear_backward,
    l2_norm_forward, l2_norm_backward, feed_forward_forward, feed_forward_backward, cross_entropy_forward, cross_entropy_backward, attend_to_cache,
    attend_chunk_to_cache, feed_forward, global_norm, times_or_zero, muon_step;

// Instead of the standard library's: so that the thread pool has workers on any machine.
unsigned std::thread::hardware_concurrency() noexcept { return 4; }

namespace {

using Shape = std::vector<int64_t>;

int64_t size_of(const Shape &shape) {
  int64_t size = 1;
  for (int64_t axis : shape) size *= axis;
  return size;
}

// Memory of exactly the size of the tensor, so that AddressSanitizer sees what is beyond it.
struct Tensor {
  Shape shape;
  std::vector<float> numbers;
  std::vector<int32_t> integers;

  void *data() { return integers.empty() ? static_cast<void *>(numbers.data()) : integers.data(); }
};

using Tensors = std::vector<Tensor>;

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  Tensor operator()(Shape shape, float low = -1, float high = 1) {
    std::vector<float> numbers(size_of(shape));
    for (float &x : numbers) x = std::uniform_real_distribution<float>(low, high)(generator_);
    return {shape, numbers, {}};
  }

 private:
  std::mt19937 generator_;
};

Tensor integers(std::vector<int32_t> values) { return {{int64_t(values.size())}, {}, values}; }

// The outputs, of these shapes.
Tensors call(Operator *run, Tensors inputs, const std::vector<Shape> &shapes, int status = 0) {
  const size_t given = inputs.size();
  for (const Shape &shape : shapes) inputs.push_back({shape, std::vector<float>(size_of(shape), NAN), {}});
  std::vector<void *> data;
  std::vector<int> axes;
  std::vector<int64_t *> sizes;
  std::vector<const char *> types;
  for (Tensor &tensor : inputs) {
    data.push_back(tensor.data());
    axes.push_back(tensor.shape.size());
    sizes.push_back(tensor.shape.data());
    types.push_back(tensor.integers.empty() ? "float32" : "int32");
  }
  if (run(inputs.size(), data.data(), axes.data(), sizes.data(), types.data(), nullptr, nullptr) != status) {
    std::fprintf(stderr, "an operator did not return %d\n", status);
    std::exit(1);
  }
  return {inputs.begin() + given, inputs.end()};
}

Tensors operator+(Tensors a, const Tensors &b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

std::vector<Shape> shapes_of(const Tensors &tensors) {
  std::vector<Shape> shapes;
  for (const Tensor &tensor : tensors) shapes.push_back(tensor.shape);
  return shapes;
}

Tensors attention(int64_t n, int window, int back, int ahead, bool causal, bool exact, bool options) {
  Random random(n + window);
  const int64_t b = 2, heads = 2, d = 6, e = 5, span = window * (back + 1 + ahead), offsets = (back + ahead + 2) * window + 64;
  const Tensor absent = random({1});
  Tensor keep = random({b, n});
  for (float &x : keep.numbers) x = x > -0.5;
  const Tensors inputs = {random({b, n, heads * d}), random({b, n, heads * d}), random({b, n, heads * e}),
                          integers({window, back, ahead, causal, exact}), random({heads, 2}),
                          options ? random({2, n, d}) : absent, options ? random({2, offsets, d}) : absent,
                          options ? keep : absent, options ? random({heads, window, span}) : absent};
  const Tensors out = call(local_attention_forward, inputs, {{b, n, heads * e}, {b * heads, n}});
  const Shape bias = options ? Shape{b * heads, window, span} : Shape{1};
  Tensors gradients = call(local_attention_backward, inputs + out + Tensors{random({b, n, heads * e})},
                           {inputs[0].shape, inputs[1].shape, inputs[2].shape, bias});
  if (!options) gradients.pop_back();
  return Tensors{out[0]} + gradients;
}

Tensors norm_linear(int64_t rows, const std::vector<int64_t> &sizes) {
  Random random(rows);
  Tensors inputs = {random({rows, 7}), random({1, 7}), random({1, 7})};
  std::vector<Shape> results;
  for (int64_t size : sizes) inputs.push_back(random({size, 7})), results.push_back({rows, size});
  const Tensors out = call(norm_linear_forward, inputs, results);
  return out + call(norm_linear_backward, inputs + out, shapes_of(inputs));
}

Tensors branch(int64_t rows) {
  Random random(rows);
  const int64_t dim = 9, inner = 70;
  const Tensors inputs = {random({rows, dim}),  random({1, dim}),     random({1, dim}),
                          random({inner, dim}), random({inner, dim}), random({dim, inner})};
  const Tensors out = call(feed_forward_forward, inputs, {{rows, dim}, {rows, inner}, {rows, inner}});
  const Tensors backward = {out[1], out[2], out[0]};
  return out + call(feed_forward_backward, inputs + backward, shapes_of(inputs)) +
         call(feed_forward, inputs, {{rows, dim}});
}

Tensors l2_norm(int64_t rows, int64_t d) {
  Random random(rows + d);
  const Tensors inputs = {random({rows, d}), random({d})};
  const Tensors out = call(l2_norm_forward, inputs, {{rows, d}});
  return out + call(l2_norm_backward, inputs + out, shapes_of(inputs));
}

Tensors cross_entropy(int64_t rows, int32_t classes) {
  Random random(rows);
  std::vector<int32_t> labels(rows);
  for (int64_t row = 0; row < rows; ++row) labels[row] = row % classes;
  Tensors inputs = {random({rows, classes}), integers(labels)};
  const Tensors losses = call(cross_entropy_forward, inputs, {{rows}});
  const Tensors gradient = call(cross_entropy_backward, inputs + losses, {{rows, classes}});
  inputs[1].integers[rows - 1] = classes;
  call(cross_entropy_forward, inputs, {{rows}}, 2);
  call(cross_entropy_backward, inputs + losses, {{rows, classes}}, 2);
  return losses + gradient;
}

Tensors decoding(int64_t b, int64_t span, bool options) {
  Random random(b + span);
  const int64_t dim = 9, heads = 3, d = 6, inner = heads * d, rows = b * heads;
  const Tensor absent = random({1});
  std::vector<int32_t> slots(rows);
  for (int64_t row = 0; row < rows; ++row) slots[row] = row * span + row % span;
  return call(attend_to_cache,
              {random({b, dim}), random({1, dim}), random({1, dim}), random({inner, dim}), random({inner, dim}),
               random({inner, dim}), random({dim, inner}), options ? random({heads, dim}) : absent, random({heads}),
               options ? random({1, d}) : absent, options ? random({1, d}) : absent, integers({options}),
               random({4, rows, d}), random({options ? rows : 1, 1, span}), options ? random({1, span, d}) : absent,
               random({rows * span, d}), random({rows * span, d}), integers(slots)},
              {{b, dim}});
}

Tensors prefill(int64_t n, int64_t slots, bool options) {
  Random random(n + slots);
  const int64_t b = 2, heads = 3, d = 6, rows = b * heads;
  std::vector<int32_t> into(rows * n);
  for (int64_t i = 0; i < rows * n; ++i) into[i] = i / n * slots + (i % n + 1) % slots;
  return call(attend_chunk_to_cache,
              {random({b, n, heads * d}), random({b, n, heads * d}), random({b, n, heads * d}), random({4, rows * n, d}),
               random({options ? rows : 1, n, slots + n}), options ? random({1, slots + n, d}) : random({1}),
               random({rows * slots, d}), random({rows * slots, d}), integers(into)},
              {{b, n, heads * d}});
}

Tensors clip(int64_t rows) {
  Random random(rows);
  const Tensors tensors = {random({rows, 900}), random({}), random({7})};
  const Tensors norm = call(global_norm, tensors, {{1}});
  return norm + call(times_or_zero, norm + tensors, shapes_of(tensors));
}

Tensors muon(int64_t k, int64_t m, int64_t n, bool options) {
  Random random(m + n);
  Tensors inputs = {random({3}, 0.5, 0.9)};
  for (int64_t i = 0; i < 3 * k; ++i) inputs.push_back(random({m, n}));
  inputs.push_back(options ? random({k, m, 1}, 0.1, 1) : random({1}));
  return call(muon_step, inputs, shapes_of({inputs.begin() + 1 + k, inputs.end()}));
}

// Many loops of few tasks, each of which must run once.
Tensors loops(int64_t count) {
  std::vector<int> runs(count);
  for (int i = 0; i < 300; ++i) kernels::ThreadPool::instance().parallel_for(count, [&](int64_t task) { ++runs[task]; });
  if (runs != std::vector<int>(count, 300)) std::fprintf(stderr, "a loop did not run each task once\n"), std::exit(1);
  return {};
}

std::vector<std::function<Tensors()>> jobs() {
  std::vector<std::function<Tensors()>> jobs;
  for (int64_t count : {1, 2, 3, 4, 5, 9}) jobs.push_back([=] { return loops(count); });
  for (int64_t n : {1, 63, 64, 65, 150})
    for (int window : {1, 3, 40, 100})
      for (int kind = 0; kind < 4; ++kind)
        jobs.push_back([=] {
          const bool causal = kind % 2, exact = (kind + window) % 3, options = (n + kind) % 2;
          return attention(n, window, kind % 3, causal ? 0 : (kind + n) % 3, causal, exact, options);
        });
  for (int64_t rows : {1, 64, 65, 1100}) {
    jobs.push_back([=] { return norm_linear(rows, {65}); });
    jobs.push_back([=] { return norm_linear(rows, {1, 64, 3}); });
    jobs.push_back([=] { return branch(rows); });
    for (int64_t d : {1, 33}) jobs.push_back([=] { return l2_norm(rows, d); });
  }
  for (int64_t rows : {1, 64, 200})
    for (int32_t classes : {1, 16, 37}) jobs.push_back([=] { return cross_entropy(rows, classes); });
  for (int64_t rows : {1, 37, 100}) jobs.push_back([=] { return clip(rows); });
  for (int64_t k : {1, 3})
    for (int64_t m : {2, 64, 100})
      for (int64_t n : {2, 64, 150}) jobs.push_back([=] { return muon(k, m, n, (m + n) % 3); });
  for (int64_t b : {1, 9})
    for (int64_t span : {1, 21})
      for (bool options : {false, true}) jobs.push_back([=] { return decoding(b, span, options); });
  for (int64_t n : {2, 65})
    for (int64_t slots : {65, 70})
      for (bool options : {false, true}) jobs.push_back([=] { return prefill(n, slots, options); });
  return jobs;
}

bool all_written(const Tensors &tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor &tensor) {
    return std::none_of(tensor.numbers.begin(), tensor.numbers.end(), [](float x) { return std::isnan(x); });
  });
}

bool same(const Tensors &one, const Tensors &other) {
  return std::equal(one.begin(), one.end(), other.begin(), other.end(), [](const Tensor &a, const Tensor &b) {
    return a.shape == b.shape && !std::memcmp(a.numbers.data(), b.numbers.data(), a.numbers.size() * sizeof(float));
  });
}

// Runs all jobs, alone and in several threads; returns whether one failed.
bool fails(const std::vector<std::function<Tensors()>> &all) {
  std::vector<Tensors> alone;
  for (const auto &job : all) alone.push_back(job());
  for (size_t i = 0; i < all.size(); ++i)
    if (!all_written(alone[i])) return std::fprintf(stderr, "job %zu did not write all of its outputs\n", i), true;
  std::atomic<int> different{0};
  std::vector<std::thread> threads;
  for (size_t thread = 0; thread < 3; ++thread)
    threads.emplace_back([&, thread] {
      for (size_t apart : {size_t(0), all.size() / 3})  // the same operators at once, then different ones
        for (size_t i = 0; i < all.size(); ++i) {
          const size_t job = (i + thread * apart) % all.size();
          if (!same(all[job](), alone[job])) ++different;
        }
    });
  for (std::thread &thread : threads) thread.join();
  if (different) std::fprintf(stderr, "%d results were others with several threads\n", different.load());
  return different;
}

}  // namespace

int main() {
  const auto all = jobs();
  if (fails(all)) return 1;
  const bool can = !multiply_in_bfloat16(1);
  if (can && fails(all)) return 1;
  std::printf("%zu jobs of operators, alone and in three threads at once%s: no error\n", all.size(),
              can ? ", also in bfloat16" : "");
}
