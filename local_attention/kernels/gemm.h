// Matrix products by the oneDNN that MindSpore brings.

#pragma once

#include <cstdint>
#include <memory>

namespace kernels {

// A matrix of rows that are `stride` numbers apart.
struct Matrix {
  float *data;
  int64_t stride;

  float *operator[](int64_t row) const { return data + row * stride; }
};

using Bfloat16 = uint16_t;

// What is multiplied: a matrix, in bfloat16, too, if it comes from a Rounded.
struct Factor {
  Matrix x;
  const Bfloat16 *rounded = nullptr;
  int64_t stride = 0;  // of the rounded numbers

  Factor(Matrix matrix) : x(matrix) {}
  Factor(float *data, int64_t stride) : x{data, stride} {}
  Factor(Matrix matrix, const Bfloat16 *numbers, int64_t columns) : x(matrix), rounded(numbers), stride(columns) {}
  Factor from_column(int64_t first) const {
    return {Matrix{x.data + first, x.stride}, rounded ? rounded + first : nullptr, stride};
  }
};

// A matrix that has been rounded to bfloat16 for several products, if multiply_in_bfloat16 was called.
class Rounded {
 public:
  Rounded(Matrix x, int64_t rows, int64_t columns);
  operator Factor() const { return {x_, numbers_.get(), columns_}; }

 private:
  Matrix x_;
  int64_t columns_;
  std::unique_ptr<Bfloat16[]> numbers_;
};

enum class Add { kNo, kYes };  // whether a product is added to what is there

// out (m, n) = a (m, k) b (k, n), on the calling thread. With _nt, b is given as (n, k), with _tn, a as (k, m). In bfloat16,
// summed in float32, if both are rounded.
void gemm(int64_t m, int64_t n, int64_t k, Factor a, Factor b, Matrix out, Add add = Add::kNo);
void gemm_nt(int64_t m, int64_t n, int64_t k, Factor a, Factor b, Matrix out, Add add = Add::kNo);
void gemm_tn(int64_t m, int64_t n, int64_t k, Factor a, Factor b, Matrix out, Add add = Add::kNo);

}  // namespace kernels
