// Attention maps and their gradient for the CPU; the formulas are in README.md.
//
// Three passes: `energy` reads a feature map once and writes one number per pixel; `compare`
// (compare.h) turns the energies of student and teacher into the loss and d loss / d energy;
// `gradient` reads the student's features once more and writes their gradient. Features are walked
// in lines along whichever axis is contiguous, pixels (NCHW) or channels (channels-last); with a
// pooling window a line is averaged on the way. Results do not depend on the number of threads.
//
// S is the storage type, T the working type: double for double, else float.

#include "compare.h"
#include "entry.h"
#include "runtime.h"
#include "storage.h"
#include "vec.h"

namespace fastkd {

// cpu.py has the same fields in the same order. Height and width: of the map, after pooling.
struct AttentionFeatures {
  const void* features;        // S
  const void* coefficients;    // T [samples, height * width]; gradient only
  void* out;                   // energy: T [samples, height * width]; gradient: S, own strides
  std::int64_t samples;
  std::int64_t channels;
  std::int64_t height;
  std::int64_t width;
  std::int64_t window_h;
  std::int64_t window_w;
  std::int64_t stride[4];      // of the features: sample, channel, row, column
  std::int64_t out_stride[4];  // of the gradient
  std::int64_t type;           // Storage
  std::int64_t power;          // 1, 2 or 4
  std::int64_t threads;
  double scale;                // gradient only: factor of the coefficients
};

namespace FASTKD_ISA {
namespace {

constexpr std::int64_t kLine = 1024;   // NCHW: pixels handed to a thread at a time
constexpr std::int64_t kUnit = 16384;  // channels-last: elements handed to a thread at a time
constexpr std::int64_t kStrip = 8;     // channel lines added as a tree
constexpr std::int64_t kStrips = 8;    // trees added up before they go to the total

// |x|^P and its derivative, for numbers and vectors.
template <int P, class X>
FASTKD_INLINE X power(X x) {
  if (P == 1) return x < 0 ? -x : x;
  return P == 2 ? x * x : (x * x) * (x * x);
}
template <int P, class X>
FASTKD_INLINE X slope(X x) {
  // x - x: 0, but NaN stays NaN.
  const X zero = x - x;
  if (P == 1) return x > 0 ? zero + 1 : x < 0 ? zero - 1 : zero;
  return P == 2 ? x + x : 4 * (x * (x * x));
}

// What the two passes over features share. A unit is a stretch of at most `unit` pixels of one row
// of the map (without pooling the whole map is one row).
template <class S, class T>
struct Walk {
  const AttentionFeatures& a;
  std::int64_t line, unit, units_per_row, units;
  std::int64_t next = 0;
  int failed = 0;

