// What both kernels of kd_loss share: their job, access to the tensors, and the algebra of targets
// and gradients, in the names of README.md ("Names").
#pragma once

#include "args.h"
#include "softmax.h"

#include <cmath>
#include <cstring>

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// What a kernel needs in addition to the raw arguments.
template <class T>
struct Job {
  const KdLossArgs& a;
  // Which parts are wanted.
  const bool kd, ce, grad;
  // Final: divided by the rows that count where the loss is their mean.
  const double kd_scale, ce_scale;
  // exp(x / temperature) and exp(x) as powers of 2.
  const T exp2_scale_t, exp2_scale_1;
  // A unit is what a kernel works on at a time: `unit_rows` rows. Threads take chunks of units.
  std::int64_t units, unit_rows, units_per_chunk;
  double* partial;  // [chunks][2]: sums of kd and ce
  std::int64_t next;
  int failed;

  Job(const KdLossArgs& args, double divisor)
      : a(args),
        kd(args.num_teachers > 0),
        ce(args.label_kind != kNoLabels),
        grad(args.grad != nullptr),
        kd_scale(args.kd_scale / divisor),
        ce_scale(args.ce_scale / divisor),
        exp2_scale_t(static_cast<T>(kLog2E / args.temperature)),
        exp2_scale_1(static_cast<T>(kLog2E)),
        units(args.rows),
        unit_rows(1),
        units_per_chunk(1),
        partial(nullptr),
        next(0),
        failed(0) {}
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

std::int64_t hard_label(const KdLossArgs& a, std::int64_t r) {
  return static_cast<const std::int64_t*>(a.labels)[r];
}

bool counts(const KdLossArgs& a, std::int64_t r) {
  if (a.mask != nullptr && a.mask[r] == 0) return false;
  return a.label_kind != kHardLabels || hard_label(a, r) != a.ignore_index;
}
template <class T>
double per_row(const void* values, std::int64_t r) {
  return values != nullptr ? static_cast<double>(static_cast<const T*>(values)[r]) : 1.0;
}
template <class T>
void put(void* out, std::int64_t r, double value) {
  if (out != nullptr) static_cast<T*>(out)[r] = static_cast<T>(value);
}

// How smoothing shapes the target: target = label_share * y + uniform.
template <class X>
struct Smoothing {
  X smoothing, label_share, uniform;

  explicit Smoothing(const KdLossArgs& a)
      : smoothing(static_cast<X>(a.label_smoothing)),
        label_share(static_cast<X>(1) - smoothing),
        uniform(smoothing / static_cast<X>(a.classes)) {}
};

// The factors of the two halves of a row's gradient.
template <class T>
double kd_factor_of(const Job<T>& j, std::int64_t r, double weight) {
  const KdLossArgs& a = j.a;
  return j.kd_scale * weight * a.temperature * per_row<T>(a.upstream_kd, r * a.upstream_kd_step);
}
template <class T>
double ce_factor_of(const Job<T>& j, std::int64_t r, double weight) {
  return j.ce_scale * weight * per_row<T>(j.a.upstream_ce, r * j.a.upstream_ce_step);
}

// Factors of the exponentials and labels of a row in its gradient.
template <class X>
struct GradientFactors {
  X student;  // of e_s: kd_factor / z_s
  X teacher;  // of e_t: kd_factor / z_t
  X plain;    // of e_1: ce_factor * mass / z_1
  X uniform;  // ce_factor * uniform
  X label;    // of y: ce_factor * label_share
};

// kd_factor * (p_s - p_t) + ce_factor * (mass * p_1 - target) of some classes, except for hard labels;
// equal products cancel exactly.
template <class T, bool KD, bool CE>
FASTKD_INLINE V<T> gradient_of(const GradientFactors<V<T>>& f, const T* es, const T* et, const T* e1) {
  V<T> g{};
  if (KD) g = load(es) * f.student - load(et) * f.teacher;
  if (CE) g = fma(load(e1), f.plain, g) - f.uniform;
  return g;
}

// kl_term where p_t is a mean over teachers: 0 log 0 = 0, and log p_t is not finite there.
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
