// The kernel for dense logits and for few classes: a tile of rows at a time, lanes run over rows.
//
// A tile is [C][kTileRows] in scratch. Classes of dense logits lie H*W elements apart, a distance
// that maps many of them to one cache set, so each is copied once and everything else stays on chip.
#pragma once

#include "job.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr std::int64_t kTileRows = 64;
constexpr std::int64_t kClassBlock = 64;  // classes summed before they go to the running total

template <class T>
std::int64_t tile_scratch(const KdLossArgs& a) {
  const std::int64_t arrays = 4 + 2 * a.teachers;
  return (arrays * a.classes * kTileRows + a.classes + 16) * static_cast<std::int64_t>(sizeof(T));
}

// Which rows a tile holds and where they lie in a tensor whose samples are `stride` elements apart.
struct Place {
  std::int64_t sample, first, count, row;
};

template <class T>
Place place_of(const Job<T>& j, std::int64_t unit) {
  const KdLossArgs& a = j.a;
  const std::int64_t per_sample = a.inner > 1 ? a.inner : a.rows;
  const std::int64_t blocks = (per_sample + kTileRows - 1) / kTileRows;
  Place p;
  p.sample = unit / blocks;
  p.first = unit % blocks * kTileRows;
  p.count = per_sample - p.first < kTileRows ? per_sample - p.first : kTileRows;
  p.row = p.sample * per_sample + p.first;
  return p;
}

template <class T>
void load_tile(const Job<T>& j, const Place& p, const void* base, std::int64_t type,
               std::int64_t stride, T* row, T* tile) {
  const KdLossArgs& a = j.a;
  const std::int64_t n = a.classes;
  if (a.inner > 1) {
    for (std::int64_t c = 0; c < n; ++c) {
      T* to = tile + c * kTileRows;
      const T* from = fetch(base, type, p.sample * stride + c * a.inner + p.first, p.count, to);
      if (from != to) std::memcpy(to, from, p.count * sizeof(T));
    }
    return;
  }
  for (std::int64_t i = 0; i < p.count; ++i) {
    const T* from = fetch(base, type, (p.first + i) * stride, n, row);
    for (std::int64_t c = 0; c < n; ++c) tile[c * kTileRows + i] = from[c];
  }
}

template <class T>
void store_tile(const Job<T>& j, const Place& p, T* row, const T* tile) {
  const KdLossArgs& a = j.a;
  const std::int64_t n = a.classes;
  if (a.inner > 1) {
    for (std::int64_t c = 0; c < n; ++c)
      deposit(tile + c * kTileRows, a.grad, a.student_type, (p.sample * n + c) * a.inner + p.first,
              p.count);
    return;
  }
  for (std::int64_t i = 0; i < p.count; ++i) {
    for (std::int64_t c = 0; c < n; ++c) row[c] = tile[c * kTileRows + i];
    deposit(row, a.grad, a.student_type, (p.first + i) * n, n);
  }
}

// What is known of each row of a tile before and after its lanes have run.
template <class T>
struct Lane {
  std::int64_t label[kTileRows];
  I<T> valid[kTileRows / Lanes<T>::n];
  T weight[kTileRows], ga[kTileRows], gb[kTileRows], kl[kTileRows], ce[kTileRows], agree[kTileRows];
};

template <class T>
struct Tile {
  T *s, *y, *es, *e1, *t[4], *et[4];
};

template <class T>
FASTKD_INLINE I<T> argmax_lanes(const T* x, std::int64_t n, V<T>* top) {
  V<T> best = load(x);
  I<T> index{};
  for (std::int64_t c = 1; c < n; ++c) {
    const V<T> v = load(x + c * kTileRows);
    const I<T> higher = v > best;
    const I<T> here = I<T>{} + static_cast<decltype(index[0] + 0)>(c);
    best = higher ? v : best;
    index = higher ? here : index;
  }
  *top = best;
  return index;
}

template <class T>
FASTKD_INLINE V<T> max_lanes(const T* x, std::int64_t n) {
  V<T> m0 = splat(static_cast<T>(-INFINITY)), m1 = m0;
  std::int64_t c = 0;
  for (; c + 2 <= n; c += 2) {
    m0 = max(load(x + c * kTileRows), m0);
    m1 = max(load(x + (c + 1) * kTileRows), m1);
  }
  if (c < n) m0 = max(load(x + c * kTileRows), m0);
  return max(m0, m1);
}