  explicit Walk(const AttentionFeatures& args) : a(args) {
    line = by_pixel() ? kLine : a.channels;
    unit = by_pixel() ? kLine : 1 + kUnit / a.channels;
    units_per_row = (a.width + unit - 1) / unit;
    units = a.samples * a.height * units_per_row;
  }
  bool by_pixel() const { return a.stride[3] == 1; }
  bool pooled() const { return a.window_h * a.window_w > 1; }
};

struct Unit {
  std::int64_t sample, row, first, size;  // pixels [first, first + size) of a row of the map
};

template <class S, class T>
bool take(Walk<S, T>& walk, Unit* u) {
  const std::int64_t i = __atomic_fetch_add(&walk.next, 1, __ATOMIC_RELAXED);
  if (i >= walk.units) return false;
  const std::int64_t rows = i / walk.units_per_row;
  u->sample = rows / walk.a.height;
  u->row = rows % walk.a.height;
  u->first = i % walk.units_per_row * walk.unit;
  const std::int64_t left = walk.a.width - u->first;
  u->size = left < walk.unit ? left : walk.unit;
  return true;
}

// n numbers of the map's grid, each the average of its window, from element `at` on.
template <class S, class T>
const T* average(const AttentionFeatures& a, const S* at, std::int64_t n, T* out, T* sums) {
  const T share = static_cast<T>(1) / static_cast<T>(a.window_h * a.window_w);
  if (a.stride[3] == 1) {
    for (std::int64_t i = 0; i < n * a.window_w; ++i) sums[i] = widen(at[i]);
    for (std::int64_t r = 1; r < a.window_h; ++r) {
      const S* row = at + r * a.stride[2];
      for (std::int64_t i = 0; i < n * a.window_w; ++i) sums[i] += widen(row[i]);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      T sum = sums[i * a.window_w];
      for (std::int64_t k = 1; k < a.window_w; ++k) sum += sums[i * a.window_w + k];
      out[i] = sum * share;
    }
    return out;
  }
  for (std::int64_t i = 0; i < n; ++i) out[i] = 0;
  for (std::int64_t r = 0; r < a.window_h; ++r)
    for (std::int64_t k = 0; k < a.window_w; ++k) {
      const S* pixel = at + r * a.stride[2] + k * a.stride[3];
      for (std::int64_t i = 0; i < n; ++i) out[i] += widen(pixel[i]);
    }
  for (std::int64_t i = 0; i < n; ++i) out[i] *= share;
  return out;
}

template <class S>
const S* first_pixel(const AttentionFeatures& a, const Unit& u) {
  return static_cast<const S*>(a.features) + u.sample * a.stride[0] +
         u.row * a.window_h * a.stride[2] + u.first * a.window_w * a.stride[3];
}

// Adds |x|^P of kStrip lines to `sums`, a tree for each pixel.
template <int P, class L, class T>
void add_strip(const L* const* x, T* sums, std::int64_t n) {
  typedef typename Lanes<T>::V V;
  constexpr std::int64_t lanes = Lanes<T>::n;
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    V v[kStrip];
    for (int k = 0; k < kStrip; ++k) v[k] = power<P, V>(load_wide(x[k] + i));
    for (int k = kStrip / 2; k > 0; k /= 2)
      for (int m = 0; m < k; ++m) v[m] += v[m + k];
    store(sums + i, load(sums + i) + v[0]);
  }
  for (; i < n; ++i) {
    T v[kStrip];
    for (int k = 0; k < kStrip; ++k) v[k] = power<P, T>(widen(x[k][i]));
    for (int k = kStrip / 2; k > 0; k /= 2)
      for (int m = 0; m < k; ++m) v[m] += v[m + k];
    sums[i] += v[0];
  }
}

// line(c): n numbers of channel c, as stored (L = S) or averaged (L = T).
template <int P, class L, class T, class Line>
void energy_by_pixel(std::int64_t channels, std::int64_t n, T* scratch, T* out, Line line) {
  T* const part = scratch;
  T* const zeros = part + kLine;
  for (std::int64_t i = 0; i < n; ++i) out[i] = part[i] = zeros[i] = 0;
  for (std::int64_t c = 0; c < channels; c += kStrip) {
    const L* x[kStrip];
    for (std::int64_t k = 0; k < kStrip; ++k)
      x[k] = c + k < channels ? line(c + k) : reinterpret_cast<const L*>(zeros);
    add_strip<P>(x, part, n);
    if ((c / kStrip + 1) % kStrips != 0 && c + kStrip < channels) continue;
    for (std::int64_t i = 0; i < n; ++i) {
      out[i] += part[i];
      part[i] = 0;
    }
  }
  for (std::int64_t i = 0; i < n; ++i) out[i] /= static_cast<T>(channels);
}

// Sums of |x|^P over the channels of n pixels, as vectors that lane_sums finishes.
template <int P, class L, class T, class Line>
void energy_by_channel(std::int64_t channels, std::int64_t n, T* out, Line line) {
  typedef typename Lanes<T>::V V;
  constexpr std::int64_t lanes = Lanes<T>::n;
  for (std::int64_t first = 0; first < n; first += lanes) {
    const std::int64_t count = n - first < lanes ? n - first : lanes;
    V v[lanes] = {};
    T rest[lanes] = {};
    for (std::int64_t i = 0; i < count; ++i) {
      const L* x = line(first + i);
      V sums[4] = {};
      std::int64_t c = 0;
      for (; c + 4 * lanes <= channels; c += 4 * lanes)
        for (int k = 0; k < 4; ++k) sums[k] += power<P, V>(load_wide(x + c + k * lanes));
      for (; c + lanes <= channels; c += lanes) sums[0] += power<P, V>(load_wide(x + c));
      for (; c < channels; ++c) rest[i] += power<P, T>(widen(x[c]));
      v[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    const V total = lane_sums<T>(v) + load(rest);
    for (std::int64_t i = 0; i < count; ++i) out[first + i] = total[i] / static_cast<T>(channels);
  }
}

template <class S, class T>
T* scratch_for(Walk<S, T>& walk) {
  const std::int64_t lines = 2 + kStrip + walk.a.window_w;
  T* memory = static_cast<T*>(fastkd::scratch(sizeof(T) * lines * walk.line));
  if (memory == nullptr) __atomic_store_n(&walk.failed, 1, __ATOMIC_RELAXED);
  return memory;
}

template <int P, class S, class T>
void energy(void* context) {
  Walk<S, T>& walk = *static_cast<Walk<S, T>*>(context);
  const AttentionFeatures& a = walk.a;
  T* const scratch = scratch_for(walk);
  Unit u;
  while (scratch != nullptr && take(walk, &u)) {
    T* const out = static_cast<T*>(a.out) + (u.sample * a.height + u.row) * a.width + u.first;
    const S* const x = first_pixel<S>(a, u);
    T* const lines = scratch + 2 * walk.line;
    T* const sums = lines + kStrip * walk.line;
    if (walk.by_pixel() && !walk.pooled()) {
      energy_by_pixel<P, S>(a.channels, u.size, scratch, out,
                            [&](std::int64_t c) { return x + c * a.stride[1]; });
    } else if (walk.by_pixel()) {
      energy_by_pixel<P, T>(a.channels, u.size, scratch, out, [&](std::int64_t c) {
        return average(a, x + c * a.stride[1], u.size, lines + c % kStrip * kLine, sums);
      });
    } else if (!walk.pooled()) {
      energy_by_channel<P, S>(a.channels, u.size, out,
                              [&](std::int64_t i) { return x + i * a.stride[3]; });
    } else {
      energy_by_channel<P, T>(a.channels, u.size, out, [&](std::int64_t i) {
        return average(a, x + i * a.window_w * a.stride[3], a.channels, lines, sums);
      });
    }
  }
}

// grad = factor * slope(x) along a line; `factor` is an array by pixel, one number by channel.
template <int P, class L, class S, class T>
void slopes_by_pixel(const L* x, const T* factor, S* grad, std::int64_t n) {
  typedef typename Lanes<T>::V V;
  constexpr std::int64_t lanes = Lanes<T>::n;
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    store_narrow(grad + i, load(factor + i) * slope<P, V>(load_wide(x + i)));
  for (; i < n; ++i) narrow(factor[i] * slope<P, T>(widen(x[i])), grad + i);
}
template <int P, class L, class S, class T>
void slopes_by_channel(const L* x, T factor, S* grad, std::int64_t n) {
  typedef typename Lanes<T>::V V;
  constexpr std::int64_t lanes = Lanes<T>::n;
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    store_narrow(grad + i, splat(factor) * slope<P, V>(load_wide(x + i)));
  for (; i < n; ++i) narrow(factor * slope<P, T>(widen(x[i])), grad + i);
}

// Writes a line of gradients to every place of its window.
template <class S, class T>
void spread(const AttentionFeatures& a, const T* grad, S* at, std::int64_t n, T* wide) {
  const bool by_pixel = a.stride[3] == 1;
  if (by_pixel)
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t k = 0; k < a.window_w; ++k) wide[i * a.window_w + k] = grad[i];
  for (std::int64_t r = 0; r < a.window_h; ++r) {
    S* const row = at + r * a.out_stride[2];
    if (by_pixel) narrow_row(wide, row, n * a.window_w);
    else
      for (std::int64_t k = 0; k < a.window_w; ++k) narrow_row(grad, row + k * a.out_stride[3], n);
  }
}

template <int P, class S, class T>
void gradient(void* context) {
  Walk<S, T>& walk = *static_cast<Walk<S, T>*>(context);
  const AttentionFeatures& a = walk.a;
  T* const scratch = scratch_for(walk);
  const T scale = static_cast<T>(a.scale);
  Unit u;
  while (scratch != nullptr && take(walk, &u)) {
    const T* const coefficients =
        static_cast<const T*>(a.coefficients) + (u.sample * a.height + u.row) * a.width + u.first;
    const S* const x = first_pixel<S>(a, u);
    S* const out = static_cast<S*>(a.out) + u.sample * a.out_stride[0] +
                   u.row * a.window_h * a.out_stride[2] + u.first * a.window_w * a.out_stride[3];
    T* const line = scratch;
    T* const factor = line + walk.line;
    T* const sums = factor + walk.line;
    if (walk.by_pixel()) {
      for (std::int64_t i = 0; i < u.size; ++i) factor[i] = coefficients[i] * scale;
      for (std::int64_t c = 0; c < a.channels; ++c) {
        const S* const in = x + c * a.stride[1];
        S* const grad = out + c * a.out_stride[1];
        if (walk.pooled()) {
          slopes_by_pixel<P>(average(a, in, u.size, line, sums), factor, line, u.size);
          spread(a, line, grad, u.size, sums);
        } else {
          slopes_by_pixel<P>(in, factor, grad, u.size);
        }
      }
      continue;
    }
    for (std::int64_t i = 0; i < u.size; ++i) {
      const S* const in = x + i * a.window_w * a.stride[3];
      S* const grad = out + i * a.window_w * a.out_stride[3];
      const T f = coefficients[i] * scale;
      if (walk.pooled()) {
        slopes_by_channel<P>(average(a, in, a.channels, line, sums), f, line, a.channels);
        spread(a, line, grad, a.channels, sums);
      } else {
        slopes_by_channel<P>(in, f, grad, a.channels);
      }
    }
  }
}

// -1: out of memory.
template <class S, class T>
std::int64_t run(const AttentionFeatures& a, bool backward) {
  Walk<S, T> walk(a);
  using Body = void (*)(void*);
  const Body body = a.power == 1   ? (backward ? Body(gradient<1, S, T>) : Body(energy<1, S, T>))
                    : a.power == 2 ? (backward ? Body(gradient<2, S, T>) : Body(energy<2, S, T>))
                                   : (backward ? Body(gradient<4, S, T>) : Body(energy<4, S, T>));
  fastkd::parallel(a.threads < walk.units ? a.threads : walk.units, body, &walk);
  return walk.failed != 0 ? -1 : 0;
}

std::int64_t run(const AttentionFeatures& a, bool backward) {
  if (a.type == kFloat32) return run<float, float>(a, backward);
  if (a.type == kBFloat16) return run<bf16, float>(a, backward);
  if (a.type == kFloat16) return run<fp16, float>(a, backward);
  return run<double, double>(a, backward);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd

FASTKD_ENTRY(attention_energy, fastkd::AttentionFeatures) {
  return fastkd::FASTKD_ISA::run(*a, false);
}
FASTKD_ENTRY(attention_gradient, fastkd::AttentionFeatures) {
  return fastkd::FASTKD_ISA::run(*a, true);
}
FASTKD_ENTRY(attention_compare, fastkd::AttentionMaps) {
  if (a->wide != 0) fastkd::FASTKD_ISA::run_compare<double>(*a);
  else fastkd::FASTKD_ISA::run_compare<float>(*a);
  return 0;
}
