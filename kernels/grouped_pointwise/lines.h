// Lines of pixels between memory and the fp32 scratch that the products read: normalised on the way
// in, counted on the way out.
//
// A scratch line has `pitch` floats per pixel, a multiple of the vector, zero beyond the channels.
#pragma once

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "args.h"
#include "vec.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

typedef std::int64_t i64;
constexpr i64 L = Lanes<float>::n;

FASTKD_INLINE i64 round_up(i64 n, i64 step) { return (n + step - 1) / step * step; }
FASTKD_INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
FASTKD_INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }

// Zeroes vectors that are to stay in registers: `= {}` makes GCC 12 fill them in memory.
template <int N>
FASTKD_INLINE void clear(VF* sums) {
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) sums[i] = VF{};
}

// Memory that is freed at the end of its scope, zeroed unless `zero` is false.
template <class T>
struct Array {
  T* data = nullptr;
  explicit Array(i64 n, bool zero = true) {
    const std::size_t bytes = static_cast<std::size_t>(round_up(n * sizeof(T) + 64, 64));
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data != nullptr && zero) __builtin_memset(data, 0, bytes);
  }
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
};

// The first n lanes from a storage type, zero beyond; n <= L.
template <class S>
FASTKD_INLINE VF load_lanes(const S* p, i64 n) {
  if (n == L) return load_wide(p);
  float x[L] = {};
  for (i64 l = 0; l < n; ++l) x[l] = widen(p[l]);
  return load(x);
}
template <class S>
FASTKD_INLINE void store_lanes(S* p, VF v, i64 n) {
  if (n == L) {
    store_narrow(p, v);
    return;
  }
  for (i64 l = 0; l < n; ++l) narrow(v[l], p + l);
}
// The number as it is after being stored.
template <class S>
FASTKD_INLINE VF rounded(VF v) {
  if constexpr (std::is_same<S, float>::value) {
    return v;
  } else {
    S kept[L];
    store_narrow(kept, v);
    return load_wide(kept);
  }
}

// act(norm(x)) as clamp(x * scale + shift); without a norm scale is 1 and shift 0.
struct Affine {
  Array<float> scale, shift;
  VF low, high;

  Affine(const BlockNorm& norm, i64 channels, i64 pitch)
      : scale(pitch),
        shift(pitch),
        low(splat(norm.act == 0 ? -__builtin_inff() : 0.0f)),
        high(splat(norm.act == 2 ? 6.0f : __builtin_inff())) {
    if (!ok()) return;
    for (i64 c = 0; c < channels; ++c) {
      if (norm.mean == nullptr) {
        scale.data[c] = 1.0f;
        continue;
      }
      const double factor = norm.weight[c] / std::sqrt(norm.var[c] + norm.eps);
      scale.data[c] = static_cast<float>(factor);
      shift.data[c] = static_cast<float>(norm.bias[c] - norm.mean[c] * factor);
    }
  }
  bool ok() const { return scale.data != nullptr && shift.data != nullptr; }
};

// Keeps NaN: the second operand wins.
FASTKD_INLINE VF clamp(VF v, VF low, VF high) { return min(high, max(low, v)); }

// What a line needs next lies as far behind it as the line is long: it is fetched while this one is
// computed. One call for each stretch of `bytes`.
FASTKD_INLINE void fetch_next(const void* at, i64 bytes) {
  const char* const p = static_cast<const char*>(at);
  for (i64 b = 0; b < bytes; b += 64) __builtin_prefetch(p + b);
}

// visit(c, n) for the vectors of a pixel, n of their lanes are channels: a constant
// except for the last one.
template <class Visit>
FASTKD_INLINE void for_vectors(i64 channels, Visit visit) {
  i64 c = 0;
  for (; c + L <= channels; c += L) visit(c, std::integral_constant<i64, L>{});
  if (c < channels) visit(c, channels - c);
}