// e = exp(scale * (x - top)), z = its sum, over the classes of one group of lanes.
template <class T>
FASTKD_INLINE V<T> exp_lanes(const T* x, V<T> top, V<T> scale, std::int64_t n, T* e) {
  V<T> z{};
  for (std::int64_t b = 0; b < n; b += kClassBlock) {
    V<T> part{};
    for (std::int64_t c = b; c < n && c < b + kClassBlock; ++c) {
      const V<T> v = exp2_of(floored<T>(load(x + c * kTileRows) - top), scale);
      part += v;
      store(e + c * kTileRows, v);
    }
    z += part;
  }
  return z;
}

// Loss and gradient of Lanes<T>::n rows; every pointer of `x` stands at the group's first lane.
template <class T, bool KD, bool CE>
void lane_group(const Job<T>& j, const Tile<T>& x, Lane<T>& lane, std::int64_t first) {
  const KdLossArgs& a = j.a;
  const std::int64_t n = a.classes;
  constexpr int w = Lanes<T>::n;
  const int teachers = static_cast<int>(a.teachers);
  const V<T> ct = splat(j.exp2_scale_t), c1 = splat(j.exp2_scale_1);
  const V<T> inv_t = splat(static_cast<T>(1 / a.temperature));
  const I<T> valid = lane.valid[first / w];
  const V<T> ms = max_lanes(x.s, n);
  V<T> zs{}, zt{}, z1{}, kl{};

  if (KD) {
    V<T> mt = max_lanes(x.t[0], n), m{};
    for (std::int64_t b = 0; b < n; b += kClassBlock) {
      V<T> part_s{}, part_t{}, part_1{}, part_m{};
      for (std::int64_t c = b; c < n && c < b + kClassBlock; ++c) {
        const std::int64_t i = c * kTileRows;
        const V<T> xs = floored<T>(load(x.s + i) - ms), xt = floored<T>(load(x.t[0] + i) - mt);
        const V<T> e = exp2_of(xs, ct), f = exp2_of(xt, ct);
        part_s += e;
        part_t += f;
        part_m = fma(f, xt - xs, part_m);
        store(x.es + i, e);
        store(x.et[0] + i, f);
        if (CE) {
          const V<T> g = exp2_of(xs, c1);
          part_1 += g;
          store(x.e1 + i, g);
        }
      }
      zs += part_s;
      zt += part_t;
      z1 += part_1;
      m += part_m;
    }
    const V<T> log_zs = log_of(zs);
    V<T> rs = static_cast<T>(1) / zs, r[4] = {static_cast<T>(1) / (zt * static_cast<T>(teachers))};
    if (teachers == 1) {
      const V<T> shift = log_of(zt) - log_zs;
      kl = m / zt * inv_t - shift;
      // Rows that do not count must not send the others down the slow path.
      const I<T> low = (kl < static_cast<T>(kNearEqual)) & valid;
      if (any(low)) {
        V<T> sum{};
        for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) {
          const V<T> xs = floored<T>(load(x.s + i) - ms), xt = floored<T>(load(x.t[0] + i) - mt);
          sum += kl_term<T>(load(x.et[0] + i) * r[0], load(x.es + i) * rs, (xt - xs) * inv_t - shift);
        }
        kl = low ? sum : kl;
      }
    } else {
      for (int k = 1; k < teachers; ++k) {
        mt = max_lanes(x.t[k], n);
        r[k] = static_cast<T>(1) / (exp_lanes(x.t[k], mt, ct, n, x.et[k]) * static_cast<T>(teachers));
      }
      for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) {
        V<T> p = load(x.et[0] + i) * r[0];
        for (int k = 1; k < teachers; ++k) p = fma(load(x.et[k] + i), r[k], p);
        store(x.et[0] + i, p);
        const V<T> q = load(x.es + i) * rs, xs = floored<T>(load(x.s + i) - ms);
        kl += mixed_term<T>(p, q, log_of(p) - xs * inv_t + log_zs);
      }
    }
  } else {
    z1 = exp_lanes(x.s, ms, c1, n, x.e1);
  }
  store(lane.kl + first, kl);

  const T eps = static_cast<T>(a.smoothing);
  V<T> mass = splat(static_cast<T>(1)), dot{};
  if (CE) {
    if (a.label_kind == kHardLabels) {
      for (int l = 0; l < w; ++l) dot[l] = x.s[lane.label[first + l] * kTileRows + l];
      dot = (dot - ms) * (static_cast<T>(1) - eps);
    } else {
      mass = V<T>{};
      for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) {
        const V<T> y = load(x.y + i);
        mass += y;
        dot = fma(y, floored<T>(load(x.s + i) - ms), dot);
      }
      mass = mass * (static_cast<T>(1) - eps) + eps;
      dot *= static_cast<T>(1) - eps;
    }
    if (eps > 0) {
      V<T> sum{};
      for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) sum += load(x.s + i) - ms;
      dot += sum * (eps / static_cast<T>(n));
    }
    store(lane.ce + first, mass * log_of(z1) - dot);
  }

  if (a.agree != nullptr && teachers > 0) {
    V<T> top;
    const I<T> same = argmax_lanes(x.s, n, &top) ==
                      (teachers == 1 ? argmax_lanes(x.t[0], n, &top) : argmax_lanes(x.et[0], n, &top));
    store(lane.agree + first, same ? splat(static_cast<T>(1)) : V<T>{});
  }

  if (!j.grad) return;
  const V<T> ga = load(lane.ga + first), gb = load(lane.gb + first);
  const V<T> as = ga / zs, at = teachers == 1 ? ga / zt : ga;
  const V<T> b1 = gb * mass / z1, flat = gb * (eps / static_cast<T>(n));
  const V<T> soft = gb * (static_cast<T>(1) - eps);
  const bool has_y = a.label_kind == kSoftLabels;
  for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) {
    V<T> g{};
    if (KD) g = load(x.es + i) * as - load(x.et[0] + i) * at;
    if (CE) g = fma(load(x.e1 + i), b1, g) - flat;
    if (CE && has_y) g -= soft * load(x.y + i);
    store(x.es + i, (V<T>)(valid & (I<T>)g));
  }
  if (CE && !has_y)
    for (int l = 0; l < w; ++l)
      if (valid[l] != 0) x.es[lane.label[first + l] * kTileRows + l] -= soft[l];
}

