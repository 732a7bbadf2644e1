#include "gemm.h"

#include <dlfcn.h>

namespace kernels {

namespace {

// oneDNN's C function for row-major matrices. MindSpore builds it so that a call uses the calling thread alone.
using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t, float,
                      float *, int64_t);

Sgemm find() {
  void *library = dlopen("libdnnl.so.3", RTLD_NOW | RTLD_NOLOAD);  // MindSpore has loaded it
  return library ? reinterpret_cast<Sgemm>(dlsym(library, "dnnl_sgemm")) : nullptr;
}

void multiply(char a_transposed, char b_transposed, int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix out,
              Add add) {
  static const Sgemm sgemm = find();
  const float beta = add == Add::kYes ? 1 : 0;
  sgemm(a_transposed, b_transposed, m, n, k, 1, a.data, a.stride, b.data, b.stride, beta, out.data, out.stride);
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix out, Add add) {
  multiply('N', 'N', m, n, k, a, b, out, add);
}

void gemm_nt(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix out, Add add) {
  multiply('N', 'T', m, n, k, a, b, out, add);
}

void gemm_tn(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Matrix out, Add add) {
  multiply('T', 'N', m, n, k, a, b, out, add);
}

}  // namespace kernels

// Whether the products can be computed; asked by kernels/__init__.py.
extern "C" int has_gemm() { return kernels::find() != nullptr; }
