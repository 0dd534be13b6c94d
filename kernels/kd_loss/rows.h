// The kernel for contiguous classes: one row at a time, lanes run over classes.
//
// Names: see softmax.h and README.md. es, et, e1: exponentials of the student, of a teacher, and of
// the student at temperature 1; zs, zt, z1: their sums; ms, mt: the maxima of the logits.
#pragma once

#include "job.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// A row in the working type: logits where they lie or widened in scratch, and scratch for the rest.
template <class T>
struct Row {
  std::int64_t classes;
  int teachers;
  const T* s;
  const T* t[kMaxTeachers];
  T ms, mt[kMaxTeachers];
  T *es, *e1, *et[kMaxTeachers];  // with several teachers et[0] ends as the mean of probabilities
  T* grad;
};

constexpr std::int64_t kRowArrays = 4;  // es, e1, widened student, gradient

// Elements between the arrays of a row in scratch: vectors may reach beyond the last class.
std::int64_t padded(std::int64_t classes) { return (classes + 15) / 16 * 16 + 16; }

template <class T>
std::int64_t row_scratch(const KdLossArgs& a) {
  const std::int64_t arrays = kRowArrays + 2 * (a.num_teachers > 0 ? a.num_teachers : 1);
  return padded(a.classes) * arrays * static_cast<std::int64_t>(sizeof(T));
}

template <class T>
FASTKD_INLINE Row<T> open_row(const KdLossArgs& a, std::int64_t r, T* scratch) {
  const std::int64_t step = padded(a.classes);
  Row<T> row;
  row.classes = a.classes;
  row.teachers = static_cast<int>(a.num_teachers);
  row.es = scratch;
  row.e1 = scratch + step;
  T* const widened = scratch + 2 * step;
  row.grad = scratch + 3 * step;
  row.et[0] = row.es;  // without teachers any address does
  for (int k = 0; k < row.teachers; ++k) {
    T* const own = scratch + step * (kRowArrays + 2 * k);
    row.et[k] = own;
    row.t[k] = fetch(a.teacher[k], a.teacher_type, r * a.teacher_stride[k], a.classes, own + step);
    row.mt[k] = row_max(row.t[k], a.classes);
  }
  row.s = fetch(a.student, a.student_type, r * a.student_stride, a.classes, widened);
  row.ms = row_max(row.s, a.classes);
  return row;
}

template <class T>
std::int64_t first_index(const T* x, std::int64_t n, T value) {
  for (std::int64_t i = 0; i < n; ++i)
    if (x[i] == value) return i;
  return -1;
}

// p_bar = mean over teachers of their probabilities, into et[0], and its KL to the student.
template <class T>
double mean_teacher_kl(const Row<T>& row, const double* zt, double zs, double inv_t) {
  V<T> r[kMaxTeachers];
  for (int k = 0; k < row.teachers; ++k) r[k] = splat(static_cast<T>(1 / (zt[k] * row.teachers)));
  const V<T> rs = splat(static_cast<T>(1 / zs)), log_zs = splat(static_cast<T>(std::log(zs)));
  const V<T> inv = splat(static_cast<T>(inv_t)), vms = splat(row.ms);
  const T least = static_cast<T>(-INFINITY);
  const std::int64_t n = row.classes;
  double kl = 0;
  for (std::int64_t b = 0; b < n; b += kBlock) {
    V<T> sum{};
    each_vector<T>(b, b + kBlock < n ? b + kBlock : n, [&](std::int64_t i, int count) {
      V<T> p = load(row.et[0] + i) * r[0];
      for (int k = 1; k < row.teachers; ++k) p = fma(load(row.et[k] + i), r[k], p);
      store(row.et[0] + i, p);
      const V<T> q = load(row.es + i) * rs;
      const V<T> xs = floored<T>(at(row.s + i, count, least) - vms);
      sum += mixed_term<T>(p, q, log_of(p) - xs * inv + log_zs);
    });
    kl += lane_sum<T>(sum);
  }
  return kl;
}

// Exponentials and their sums; where there is a teacher also KL(teacher || student). zt of several
// teachers is 1, since et[0] holds probabilities then.
template <class T>
FASTKD_INLINE double softmaxes_and_kl(const Job<T>& j, const Row<T>& row, Sums* z) {
  const std::int64_t n = row.classes;
  if (!j.kd) {
    z->z1 = exp_row(row.s, n, row.ms, j.exp2_scale_1, row.e1);
    return 0;
  }
  const double inv_t = 1 / j.a.temperature;
  auto first = j.ce ? exponentials<T, true> : exponentials<T, false>;
  *z = first(row.s, row.t[0], n, row.ms, row.mt[0], j.exp2_scale_t, j.exp2_scale_1, row.es,
             row.et[0], row.e1);
  if (row.teachers == 1)
    return kl_of_row(row.s, row.t[0], n, row.ms, row.mt[0], *z, inv_t, row.es, row.et[0]);
  double zt[kMaxTeachers] = {z->zt};
  for (int k = 1; k < row.teachers; ++k)
    zt[k] = exp_row(row.t[k], n, row.mt[k], j.exp2_scale_t, row.et[k]);
  z->zt = 1;
  return mean_teacher_kl(row, zt, z->zs, inv_t);
}

