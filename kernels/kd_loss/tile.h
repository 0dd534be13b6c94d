// The kernel for dense logits and for few classes: a tile of rows at a time, lanes run over rows.
//
// A tile is [C][kTileRows] in scratch. Classes of dense logits lie H*W elements apart, a distance
// that maps many of them to one cache set, so each is copied once and everything else stays on chip.
// Names: see rows.h.
#pragma once

#include "job.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

constexpr std::int64_t kTileRows = 64;
constexpr std::int64_t kClassBlock = 64;  // classes summed before they go to the running total
constexpr std::int64_t kTiles = 4;        // s, y, es, e1

template <class T>
std::int64_t tile_scratch(const KdLossArgs& a) {
  const std::int64_t tiles = kTiles + 2 * a.num_teachers;
  return (tiles * a.classes * kTileRows + a.classes + 16) * static_cast<std::int64_t>(sizeof(T));
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

// Whether load_wide and store_narrow convert between these types.
template <class T, class Stored>
constexpr bool kVectors = sizeof(T) == sizeof(double) ? sizeof(Stored) == sizeof(double)
                                                      : sizeof(Stored) <= sizeof(float);

// Calls f with a number of the type that is stored.
template <class F>
FASTKD_INLINE void with_type(std::int64_t type, F f) {
  if (type == kFloat32) f(float{});
  else if (type == kFloat64) f(double{});
  else if (type == kBFloat16) f(bf16{});
  else f(fp16{});
}

// `count` pixels of every class, whose first ones lie `step` apart.
template <class T, class Stored>
void load_pixels(const Stored* from, std::int64_t step, std::int64_t classes, std::int64_t count,
                 T* tile) {
  for (std::int64_t c = 0; c < classes; ++c, from += step, tile += kTileRows) {
    if constexpr (kVectors<T, Stored>) {
      if (count == kTileRows) {
        for (std::int64_t i = 0; i < kTileRows; i += Lanes<T>::n) store(tile + i, load_wide(from + i));
        // There are more classes than the hardware follows: ask for those of the next tile, in L2.
        const char* next = reinterpret_cast<const char*>(from + kTileRows);
        for (std::size_t line = 0; line < kTileRows * sizeof(Stored); line += 64)
          __builtin_prefetch(next + line, 0, 2);
        continue;
      }
    }
    widen_row(from, tile, count);
  }
}

template <class T, class Stored>
void store_pixels(const T* tile, std::int64_t step, std::int64_t classes, std::int64_t count,
                  Stored* to) {
  for (std::int64_t c = 0; c < classes; ++c, to += step, tile += kTileRows) {
    if constexpr (kVectors<T, Stored>) {
      if (count == kTileRows) {
        for (std::int64_t i = 0; i < kTileRows; i += Lanes<T>::n) store_narrow(to + i, load(tile + i));
        continue;
      }
    }
    narrow_row(tile, to, count);
  }
}

template <class T>
void load_tile(const Job<T>& j, const Place& p, const void* base, std::int64_t type,
               std::int64_t stride, T* row, T* tile) {
  const KdLossArgs& a = j.a;
  const std::int64_t n = a.classes;
  if (a.inner > 1) {
    with_type(type, [&](auto number) {
      const auto* from = static_cast<const decltype(number)*>(base) + p.sample * stride + p.first;
      load_pixels(from, a.inner, n, p.count, tile);
    });
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
    with_type(a.student_type, [&](auto number) {
      auto* to = static_cast<decltype(number)*>(a.grad) + p.sample * n * a.inner + p.first;
      store_pixels(tile, a.inner, n, p.count, to);
    });
    return;
  }
  for (std::int64_t i = 0; i < p.count; ++i) {
    for (std::int64_t c = 0; c < n; ++c) row[c] = tile[c * kTileRows + i];
    deposit(row, a.grad, a.student_type, (p.first + i) * n, n);
  }
}

// Inputs and results of the rows of a tile.
template <class T>
struct Lane {
  std::int64_t label[kTileRows];
  I<T> valid[kTileRows / Lanes<T>::n];
  T weight[kTileRows], kd_factor[kTileRows], ce_factor[kTileRows];
  T kl[kTileRows], ce[kTileRows], agree[kTileRows];
};

// Logits, soft labels and exponentials of a tile, or from a group's first lane on.
template <class T>
struct Tile {
  T *s, *y, *es, *e1, *t[kMaxTeachers], *et[kMaxTeachers];
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

// The softmaxes of a group of lanes: maximum of the student's logits, sums of exponentials.
template <class T>
struct GroupSums {
  V<T> ms, zs{}, zt{}, z1{};
};

// KL of one teacher: the plain difference, without cancellation where that is small.
template <class T>
FASTKD_INLINE V<T> kl_of_lanes(const Tile<T>& x, const GroupSums<T>& z, V<T> mt, V<T> m, V<T> inv_t,
                               I<T> valid, std::int64_t n) {
  const V<T> log_zs = log_of(z.zs);
  const V<T> rs = static_cast<T>(1) / z.zs, rt = static_cast<T>(1) / z.zt;
  const V<T> shift = log_of(z.zt) - log_zs;
  const V<T> kl = m / z.zt * inv_t - shift;
  // Rows that do not count must not send the others down the slow path.
  const I<T> low = (kl < static_cast<T>(kNearEqual)) & valid;
  if (!any(low)) return kl;
  V<T> sum{};
  for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) {
    const V<T> xs = floored<T>(load(x.s + i) - z.ms), xt = floored<T>(load(x.t[0] + i) - mt);
    sum += kl_term<T>(load(x.et[0] + i) * rt, load(x.es + i) * rs, (xt - xs) * inv_t - shift);
  }
  return low ? sum : kl;
}

// KL of the mean of several teachers' probabilities, which ends in x.et[0].
template <class T>
FASTKD_INLINE V<T> mean_kl_of_lanes(const Tile<T>& x, int teachers, const GroupSums<T>& z, V<T> ct,
                                    V<T> inv_t, std::int64_t n) {
  const V<T> log_zs = log_of(z.zs), rs = static_cast<T>(1) / z.zs;
  V<T> r[kMaxTeachers] = {static_cast<T>(1) / (z.zt * static_cast<T>(teachers))};
  for (int k = 1; k < teachers; ++k) {
    const V<T> mt = max_lanes(x.t[k], n);
    r[k] = static_cast<T>(1) / (exp_lanes(x.t[k], mt, ct, n, x.et[k]) * static_cast<T>(teachers));
  }
  V<T> kl{};
  for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) {
    V<T> p = load(x.et[0] + i) * r[0];
    for (int k = 1; k < teachers; ++k) p = fma(load(x.et[k] + i), r[k], p);
    store(x.et[0] + i, p);
    const V<T> q = load(x.es + i) * rs, xs = floored<T>(load(x.s + i) - z.ms);
    kl += mixed_term<T>(p, q, log_of(p) - xs * inv_t + log_zs);
  }
  return kl;
}

