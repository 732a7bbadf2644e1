// In place of oneDNN, whose code no sanitizer knows: its C functions for matrix products, plainly.

#include <cstdint>
#include <cstring>

namespace {

float number(float x) { return x; }

float number(uint16_t bfloat16) {
  const uint32_t bits = uint32_t(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename Number>
int multiply(char a_transposed, char b_transposed, int64_t m, int64_t n, int64_t k, float alpha, const Number *a, int64_t lda,
             const Number *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += number(a_transposed == 'T' ? a[l * lda + i] : a[i * lda + l]) *
               number(b_transposed == 'T' ? b[j * ldb + l] : b[l * ldb + j]);
      c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
    }
  return 0;
}

}  // namespace

extern "C" int dnnl_sgemm(char a_transposed, char b_transposed, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                          int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  return multiply(a_transposed, b_transposed, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

extern "C" int dnnl_gemm_bf16bf16f32(char a_transposed, char b_transposed, int64_t m, int64_t n, int64_t k, float alpha,
                                     const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float beta, float *c,
                                     int64_t ldc) {
  return multiply(a_transposed, b_transposed, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
