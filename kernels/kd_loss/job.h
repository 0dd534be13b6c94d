// What both kernels of kd_loss share: the job they work on and access to the tensors.
#pragma once

#include "args.h"
#include "softmax.h"

#include <cmath>
#include <cstring>

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// What a kernel needs beside the raw arguments. `kd_scale` and `ce_scale` are final.
template <class T>
struct Job {
  const KdLossArgs& a;
  double kd_scale, ce_scale;
  bool kd, ce, grad;
  T exp2_scale_t;  // log2(e) / T
  T exp2_scale_1;
  std::int64_t units, units_per_chunk, unit_rows;
  double* partial;  // [chunks][2]
  std::int64_t next = 0;
  int failed = 0;
};

template <class T>
void deposit(const T* row, void* base, std::int64_t type, std::int64_t offset, std::int64_t n) {
  if (type == kFloat32) narrow_row(row, static_cast<float*>(base) + offset, n);
  else if (type == kFloat64) narrow_row(row, static_cast<double*>(base) + offset, n);
  else if (type == kBFloat16) narrow_row(row, static_cast<bf16*>(base) + offset, n);
  else narrow_row(row, static_cast<fp16*>(base) + offset, n);
}

std::int64_t element_bytes(std::int64_t type) {
  return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2;
}

template <class T>
bool counts(const KdLossArgs& a, std::int64_t r) {
  if (a.mask != nullptr && a.mask[r] == 0) return false;
  return a.label_kind != kHardLabels ||
         static_cast<const std::int64_t*>(a.labels)[r] != a.ignore_index;
}
template <class T>
double per_row(const void* values, std::int64_t r) {
  return values != nullptr ? static_cast<double>(static_cast<const T*>(values)[r]) : 1.0;
}
template <class T>
void put(void* out, std::int64_t r, double value) {
  if (out != nullptr) static_cast<T*>(out)[r] = static_cast<T>(value);
}

// kl_term where p_t is a mean over teachers: 0 log 0 = 0, and log p_t is no number there.
template <class T>
FASTKD_INLINE V<T> mixed_term(V<T> pt, V<T> ps, V<T> u) {
  const T smallest = sizeof(T) == 4 ? static_cast<T>(0x1p-126f) : static_cast<T>(0x1p-1022);
  const I<T> none = pt < smallest;
  return none ? ps : kl_term<T>(pt, ps, u);
}

template <class Mask>
FASTKD_INLINE bool any(Mask m) {
  std::int64_t bits[kBytes / 8], all = 0;
  __builtin_memcpy(bits, &m, kBytes);
  for (int i = 0; i < kBytes / 8; ++i) all |= bits[i];
  return all != 0;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