// Reads pixels normalised; with `added`, of the same shape, act(norm(x) + added).
template <class S>
void read_line(const S* x, i64 pixels, i64 channels, const Affine& f, float* line, i64 pitch,
               const S* added) {
  const VF low = f.low, high = f.high;
  constexpr i64 kStep = 4;  // pixels that share the loads of scale and shift
  const i64 away = pixels * channels;
  for (i64 p = 0; p < pixels; p += kStep) {
    const i64 count = least(kStep, pixels - p);
    const S* const from = x + p * channels;
    float* const to = line + p * pitch;
    fetch_next(from + away, count * channels * static_cast<i64>(sizeof(S)));
    for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
      const VF scale = load(f.scale.data + c), shift = load(f.shift.data + c);
      for (i64 q = 0; q < count; ++q) {
        VF v = fma(load_lanes(from + q * channels + c, n), scale, shift);
        if (added != nullptr) v += load_lanes(added + (p + q) * channels + c, n);
        store(to + q * pitch + c, clamp(v, low, high));
      }
    });
  }
}

// A line of convolution results, rounded as if it had been stored, normalised.
template <class S>
void activate_line(const float* line, i64 pitch, i64 pixels, i64 channels, const float* bias,
                   const Affine& f, float* active) {
  const VF low = f.low, high = f.high;
  for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
    const VF add = bias != nullptr ? load_lanes(bias + c, n) : VF{};
    const VF scale = load(f.scale.data + c), shift = load(f.shift.data + c);
    for (i64 p = 0; p < pixels; ++p) {
      const VF v = rounded<S>(load(line + p * pitch + c) + add);
      store(active + p * pitch + c, clamp(fma(v, scale, shift), low, high));
    }
  });
}

// act(norm(x + bias)) + residual, or act(norm(x + bias) + residual), from S or scratch to S.
template <class In, class S>
void finish_line(const In* x, i64 pitch, i64 pixels, i64 channels, const float* bias,
                 const Affine& f, const S* residual, bool activate_sum, S* y) {
  const VF low = f.low, high = f.high;
  for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
    const VF scale = load(f.scale.data + c), shift = load(f.shift.data + c);
    const VF before = bias != nullptr ? load_lanes(bias + c, n) : VF{};
    for (i64 p = 0; p < pixels; ++p) {
      const VF v = fma(load_lanes(x + p * pitch + c, n) + before, scale, shift);
      S* const out = y + p * channels + c;
      if (residual == nullptr) {
        store_lanes(out, clamp(v, low, high), n);
        continue;
      }
      const VF add = load_lanes(residual + p * channels + c, n);
      store_lanes(out, activate_sum ? clamp(v + add, low, high) : clamp(v, low, high) + add, n);
    }
  });
}

// The gradient at a stage's output, from the gradient behind the norm that follows it:
// k * g + slope * (out - mean) + level. Without such a norm it is g.
struct Incoming {
  Array<float> k, slope, level, mean;
  bool normed;
  bool sloped = false;  // whether `out` matters: not behind a norm with running statistics

  Incoming(const BlockAfter& after, i64 channels, i64 pitch)
      : k(pitch), slope(pitch), level(pitch), mean(pitch), normed(after.out != nullptr) {
    if (!ok() || !normed) return;
    for (i64 c = 0; c < channels; ++c) {
      const double invstd = 1.0 / std::sqrt(after.var[c] + after.eps);
      const double factor = after.weight[c] * invstd;
      k.data[c] = static_cast<float>(factor);
      slope.data[c] = static_cast<float>(-factor * invstd * after.mean_sums[channels + c]);
      level.data[c] = static_cast<float>(-factor * after.mean_sums[c]);
      sloped = sloped || slope.data[c] != 0;
      mean.data[c] = after.mean[c];
    }
  }
  bool ok() const { return k.data && slope.data && level.data && mean.data; }
};

