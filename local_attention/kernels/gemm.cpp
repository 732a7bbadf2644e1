#include "gemm.h"

#include <dlfcn.h>

#include <atomic>

#include "vector.h"

namespace kernels {

namespace {

// oneDNN's C functions for row-major matrices. MindSpore builds them so that a call uses the calling thread alone.
template <typename Number>
using Gemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const Number *, int64_t, const Number *, int64_t, float,
                     float *, int64_t);

template <typename Number>
Gemm<Number> find(const char *name) {
  void *library = dlopen("libdnnl.so.3", RTLD_NOW | RTLD_NOLOAD);  // MindSpore has loaded it
  return library ? reinterpret_cast<Gemm<Number>>(dlsym(library, name)) : nullptr;
}

Gemm<float> find_sgemm() { return find<float>("dnnl_sgemm"); }
Gemm<Bfloat16> find_gemm_bfloat16() { return find<Bfloat16>("dnnl_gemm_bf16bf16f32"); }

std::atomic<bool> in_bfloat16{false};

// To the nearest, of two the even one; NaN stays NaN.
FOR_EACH_PROCESSOR void round_row(const float *x, int64_t n, Bfloat16 *RESTRICT out) {
  for (int64_t c = 0; c < n; ++c) {
    uint32_t bits;
    std::memcpy(&bits, x + c, sizeof bits);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out[c] = is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

void multiply(char a_transposed, char b_transposed, int64_t m, int64_t n, int64_t k, Factor a, Factor b, Matrix out,
              Add add) {
  static const Gemm<float> sgemm = find_sgemm();
  static const Gemm<Bfloat16> gemm_bfloat16 = find_gemm_bfloat16();
  const float beta = add == Add::kYes ? 1 : 0;
  if (a.rounded && b.rounded)
    gemm_bfloat16(a_transposed, b_transposed, m, n, k, 1, a.rounded, a.stride, b.rounded, b.stride, beta, out.data,
                  out.stride);
  else
    sgemm(a_transposed, b_transposed, m, n, k, 1, a.x.data, a.x.stride, b.x.data, b.x.stride, beta, out.data, out.stride);
}

}  // namespace

Rounded::Rounded(Matrix x, int64_t rows, int64_t columns) : x_(x), columns_(columns) {
  if (!in_bfloat16) return;
  numbers_.reset(new Bfloat16[rows * columns]);
  for (int64_t row = 0; row < rows; ++row) round_row(x[row], columns, numbers_.get() + row * columns);
}

void gemm(int64_t m, int64_t n, int64_t k, Factor a, Factor b, Matrix out, Add add) {
  multiply('N', 'N', m, n, k, a, b, out, add);
}

void gemm_nt(int64_t m, int64_t n, int64_t k, Factor a, Factor b, Matrix out, Add add) {
  multiply('N', 'T', m, n, k, a, b, out, add);
}

void gemm_tn(int64_t m, int64_t n, int64_t k, Factor a, Factor b, Matrix out, Add add) {
  multiply('T', 'N', m, n, k, a, b, out, add);
}

}  // namespace kernels

// Whether the products can be computed; asked by kernels/__init__.py.
extern "C" int has_gemm() { return kernels::find_sgemm() != nullptr; }

// Lets products round their operands to bfloat16 and sum in float32, or no longer; asked for by kernels/__init__.py.
// Returns 0, or 1 where the processor or oneDNN has no such products.
extern "C" int multiply_in_bfloat16(int wanted) {
#if defined(__x86_64__)
  const bool can = __builtin_cpu_supports("avx512bf16") && kernels::find_gemm_bfloat16();
#else
  const bool can = false;
#endif
  if (wanted && !can) return 1;
  kernels::in_bfloat16 = wanted;
  return 0;
}
