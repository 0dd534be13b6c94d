// Softmax of a row at a temperature, for logits with contiguous classes: maxima, exponentials, sums,
// and the KL divergence of two rows. Lanes run over classes. Shared by kd_loss and hardness.
//
// Names: s student, t teacher, e exponentials, z their sum, x logits minus the row maximum.
#pragma once

#include "storage.h"
#include "vec.h"

#include <cmath>

namespace fastkd {

namespace FASTKD_ISA {
namespace {

// Below this KL (nats, without T^2) the sum is taken again in a form without cancellation.
constexpr double kNearEqual = 0.1;
// Stands for a logit of minus infinity, so that inf - inf cannot make a NaN of a class of weight 0.
constexpr double kFloor = -1e30;
constexpr std::int64_t kChunk = 16384;  // elements handed to a thread at a time
constexpr std::int64_t kBlock = 1024;   // elements summed in the working type before going to double

template <class T>
using V = typename Lanes<T>::V;
template <class T>
using I = typename Lanes<T>::I;

// n elements as T: where they lie if they are stored so, else converted into the buffer.
template <class T>
const T* fetch(const void* base, std::int64_t type, std::int64_t offset, std::int64_t n, T* buffer) {
  if (type == kFloat32) {
    const float* p = static_cast<const float*>(base) + offset;
    if (sizeof(T) == sizeof(float)) return reinterpret_cast<const T*>(p);
    widen_row(p, buffer, n);
  } else if (type == kFloat64) {
    return reinterpret_cast<const T*>(static_cast<const double*>(base) + offset);
  } else if (type == kBFloat16) {
    widen_row(static_cast<const bf16*>(base) + offset, buffer, n);
  } else {
    widen_row(static_cast<const fp16*>(base) + offset, buffer, n);
  }
  return buffer;
}

template <class T>
FASTKD_INLINE V<T> floored(V<T> x) {
  return max(splat(static_cast<T>(kFloor)), x);
}

// One term of KL as sum of p_t * (exp(-u) - 1 + u), u = log(p_t / p_s): every term is >= 0.
template <class T>
FASTKD_INLINE V<T> kl_term(V<T> pt, V<T> ps, V<T> u) {
  const V<T> far = max(ps - pt + pt * u, V<T>{});
  const V<T> near = pt * phi_of(u);
  const I<T> is_near = (u < static_cast<T>(1)) & (u > static_cast<T>(-1));
  return is_near ? near : far;
}

// Calls body(i, count) for whole vectors and once for the rest; `at` loads what exists, then `fill`.
template <class T, class Body>
FASTKD_INLINE void each_vector(std::int64_t begin, std::int64_t end, Body body) {
  constexpr int n = Lanes<T>::n;
  std::int64_t i = begin;
  for (; i + n <= end; i += n) body(i, n);
  if (i < end) body(i, static_cast<int>(end - i));
}
template <class T>
FASTKD_INLINE V<T> at(const T* p, int count, T fill) {
  return count == Lanes<T>::n ? load(p) : load_first(p, count, fill);
}
template <class T>
T row_max(const T* x, std::int64_t n) {
  const T least = static_cast<T>(-INFINITY);
  V<T> m0 = splat(least), m1 = m0;
  constexpr int w = Lanes<T>::n;
  std::int64_t i = 0;
  for (; i + 2 * w <= n; i += 2 * w) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + w), m1);
  }
  each_vector<T>(i, n, [&](std::int64_t j, int count) { m0 = max(at(x + j, count, least), m0); });
  return lane_max<T>(max(m0, m1));
}

struct Sums {
  double zs = 0, zt = 0, z1 = 0, m = 0;  // m: sum of e_t * (x_t - x_s)
};

// The exponentials of one row at both temperatures, kept for the gradient, and their sums.
template <class T, bool CE>
Sums exponentials(const T* s, const T* t, std::int64_t n, T ms, T mt, T scale_t, T scale_1, T* es,
                  T* et, T* e1) {
  Sums sums;
  const V<T> vms = splat(ms), vmt = splat(mt), ct = splat(scale_t), c1 = splat(scale_1);
  const T least = static_cast<T>(-INFINITY);
  for (std::int64_t b = 0; b < n; b += kBlock) {
    V<T> zs{}, zt{}, z1{}, m{};
    each_vector<T>(b, b + kBlock < n ? b + kBlock : n, [&](std::int64_t i, int count) {
      const V<T> xs = floored<T>(at(s + i, count, least) - vms);
      const V<T> xt = floored<T>(at(t + i, count, least) - vmt);
      const V<T> a = exp2_of(xs, ct), c = exp2_of(xt, ct);
      zs += a;
      zt += c;
      m = fma(c, xt - xs, m);
      store(es + i, a);
      store(et + i, c);
      if (CE) {
        const V<T> d = exp2_of(xs, c1);
        z1 += d;
        store(e1 + i, d);
      }
    });
    sums.zs += lane_sum<T>(zs);
    sums.zt += lane_sum<T>(zt);
    sums.m += lane_sum<T>(m);
    if (CE) sums.z1 += lane_sum<T>(z1);
  }
  return sums;
}

// The same for one tensor at one temperature.
template <class T>
double exp_row(const T* x, std::int64_t n, T top, T scale, T* e) {
  const V<T> m = splat(top), c = splat(scale);
  const T least = static_cast<T>(-INFINITY);
  double z = 0;
  for (std::int64_t b = 0; b < n; b += kBlock) {
    V<T> part{};
    each_vector<T>(b, b + kBlock < n ? b + kBlock : n, [&](std::int64_t i, int count) {
      const V<T> v = exp2_of(floored<T>(at(x + i, count, least) - m), c);
      part += v;
      store(e + i, v);
    });
    z += lane_sum<T>(part);
  }
  return z;
}

// KL of one teacher without cancellation, from the exponentials that are still in scratch.
template <class T>
double refined_kl(const T* s, const T* t, std::int64_t n, T ms, T mt, const Sums& z, double inv_t,
                  const T* es, const T* et) {
  const V<T> shift = splat(static_cast<T>(std::log(z.zt / z.zs)));
  const V<T> rs = splat(static_cast<T>(1 / z.zs)), rt = splat(static_cast<T>(1 / z.zt));
  const V<T> inv = splat(static_cast<T>(inv_t)), vms = splat(ms), vmt = splat(mt);
  const T least = static_cast<T>(-INFINITY);
  double kl = 0;
  for (std::int64_t b = 0; b < n; b += kBlock) {
    V<T> sum{};
    each_vector<T>(b, b + kBlock < n ? b + kBlock : n, [&](std::int64_t i, int count) {
      const V<T> xs = floored<T>(at(s + i, count, least) - vms);
      const V<T> xt = floored<T>(at(t + i, count, least) - vmt);
      sum += kl_term<T>(load(et + i) * rt, load(es + i) * rs, (xt - xs) * inv - shift);
    });
    kl += lane_sum<T>(sum);
  }
  return kl;
}

// KL of one teacher, never negative, from what `exponentials` found.
template <class T>
double kl_of_row(const T* s, const T* t, std::int64_t n, T ms, T mt, const Sums& z, double inv_t,
                 const T* es, const T* et) {
  const double kl = z.m / z.zt * inv_t + std::log(z.zs / z.zt);
  return kl < kNearEqual ? refined_kl(s, t, n, ms, mt, z, inv_t, es, et) : kl;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