// n lanes of it, from g and out at the same place.
template <class S>
FASTKD_INLINE VF incoming_at(const Incoming& f, const S* g, const S* out, i64 c, i64 n) {
  const VF v = load_lanes(g, n);
  if (!f.normed) return v;
  VF rest = load(f.level.data + c);
  // Not out * 0, which is NaN where `out` is infinite.
  if (f.sloped)
    rest = fma(load(f.slope.data + c), load_lanes(out, n) - load(f.mean.data + c), rest);
  return fma(load(f.k.data + c), v, rest);
}

template <class S>
void read_gradient(const S* g, const S* out, i64 pixels, i64 channels, const Incoming& f,
                   float* line, i64 pitch) {
  const i64 away = pixels * channels, bytes = channels * static_cast<i64>(sizeof(S));
  for (i64 p = 0; p < pixels; ++p) {
    const i64 start = p * channels;
    fetch_next(g + start + away, bytes);
    if (f.sloped) fetch_next(out + start + away, bytes);
    for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
      store(line + p * pitch + c, incoming_at(f, g + start + c, out + start + c, c, n));
    });
  }
}

// The same from storage to storage.
template <class S>
void write_gradient(const S* g, const S* out, i64 pixels, i64 channels, const Incoming& f, S* y) {
  for (i64 p = 0; p < pixels; ++p)
    for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
      const i64 at = p * channels + c;
      store_lanes(y + at, incoming_at(f, g + at, out + at, c, n), n);
    });
}

// Adds a line's pixels to sums[channels].
FASTKD_INLINE void add_pixels(const float* line, i64 pitch, i64 pixels, float* sums) {
  for (i64 c = 0; c < pitch; c += L) {
    VF sum{};
    for (i64 p = 0; p < pixels; ++p) sum += load(line + p * pitch + c);
    store(sums + c, load(sums + c) + sum);
  }
}

FASTKD_INLINE void add_wide(double* sums, VF v) {
  for (i64 l = 0; l < L; ++l) sums[l] += v[l];
}

// Mean and squared deviations of a stretch of the output, per channel. Sums around a pivot close to
// the mean lose no digits; short fp32 sums are added up in fp64.
struct Moments {
  float* pivot;
  double *sum, *squares;
  double count;

  static i64 doubles(i64 pitch) { return 3 * pitch; }
  Moments(double* at, i64 pitch)
      : pivot(reinterpret_cast<float*>(at + 2 * pitch)), sum(at), squares(at + pitch), count(0) {}
};

// Counts a line of one vector of channels: number(p) is pixel p's, as stored.
template <class Number>
FASTKD_INLINE void count_vector(i64 pixels, i64 c, Moments* moments, Number number) {
  const bool first = moments->count == 0;
  const VF pivot = first ? number(0) : load(moments->pivot + c);
  VF sum{}, squares{};
  for (i64 p = 0; p < pixels; ++p) {
    const VF d = number(p) - pivot;
    sum += d;
    squares = fma(d, d, squares);
  }
  if (!first) {
    add_wide(moments->sum + c, sum);
    add_wide(moments->squares + c, squares);
    return;
  }
  // The mean of the first line is the pivot of the others.
  const double num = static_cast<double>(pixels);
  for (i64 l = 0; l < L; ++l) {
    const float moved = pivot[l] + sum[l] / static_cast<float>(pixels);
    const double shift = static_cast<double>(moved) - pivot[l];
    moments->pivot[c + l] = moved;
    moments->sum[c + l] = sum[l] - num * shift;
    moments->squares[c + l] = squares[l] - 2 * shift * sum[l] + num * shift * shift;
  }
}

template <class S>
void count_line(const S* x, i64 pixels, i64 channels, Moments* moments) {
  for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
    count_vector(pixels, c, moments, [&](i64 p) __attribute__((always_inline)) {
      return load_lanes(x + p * channels + c, n);
    });
  });
  moments->count += static_cast<double>(pixels);
}

