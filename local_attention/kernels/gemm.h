// Matrix products by the oneDNN that MindSpore brings.

#pragma once

#include <cstdint>

namespace kernels {

// A matrix of rows that are `stride` numbers apart.
struct Matrix {
  float *data;
  int64_t stride;

  float *operator[](int64_t row) const { return data + row * stride; }
};

enum class Add { kNo, kYes };  // whether a product is added to what is there

// out (m, n) = a (m, k) b (k, n), on the calling thread. With _nt, b is given as (n, k), with _tn, a as (k, m).
void gemm(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix out, Add add = Add::kNo);
void gemm_nt(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix out, Add add = Add::kNo);
void gemm_tn(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix out, Add add = Add::kNo);

}  // namespace kernels