template <class T>
void tile_kernel(const Job<T>& j, std::int64_t unit, T* scratch, double* total) {
  const KdLossArgs& a = j.a;
  const Place p = place_of(j, unit);
  const std::int64_t size = a.classes * kTileRows;
  const int teachers = static_cast<int>(a.teachers);
  Tile<T> x{scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, {}, {}};
  T* row = scratch + (4 + 2 * teachers) * size;
  load_tile(j, p, a.student, a.student_type, a.student_stride, row, x.s);
  for (int k = 0; k < teachers; ++k) {
    x.t[k] = scratch + (4 + k) * size;
    x.et[k] = scratch + (4 + teachers + k) * size;
    load_tile(j, p, a.teacher[k], a.teacher_type, a.teacher_stride[k], row, x.t[k]);
  }
  if (a.label_kind == kSoftLabels)
    load_tile(j, p, a.labels, sizeof(T) == 4 ? kFloat32 : kFloat64, a.classes * a.inner, row, x.y);

  Lane<T> lane;
  T valid[kTileRows];
  for (std::int64_t i = 0; i < kTileRows; ++i) {
    const bool in = i < p.count && counts<T>(a, p.row + i);
    const std::int64_t r = p.row + i;
    valid[i] = in;
    lane.label[i] = in && a.label_kind == kHardLabels ? static_cast<const std::int64_t*>(a.labels)[r] : 0;
    lane.weight[i] = in ? static_cast<T>(per_row<T>(a.weight, r)) : 0;
    lane.ga[i] = lane.gb[i] = lane.ce[i] = 0;
    if (in && j.grad) {
      const double weight = lane.weight[i];
      lane.ga[i] = static_cast<T>(j.kd_scale * weight * a.temperature * per_row<T>(a.upstream_kd, r * a.upstream_kd_step));
      lane.gb[i] = static_cast<T>(j.ce_scale * weight * per_row<T>(a.upstream_ce, r * a.upstream_ce_step));
    }
  }
  constexpr int w = Lanes<T>::n;
  auto group = j.kd ? (j.ce ? lane_group<T, true, true> : lane_group<T, true, false>)
                    : lane_group<T, false, true>;
  for (std::int64_t first = 0; first < p.count; first += w) {
    lane.valid[first / w] = load(valid + first) != V<T>{};
    Tile<T> here = x;
    here.s += first, here.y += first, here.es += first, here.e1 += first;
    for (int k = 0; k < teachers; ++k) here.t[k] += first, here.et[k] += first;
    group(j, here, lane, first);
  }
  for (std::int64_t i = 0; i < p.count; ++i) {
    const bool in = valid[i] != 0;
    const double kd = in ? lane.weight[i] * a.temperature * a.temperature * lane.kl[i] : 0;
    const double ce = in ? static_cast<double>(lane.weight[i]) * lane.ce[i] : 0;
    total[0] += kd;
    total[1] += ce;
    put<T>(a.kd, p.row + i, kd);
    put<T>(a.ce, p.row + i, ce);
    put<T>(a.agree, p.row + i, in && teachers > 0 ? lane.agree[i] : 0);
  }
  if (j.grad) store_tile(j, p, row, x.es);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