// Exponentials, their sums and KL of a group of lanes with at least one teacher.
template <class T, bool CE>
FASTKD_INLINE V<T> softmaxes_and_kl_of_lanes(const Job<T>& j, const Tile<T>& x, I<T> valid,
                                             GroupSums<T>* z) {
  const std::int64_t n = j.a.classes;
  const int teachers = static_cast<int>(j.a.num_teachers);
  const V<T> ct = splat(j.exp2_scale_t), c1 = splat(j.exp2_scale_1);
  const V<T> inv_t = splat(static_cast<T>(1 / j.a.temperature));
  const V<T> mt = max_lanes(x.t[0], n);
  V<T> m{};  // sum of e_t * (x_t - x_s)
  for (std::int64_t b = 0; b < n; b += kClassBlock) {
    V<T> part_s{}, part_t{}, part_1{}, part_m{};
    for (std::int64_t c = b; c < n && c < b + kClassBlock; ++c) {
      const std::int64_t i = c * kTileRows;
      const V<T> xs = floored<T>(load(x.s + i) - z->ms), xt = floored<T>(load(x.t[0] + i) - mt);
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
    z->zs += part_s;
    z->zt += part_t;
    z->z1 += part_1;
    m += part_m;
  }
  return teachers == 1 ? kl_of_lanes(x, *z, mt, m, inv_t, valid, n)
                       : mean_kl_of_lanes(x, teachers, *z, ct, inv_t, n);
}

// Mass of the targets of a group of lanes, and sum of target * x.
template <class T>
struct GroupTarget {
  V<T> mass, dot;
};

template <class T>
FASTKD_INLINE GroupTarget<T> target_of_lanes(const KdLossArgs& a, const Tile<T>& x,
                                             const std::int64_t* label, V<T> ms,
                                             const Smoothing<T>& smooth) {
  const std::int64_t n = a.classes;
  GroupTarget<T> target{splat(static_cast<T>(1)), V<T>{}};
  if (a.label_kind == kHardLabels) {
    for (int l = 0; l < Lanes<T>::n; ++l) target.dot[l] = x.s[label[l] * kTileRows + l];
    target.dot = (target.dot - ms) * smooth.label_share;
  } else {
    V<T> sum{};
    for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) {
      const V<T> y = load(x.y + i);
      sum += y;
      target.dot = fma(y, floored<T>(load(x.s + i) - ms), target.dot);
    }
    target.mass = sum * smooth.label_share + smooth.smoothing;
    target.dot *= smooth.label_share;
  }
  if (smooth.smoothing > 0) {
    V<T> sum{};
    for (std::int64_t i = 0; i < n * kTileRows; i += kTileRows) sum += load(x.s + i) - ms;
    target.dot += sum * smooth.uniform;
  }
  return target;
}