// A row's target.
template <class T>
struct Target {
  const T* y = nullptr;     // soft labels
  std::int64_t label = -1;  // hard label
  double mass = 1;          // sum of the target
  double dot = 0;           // sum of target * x
};

template <class T>
FASTKD_INLINE Target<T> target_of(const KdLossArgs& a, const Row<T>& row, std::int64_t r,
                                  const Smoothing<double>& smooth) {
  const std::int64_t n = row.classes;
  Target<T> target;
  if (a.label_kind == kHardLabels) {
    target.label = hard_label(a, r);
    target.dot = smooth.label_share * (static_cast<double>(row.s[target.label]) - row.ms);
  } else {
    const T* y = target.y = static_cast<const T*>(a.labels) + r * n;
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      sum += y[i];
      if (y[i] != 0)
        target.dot += static_cast<double>(y[i]) * (static_cast<double>(row.s[i]) - row.ms);
    }
    target.mass = smooth.label_share * sum + smooth.smoothing;
    target.dot *= smooth.label_share;
  }
  if (smooth.smoothing > 0) {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(row.s[i]) - row.ms;
    target.dot += smooth.uniform * sum;
  }
  return target;
}

template <class T>
FASTKD_INLINE bool classes_agree(const Row<T>& row) {
  const std::int64_t n = row.classes;
  if (row.teachers == 0) return false;
  const T* p = row.teachers == 1 ? row.t[0] : row.et[0];
  const T top = row.teachers == 1 ? row.mt[0] : row_max(p, n);
  return first_index(row.s, n, row.ms) == first_index(p, n, top);
}

template <class T, bool KD, bool CE>
void write_gradient(const Row<T>& row, const GradientFactors<T>& factors, const T* y, T* out) {
  const GradientFactors<V<T>> f{splat(factors.student), splat(factors.teacher),
                                splat(factors.plain), splat(factors.uniform), splat(factors.label)};
  each_vector<T>(0, row.classes, [&](std::int64_t i, int count) {
    V<T> g = gradient_of<T, KD, CE>(f, row.es + i, row.et[0] + i, row.e1 + i);
    if (CE && y != nullptr) g -= f.label * at(y + i, count, static_cast<T>(0));
    if (count == Lanes<T>::n) {
      store(out + i, g);
    } else {
      T x[Lanes<T>::n];
      store(x, g);
      for (int l = 0; l < count; ++l) out[i + l] = x[l];
    }
  });
}

template <class T>
FASTKD_INLINE void gradient_row(const Job<T>& j, const Row<T>& row, std::int64_t r, double weight,
                                const Sums& z, const Smoothing<double>& smooth,
                                const Target<T>& target) {
  const KdLossArgs& a = j.a;
  const std::int64_t n = row.classes;
  const double kd_factor = kd_factor_of(j, r, weight), ce_factor = ce_factor_of(j, r, weight);
  GradientFactors<T> factors;
  factors.student = static_cast<T>(kd_factor / z.zs);
  factors.teacher = static_cast<T>(kd_factor / z.zt);
  factors.plain = static_cast<T>(ce_factor * target.mass / z.z1);
  factors.uniform = static_cast<T>(ce_factor * smooth.smoothing / n);
  factors.label = static_cast<T>(ce_factor * smooth.label_share);
  const bool direct = element_bytes(a.student_type) == static_cast<std::int64_t>(sizeof(T));
  T* const out = direct ? static_cast<T*>(a.grad) + r * n : row.grad;
  auto write = j.kd ? (j.ce ? write_gradient<T, true, true> : write_gradient<T, true, false>)
                    : write_gradient<T, false, true>;
  write(row, factors, target.y, out);
  if (target.label >= 0) out[target.label] -= factors.label;
  if (!direct) deposit(out, a.grad, a.student_type, r * n, n);
}

template <class T>
void skip_row(const Job<T>& j, std::int64_t r) {
  const KdLossArgs& a = j.a;
  put<T>(a.kd, r, 0);
  put<T>(a.ce, r, 0);
  put<T>(a.agree, r, 0);
  const std::int64_t bytes = a.classes * element_bytes(a.student_type);
  if (j.grad) std::memset(static_cast<char*>(a.grad) + r * bytes, 0, bytes);
}

template <class T>
void row_kernel(const Job<T>& j, std::int64_t r, T* scratch, double* total) {
  const KdLossArgs& a = j.a;
  if (!counts(a, r)) {
    skip_row(j, r);
    return;
  }
  const Row<T> row = open_row(a, r, scratch);
  const double weight = per_row<T>(a.weights, r);
  Sums z;
  const double kl = softmaxes_and_kl(j, row, &z);
  const double kd = a.temperature * a.temperature * kl;
  const Smoothing<double> smooth(a);
  Target<T> target;
  double ce = 0;
  if (j.ce) {
    target = target_of(a, row, r, smooth);
    ce = target.mass * std::log(z.z1) - target.dot;
  }
  put<T>(a.kd, r, weight * kd);
  put<T>(a.ce, r, weight * ce);
  if (a.agree != nullptr) put<T>(a.agree, r, classes_agree(row));
  total[0] += weight * kd;
  total[1] += weight * ce;
  if (j.grad) gradient_row(j, row, r, weight, z, smooth, target);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