// Writes a line as S, with `bias` (or nullptr) added; counts what was written, unless nullptr.
template <class S>
void write_line(const float* line, i64 pitch, i64 pixels, i64 channels, const float* bias, S* y,
                Moments* moments) {
  for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
    const VF add = bias != nullptr ? load_lanes(bias + c, n) : VF{};
    if (moments == nullptr) {
      for (i64 p = 0; p < pixels; ++p)
        store_lanes(y + p * channels + c, load(line + p * pitch + c) + add, n);
      return;
    }
    count_vector(pixels, c, moments, [&](i64 p) __attribute__((always_inline)) {
      const VF v = rounded<S>(load(line + p * pitch + c) + add);
      store_lanes(y + p * channels + c, v, n);
      return v;
    });
  });
  if (moments != nullptr) moments->count += static_cast<double>(pixels);
}

// The moments of all chunks, merged in their order (Chan, Golub, LeVeque 1979).
void merge_moments(const double* chunks, const double* counts, i64 num, i64 pitch, i64 channels,
                   float* mean, float* var) {
  for (i64 c = 0; c < channels; ++c) {
    double count = 0, center = 0, squares = 0;
    for (i64 k = 0; k < num; ++k) {
      const Moments part(const_cast<double*>(chunks) + k * Moments::doubles(pitch), pitch);
      const double n = counts[k];
      if (n == 0) continue;
      const double offset = part.sum[c] / n;
      const double own = part.pivot[c] + offset;
      const double gap = own - center;
      squares += part.squares[c] - offset * part.sum[c] + gap * gap * (count * n / (count + n));
      center += gap * (n / (count + n));
      count += n;
    }
    mean[c] = static_cast<float>(center);
    // Rounding must not make it negative; NaN stays.
    const double variance = squares / count;
    var[c] = variance < 0 ? 0.0f : static_cast<float>(variance);
  }
}

// Masks a line of gradients by the activation, whose result `active` holds, writes it as S, and
// adds to `sums` [2, pitch] what was written and its products with xhat = (x - mean) * invstd.
struct Masking {
  Array<float> mean, invstd;
  bool normed;
  VF low, high;
  IF masked;  // all ones where there is an activation

  Masking(const BlockNorm& norm, const Affine& f, i64 channels, i64 pitch)
      : mean(pitch),
        invstd(pitch),
        normed(norm.mean != nullptr),
        low(f.low),
        high(f.high),
        masked(IF{} - static_cast<std::int32_t>(norm.act != 0)) {
    if (!ok() || !normed) return;
    for (i64 c = 0; c < channels; ++c) {
      mean.data[c] = norm.mean[c];
      invstd.data[c] = static_cast<float>(1.0 / std::sqrt(norm.var[c] + norm.eps));
    }
  }
  bool ok() const { return mean.data != nullptr && invstd.data != nullptr; }
};

template <class S>
void write_masked(const float* line, const float* active, const S* x, i64 pitch, i64 pixels,
                  i64 channels, const Masking& f, S* gradient, double* sums) {
  const VF low = f.low, high = f.high;
  const IF masked = f.masked;
  for_vectors(channels, [&](i64 c, auto n) __attribute__((always_inline)) {
    const VF mean = load(f.mean.data + c), invstd = load(f.invstd.data + c);
    VF sum{}, product{};
    for (i64 p = 0; p < pixels; ++p) {
      const VF a = load(active + p * pitch + c);
      const IF off = masked & ((a <= low) | (a >= high));  // NaN passes, as in torch
      const VF v = rounded<S>((VF)(~off & (IF)load(line + p * pitch + c)));
      store_lanes(gradient + p * channels + c, v, n);
      if (!f.normed) continue;
      sum += v;
      product = fma(v, load_lanes(x + p * channels + c, n) - mean, product);
    }
    if (!f.normed) return;
    add_wide(sums + c, sum);
    add_wide(sums + pitch + c, product * invstd);
  });
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
