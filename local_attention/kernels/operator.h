// The arguments of an operator as MindSpore hands them over: its inputs, then its outputs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace kernels {

struct Tensors {
  void **data;
  const int *axes;
  int64_t **shapes;

  float *operator[](int i) const { return static_cast<float *>(data[i]); }
  const int32_t *integers(int i) const { return static_cast<const int32_t *>(data[i]); }
  // An absent one is a tensor of a single axis.
  float *optional(int i) const { return axes[i] > 1 ? (*this)[i] : nullptr; }
};

// Whether the arguments are those that `kinds` names in order: f(loat32) or i(nt32).
inline bool fit(const char *kinds, int count, const char **types) {
  if (count != static_cast<int>(std::strlen(kinds))) return false;
  for (int i = 0; i < count; ++i)
    if (std::strcmp(types[i], kinds[i] == 'f' ? "float32" : "int32") != 0) return false;
  return true;
}

// Whether all are float32.
inline bool all_float(int count, const char **types) {
  return std::all_of(types, types + count, [](const char *type) { return std::strcmp(type, "float32") == 0; });
}

}  // namespace kernels

// Returns 0; or another number for arguments that it does not take, which MindSpore turns into an error.
#define OPERATOR(name) \
  extern "C" int name(int count, void **data, int *axes, int64_t **shapes, const char **types, void *, void *)
