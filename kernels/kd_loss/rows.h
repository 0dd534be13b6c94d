// The kernel for contiguous classes: one row at a time, lanes run over classes.
#pragma once

#include "job.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

template <class T>
std::int64_t first_index(const T* x, std::int64_t n, T value) {
  for (std::int64_t i = 0; i < n; ++i)
    if (x[i] == value) return i;
  return -1;
}

// p_bar = mean over teachers of their probabilities, into et[0], and its KL to the student.
template <class T>
double mean_teacher_kl(std::int64_t n, int teachers, const double* zt, double zs, const T* s, T ms,
                       double inv_t, const T* es, T* const* et) {
  V<T> r[4];
  for (int k = 0; k < teachers; ++k) r[k] = splat(static_cast<T>(1 / (zt[k] * teachers)));
  const V<T> rs = splat(static_cast<T>(1 / zs)), log_zs = splat(static_cast<T>(std::log(zs)));
  const V<T> inv = splat(static_cast<T>(inv_t)), vms = splat(ms);
  const T least = static_cast<T>(-INFINITY);
  double kl = 0;
  for (std::int64_t b = 0; b < n; b += kBlock) {
    V<T> sum{};
    each_vector<T>(b, b + kBlock < n ? b + kBlock : n, [&](std::int64_t i, int count) {
      V<T> p = load(et[0] + i) * r[0];
      for (int k = 1; k < teachers; ++k) p = fma(load(et[k] + i), r[k], p);
      store(et[0] + i, p);
      const V<T> q = load(es + i) * rs;
      const V<T> xs = floored<T>(at(s + i, count, least) - vms);
      sum += mixed_term<T>(p, q, log_of(p) - xs * inv + log_zs);
    });
    kl += lane_sum<T>(sum);
  }
  return kl;
}