template <class T>
FASTKD_INLINE V<T> classes_agree(const Tile<T>& x, int teachers, std::int64_t n) {
  V<T> top;
  const I<T> best = argmax_lanes(x.s, n, &top);
  const I<T> same = best == argmax_lanes(teachers == 1 ? x.t[0] : x.et[0], n, &top);
  return same ? splat(static_cast<T>(1)) : V<T>{};
}

// The gradient of a group of lanes, in the place of es.
template <class T, bool KD, bool CE>
FASTKD_INLINE void gradient_of_lanes(const KdLossArgs& a, const Tile<T>& x, const Lane<T>& lane,
                                     std::int64_t first, const GroupSums<T>& z, V<T> mass,
                                     const Smoothing<T>& smooth) {
  const I<T> valid = lane.valid[first / Lanes<T>::n];
  const V<T> kd_factor = load(lane.kd_factor + first), ce_factor = load(lane.ce_factor + first);
  GradientFactors<V<T>> f;
  f.student = kd_factor / z.zs;
  f.teacher = a.num_teachers == 1 ? kd_factor / z.zt : kd_factor;
  f.plain = ce_factor * mass / z.z1;
  f.uniform = ce_factor * smooth.uniform;
  f.label = ce_factor * smooth.label_share;
  const bool soft = a.label_kind == kSoftLabels;
  for (std::int64_t i = 0; i < a.classes * kTileRows; i += kTileRows) {
    V<T> g = gradient_of<T, KD, CE>(f, x.es + i, x.et[0] + i, x.e1 + i);
    if (CE && soft) g -= f.label * load(x.y + i);
    store(x.es + i, (V<T>)(valid & (I<T>)g));
  }
  if (CE && !soft)
    for (int l = 0; l < Lanes<T>::n; ++l)
      if (valid[l] != 0) x.es[lane.label[first + l] * kTileRows + l] -= f.label[l];
}

// Loss and gradient of Lanes<T>::n rows; every pointer of `x` is at the group's first lane.
template <class T, bool KD, bool CE>
void lane_group(const Job<T>& j, const Tile<T>& x, Lane<T>& lane, std::int64_t first) {
  const KdLossArgs& a = j.a;
  const std::int64_t n = a.classes;
  const int teachers = static_cast<int>(a.num_teachers);
  GroupSums<T> z;
  z.ms = max_lanes(x.s, n);
  V<T> kl{};
  if (KD) kl = softmaxes_and_kl_of_lanes<T, CE>(j, x, lane.valid[first / Lanes<T>::n], &z);
  else z.z1 = exp_lanes(x.s, z.ms, splat(j.exp2_scale_1), n, x.e1);
  store(lane.kl + first, kl);
  const Smoothing<T> smooth(a);
  V<T> mass = splat(static_cast<T>(1));
  if (CE) {
    const GroupTarget<T> target = target_of_lanes(a, x, lane.label + first, z.ms, smooth);
    mass = target.mass;
    store(lane.ce + first, mass * log_of(z.z1) - target.dot);
  }
  if (a.agree != nullptr && teachers > 0) store(lane.agree + first, classes_agree(x, teachers, n));
  if (j.grad) gradient_of_lanes<T, KD, CE>(a, x, lane, first, z, mass, smooth);
}

