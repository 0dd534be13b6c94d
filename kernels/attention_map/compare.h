// From the energies of student and teacher to the loss and its derivative at the student's energies.
// Reads two numbers per pixel and writes one, which is little next to the features.
#pragma once

#include "runtime.h"
#include "vec.h"

#include <cmath>

namespace fastkd {

// cpu.py has the same fields in the same order. T is double if `wide`, else float.
struct AttentionMaps {
  const void* student;  // T [samples, pixels]: energies
  const void* teacher;
  void* coefficients;   // T [samples, pixels]: d loss / d student energy
  double* rows;         // [samples]: each sample's share of the loss
  void* loss;           // T
  std::int64_t samples;
  std::int64_t pixels;
  std::int64_t wide;      // 1: T is double
  std::int64_t distance;  // 1: mean over samples of the L2 distance, 0: mean of squares
  std::int64_t threads;
  double eps;
};

namespace FASTKD_ISA {
namespace {

FASTKD_INLINE VD doubles(const double* p) { return load(p); }
FASTKD_INLINE VD doubles(const float* p) {
  typedef float Half __attribute__((vector_size(kBytes / 2)));
  Half half;
  __builtin_memcpy(&half, p, kBytes / 2);
  return __builtin_convertvector(half, VD);
}

template <class T>
struct Comparison {
  const AttentionMaps& a;
  std::int64_t next = 0;
};

// Calls body(student, teacher) with the energies of the pixels, as vectors and then one by one, and
// returns the sum of its first results, having added up the second ones in `other`.
template <class T, class Body>
FASTKD_INLINE double both_sums(const T* s, const T* t, std::int64_t n, double* other, Body body) {
  constexpr std::int64_t lanes = Lanes<double>::n;
  VD sums[2] = {}, step[2];
  double single[2], rest[2] = {};
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    body(doubles(s + i), doubles(t + i), step);
    sums[0] += step[0];
    sums[1] += step[1];
  }
  for (; i < n; ++i) {
    body(static_cast<double>(s[i]), static_cast<double>(t[i]), single);
    rest[0] += single[0];
    rest[1] += single[1];
  }
  *other = lane_sum<double>(sums[1]) + rest[1];
  return lane_sum<double>(sums[0]) + rest[0];
}

// In double: it costs as much as one channel, and it decides the error of the loss.
template <class T>
void compare(void* context) {
  Comparison<T>& job = *static_cast<Comparison<T>*>(context);
  const AttentionMaps& a = job.a;
  for (;;) {
    const std::int64_t n = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (n >= a.samples) return;
    const T* s = static_cast<const T*>(a.student) + n * a.pixels;
    const T* t = static_cast<const T*>(a.teacher) + n * a.pixels;
    T* out = static_cast<T*>(a.coefficients) + n * a.pixels;
    double norm_s, norm_t, along;
    norm_s = both_sums(s, t, a.pixels, &norm_t, [](auto x, auto y, auto* v) {
      v[0] = x * x;
      v[1] = y * y;
    });
    norm_s = std::sqrt(norm_s);
    norm_t = std::sqrt(norm_t);
    const double by_s = 1 / (norm_s < a.eps ? a.eps : norm_s);
    const double by_t = 1 / (norm_t < a.eps ? a.eps : norm_t);
    const double square = both_sums(s, t, a.pixels, &along, [=](auto x, auto y, auto* v) {
      const auto map = x * by_s, gap = map - y * by_t;
      v[0] = gap * gap;
      v[1] = map * gap;
    });
    // Below eps the divisor is a constant, and the map's length is free to change.
    if (norm_s < a.eps) along = 0;
    const double root = std::sqrt(square);
    const double per_sample = 1.0 / static_cast<double>(a.samples);
    const double per_entry = per_sample / static_cast<double>(a.pixels);
    a.rows[n] = a.distance != 0 ? root * per_sample : square * per_entry;
    // Equal maps: the norm has no derivative there and takes 0. NaN passes.
    const double outer = a.distance == 0 ? 2 * per_entry : square == 0 ? 0 : per_sample / root;
    const double factor = outer * by_s;
    for (std::int64_t i = 0; i < a.pixels; ++i) {
      const double map = s[i] * by_s, gap = map - t[i] * by_t;
      out[i] = static_cast<T>(factor * (gap - along * map));
    }
  }
}

template <class T>
void run_compare(const AttentionMaps& a) {
  Comparison<T> job{a};
  fastkd::parallel(a.threads < a.samples ? a.threads : a.samples, compare<T>, &job);
  double loss = 0;
  for (std::int64_t n = 0; n < a.samples; ++n) loss += a.rows[n];
  *static_cast<T*>(a.loss) = static_cast<T>(loss);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
