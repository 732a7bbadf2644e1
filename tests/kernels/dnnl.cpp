// In place of oneDNN, whose code no sanitizer knows: its C function for matrix products, plainly.

#include <cstdint>

extern "C" int dnnl_sgemm(char a_transposed, char b_transposed, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                          int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += (a_transposed == 'T' ? a[l * lda + i] : a[i * lda + l]) * (b_transposed == 'T' ? b[j * ldb + l] : b[l * ldb + j]);
      c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
    }
  return 0;
}