template <class T>
void open_lanes(const Job<T>& j, const Place& p, Lane<T>* lane) {
  const KdLossArgs& a = j.a;
  T valid[kTileRows];
  for (std::int64_t i = 0; i < kTileRows; ++i) {
    const std::int64_t r = p.row + i;
    const bool in = i < p.count && counts(a, r);
    valid[i] = in;
    lane->label[i] = in && a.label_kind == kHardLabels ? hard_label(a, r) : 0;
    lane->weight[i] = in ? static_cast<T>(per_row<T>(a.weights, r)) : 0;
    lane->kd_factor[i] = lane->ce_factor[i] = lane->ce[i] = 0;
    if (in && j.grad) {
      lane->kd_factor[i] = static_cast<T>(kd_factor_of(j, r, lane->weight[i]));
      lane->ce_factor[i] = static_cast<T>(ce_factor_of(j, r, lane->weight[i]));
    }
  }
  for (std::int64_t first = 0; first < kTileRows; first += Lanes<T>::n)
    lane->valid[first / Lanes<T>::n] = load(valid + first) != V<T>{};
}

template <class T>
void put_lanes(const KdLossArgs& a, const Place& p, const Lane<T>& lane, double* total) {
  for (std::int64_t i = 0; i < p.count; ++i) {
    const bool in = lane.valid[i / Lanes<T>::n][i % Lanes<T>::n] != 0;
    const double kd = in ? lane.weight[i] * a.temperature * a.temperature * lane.kl[i] : 0;
    const double ce = in ? static_cast<double>(lane.weight[i]) * lane.ce[i] : 0;
    total[0] += kd;
    total[1] += ce;
    put<T>(a.kd, p.row + i, kd);
    put<T>(a.ce, p.row + i, ce);
    put<T>(a.agree, p.row + i, in && a.num_teachers > 0 ? lane.agree[i] : 0);
  }
}

template <class T>
void tile_kernel(const Job<T>& j, std::int64_t unit, T* scratch, double* total) {
  const KdLossArgs& a = j.a;
  const Place p = place_of(j, unit);
  const std::int64_t size = a.classes * kTileRows;
  const int teachers = static_cast<int>(a.num_teachers);
  Tile<T> x{};
  x.s = scratch;
  x.y = scratch + size;
  x.es = scratch + 2 * size;
  x.e1 = scratch + 3 * size;
  x.et[0] = x.es;  // without teachers any address does
  T* const row = scratch + (kTiles + 2 * teachers) * size;
  load_tile(j, p, a.student, a.student_type, a.student_stride, row, x.s);
  for (int k = 0; k < teachers; ++k) {
    x.t[k] = scratch + (kTiles + k) * size;
    x.et[k] = scratch + (kTiles + teachers + k) * size;
    load_tile(j, p, a.teacher[k], a.teacher_type, a.teacher_stride[k], row, x.t[k]);
  }
  if (a.label_kind == kSoftLabels)
    load_tile(j, p, a.labels, sizeof(T) == 4 ? kFloat32 : kFloat64, a.classes * a.inner, row, x.y);

  Lane<T> lane;
  open_lanes(j, p, &lane);
  auto group = j.kd ? (j.ce ? lane_group<T, true, true> : lane_group<T, true, false>)
                    : lane_group<T, false, true>;
  for (std::int64_t first = 0; first < p.count; first += Lanes<T>::n) {
    Tile<T> here = x;
    here.s += first;
    here.y += first;
    here.es += first;
    here.e1 += first;
    for (int k = 0; k < teachers; ++k) {
      here.t[k] += first;
      here.et[k] += first;
    }
    group(j, here, lane, first);
  }
  put_lanes(a, p, lane, total);
  if (j.grad) store_tile(j, p, row, x.es);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