// grad = a * (p_s - p_t) + b * (sum(y) * p_1 - y); equal products cancel exactly.
template <class T, bool KD, bool CE>
void write_gradient(std::int64_t n, T as, T at_, T b1, T flat, T soft, const T* y, const T* es,
                    const T* et, const T* e1, T* out) {
  const V<T> vas = splat(as), vat = splat(at_), vb1 = splat(b1), vflat = splat(flat),
             vsoft = splat(soft);
  each_vector<T>(0, n, [&](std::int64_t i, int count) {
    V<T> g{};
    if (KD) g = load(es + i) * vas - load(et + i) * vat;
    if (CE) g = fma(load(e1 + i), vb1, g) - vflat;
    if (CE && y != nullptr) g -= vsoft * at(y + i, count, static_cast<T>(0));
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
std::int64_t row_scratch(const KdLossArgs& a) {
  const std::int64_t padded = (a.classes + 15) / 16 * 16 + 16;
  return padded * (4 + 2 * (a.teachers > 0 ? a.teachers : 1)) * static_cast<std::int64_t>(sizeof(T));
}

template <class T>
void row_kernel(const Job<T>& j, std::int64_t r, T* scratch, double* total) {
  const KdLossArgs& a = j.a;
  const std::int64_t n = a.classes;
  const std::int64_t padded = (n + 15) / 16 * 16 + 16;
  const int teachers = static_cast<int>(a.teachers);
  if (!counts<T>(a, r)) {
    put<T>(a.kd, r, 0);
    put<T>(a.ce, r, 0);
    put<T>(a.agree, r, 0);
    const std::int64_t bytes = n * element_bytes(a.student_type);
    if (j.grad) std::memset(static_cast<char*>(a.grad) + r * bytes, 0, bytes);
    return;
  }
  T *es = scratch, *e1 = es + padded, *buffer = e1 + padded, *row_out = buffer + padded;
  T* et[4];
  const T* t[4];
  T mt[4];
  for (int k = 0; k < teachers; ++k) {
    et[k] = row_out + padded * (1 + 2 * k);
    t[k] = fetch(a.teacher[k], a.teacher_type, r * a.teacher_stride[k], n, et[k] + padded);
    mt[k] = row_max(t[k], n);
  }
  const T* s = fetch(a.student, a.student_type, r * a.student_stride, n, buffer);
  const T ms = row_max(s, n);
  const double inv_t = 1 / a.temperature;
  const double weight = per_row<T>(a.weight, r);

  Sums z;
  double kl = 0, zt = 1;
  if (j.kd) {
    auto first = j.ce ? exponentials<T, true> : exponentials<T, false>;
    z = first(s, t[0], n, ms, mt[0], j.exp2_scale_t, j.exp2_scale_1, es, et[0], e1);
    if (teachers == 1) {
      zt = z.zt;
      kl = kl_of_row(s, t[0], n, ms, mt[0], z, inv_t, es, et[0]);
    } else {
      double zts[4] = {z.zt};
      for (int k = 1; k < teachers; ++k) zts[k] = exp_row(t[k], n, mt[k], j.exp2_scale_t, et[k]);
      kl = mean_teacher_kl(n, teachers, zts, z.zs, s, ms, inv_t, es, et);
    }
  } else {
    z.z1 = exp_row(s, n, ms, j.exp2_scale_1, e1);
  }
  const double kd = a.temperature * a.temperature * kl;

  const double eps = a.smoothing;
  double ce = 0, mass = 1;
  const T* y = nullptr;
  std::int64_t label = -1;
  if (j.ce) {
    const double log_z = std::log(z.z1);
    double dot = 0;  // sum of y' * x, y' the smoothed target
    if (a.label_kind == kHardLabels) {
      label = static_cast<const std::int64_t*>(a.labels)[r];
      dot = (1 - eps) * (static_cast<double>(s[label]) - ms);
    } else {
      y = static_cast<const T*>(a.labels) + r * n;
      mass = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        mass += y[i];
        if (y[i] != 0) dot += static_cast<double>(y[i]) * (static_cast<double>(s[i]) - ms);
      }
      mass = (1 - eps) * mass + eps;
      dot *= 1 - eps;
    }
    if (eps > 0) {
      double sum = 0;
      for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(s[i]) - ms;
      dot += eps / n * sum;
    }
    ce = mass * log_z - dot;
  }
  put<T>(a.kd, r, weight * kd);
  put<T>(a.ce, r, weight * ce);
  total[0] += weight * kd;
  total[1] += weight * ce;
  if (a.agree != nullptr) {
    bool same = teachers > 0;
    if (teachers > 0) {
      const T* p = teachers == 1 ? t[0] : et[0];
      same = first_index(s, n, ms) == first_index(p, n, teachers == 1 ? mt[0] : row_max(p, n));
    }
    put<T>(a.agree, r, same);
  }
  if (!j.grad) return;

  const double ga = j.kd_scale * weight * a.temperature * per_row<T>(a.upstream_kd, r * a.upstream_kd_step);
  const double gb = j.ce_scale * weight * per_row<T>(a.upstream_ce, r * a.upstream_ce_step);
  const bool direct = element_bytes(a.student_type) == static_cast<std::int64_t>(sizeof(T));
  T* out = direct ? static_cast<T*>(a.grad) + r * n : row_out;
  const T as = static_cast<T>(ga / z.zs), at_ = static_cast<T>(teachers > 1 ? ga : ga / zt);
  const T b1 = static_cast<T>(gb * mass / z.z1), flat = static_cast<T>(gb * eps / n);
  const T soft = static_cast<T>(gb * (1 - eps));
  auto write = j.kd ? (j.ce ? write_gradient<T, true, true> : write_gradient<T, true, false>)
                    : write_gradient<T, false, true>;
  write(n, as, at_, b1, flat, soft, y, es, j.kd ? et[0] : es, e1, out);
  if (label >= 0) out[label] -= soft;
  if (!direct) deposit(out, a.grad, a.student_type, r * n, n);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
