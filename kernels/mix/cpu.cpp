// CutMix, mixup, cutout and normalisation of image batches for the CPU; the formula is in README.md.
//
// A piece of an image goes through scratch that stays in the first-level cache: gather (where a box
// is pasted or the layouts differ), widen and normalise, blend or clear inside the box, narrow. Where
// elements stay as they are, it is copied or blended instead. No result depends on how the work is
// shared out.

#include "entry.h"
#include "runtime.h"
#include "storage.h"
#include "vec.h"

#include <cstring>

namespace fastkd {

enum Fill : std::int64_t { kNothing, kZero, kPartner, kBlend };

// cpu.py has the same fields in the same order.
struct MixArgs {
  const char* images;
  const char* partners;       // partner images, or the images themselves where there is an index
  const std::int64_t* index;  // [N] or null
  const std::int64_t* boxes;  // y0 y1 x0 x1, or null: the whole image
  const float* lam;           // share of the image itself, for kBlend
  const float* mean;          // [C], or null: no normalisation
  const float* std;
  char* out;
  std::int64_t num;
  std::int64_t channels;
  std::int64_t height;
  std::int64_t width;
  std::int64_t source;  // Storage
  std::int64_t target;
  std::int64_t source_channels_last;
  std::int64_t target_channels_last;
  std::int64_t fill;
  std::int64_t box_step;  // from one image to the next; 0: one for the batch
  std::int64_t lam_step;
  std::int64_t threads;
};

namespace FASTKD_ISA {
namespace {

constexpr std::int64_t kPiece = 1024;      // elements that go through scratch together
constexpr std::int64_t kUnit = 32 * 1024;  // elements that a thread takes at once, about

std::int64_t bytes_of(std::int64_t storage) {
  return storage == kUInt8 ? 1 : storage == kFloat32 ? 4 : 2;
}

std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

struct Job {
  const MixArgs& a;
  std::int64_t pixels;     // of an image
  std::int64_t per_pixel;  // neighbouring elements of the target that are one pixel
  std::int64_t block;      // pixels of a unit
  std::int64_t blocks;     // units of an image
  std::int64_t units_per_claim;
  std::int64_t piece;      // pixels of a piece
  bool as_it_is;           // outside the box the result has the images' elements
  std::int64_t next;
  std::int64_t failed;

  explicit Job(const MixArgs& args);
};

Job::Job(const MixArgs& args)
    : a(args),
      pixels(a.height * a.width),
      per_pixel(a.target_channels_last != 0 ? a.channels : 1),
      block(a.channels < kUnit ? kUnit / a.channels : 1),
      blocks((pixels + block - 1) / block),
      piece(per_pixel < kPiece ? kPiece / per_pixel : 1),
      as_it_is(a.source == a.target && a.mean == nullptr &&
               a.source_channels_last == a.target_channels_last),
      next(0),
      failed(0) {
  // Of a large batch each thread takes long stretches: the pages of a fresh result are faulted in
  // by one thread each. Small images are taken several at a time.
  const std::int64_t share = a.num * blocks / (4 * (a.threads > 0 ? a.threads : 1));
  const std::int64_t together = pixels < block ? block / pixels : 1;
  units_per_claim = share > together ? share : together;
}

// A thread's scratch, a piece each; mean and std are repeated over it, for alternating channels.
struct Scratch {
  float* first;
  float* second;
  float* mean;
  float* std;
  char* gathered;
};

// One plane (or, channels-last, all of them) of one image, its partner and its result, with the box
// as `runs` runs of `length` pixels, the first at pixel `start`, one image row apart.
struct Pair {
  const char* own;
  const char* other;
  char* out;
  std::int64_t plane;
  std::int64_t runs, start, length;
  float lam;
};

// f(low, high) for the parts of the box's runs that lie within pixels [from, to).
template <class F>
FASTKD_INLINE void for_runs(const Pair& p, std::int64_t width, std::int64_t from, std::int64_t to, F f) {
  const std::int64_t behind = from - p.start - p.length;
  for (std::int64_t r = behind < 0 ? 0 : behind / width + 1; r < p.runs; ++r) {
    const std::int64_t low = p.start + r * width, high = low + p.length;
    if (low >= to) return;
    f(low < from ? from : low, high < to ? high : to);
  }
}

FASTKD_INLINE float widen(std::uint8_t x) { return x; }

template <class Src>
FASTKD_INLINE void widen_piece(const char* in, float* out, std::int64_t n, float scale,
                               const float* mean, const float* std, bool alternate) {
  const Src* x = reinterpret_cast<const Src*>(in);
  if (mean == nullptr) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) * scale;
  } else if (alternate) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = (widen(x[i]) * scale - mean[i]) / std[i];
  } else {
    const float m = *mean, s = *std;
    for (std::int64_t i = 0; i < n; ++i) out[i] = (widen(x[i]) * scale - m) / s;
  }
}

// `count` elements of the source as normalised fp32.
void normalize(const Job& j, const Scratch& s, const Pair& p, const char* in, float* out,
               std::int64_t count) {
  const MixArgs& a = j.a;
  const bool alternate = a.target_channels_last != 0;
  const float* mean = a.mean == nullptr ? nullptr : alternate ? s.mean : a.mean + p.plane;
  const float* std = a.mean == nullptr ? nullptr : alternate ? s.std : a.std + p.plane;
  switch (a.source) {
    case kUInt8: widen_piece<std::uint8_t>(in, out, count, 1.0f / 255, mean, std, alternate); break;
    case kBFloat16: widen_piece<bf16>(in, out, count, 1, mean, std, alternate); break;
    case kFloat16: widen_piece<fp16>(in, out, count, 1, mean, std, alternate); break;
    default: widen_piece<float>(in, out, count, 1, mean, std, alternate);
  }
}

// Pixels [from, to) of an image, in the order of the target.
template <class Element>
FASTKD_INLINE void gather(const Job& j, const char* image, std::int64_t plane, std::int64_t from,
                          std::int64_t to, char* gathered) {
  const Element* in = reinterpret_cast<const Element*>(image);
  Element* out = reinterpret_cast<Element*>(gathered);
  const std::int64_t channels = j.a.channels, pixels = to - from;
  if (j.a.source_channels_last == j.a.target_channels_last) {
    const std::int64_t at = plane * j.pixels + from * j.per_pixel;
    std::memcpy(out, in + at, pixels * j.per_pixel * sizeof(Element));
  } else if (j.a.target_channels_last == 0) {
    for (std::int64_t i = 0; i < pixels; ++i) out[i] = in[(from + i) * channels + plane];
  } else {
    for (std::int64_t c = 0; c < channels; ++c)
      for (std::int64_t i = 0; i < pixels; ++i) out[i * channels + c] = in[c * j.pixels + from + i];
  }
}

void gather_any(const Job& j, const char* image, std::int64_t plane, std::int64_t from,
                std::int64_t to, char* out) {
  switch (bytes_of(j.a.source)) {
    case 1: gather<std::uint8_t>(j, image, plane, from, to, out); break;
    case 2: gather<std::uint16_t>(j, image, plane, from, to, out); break;
    default: gather<std::uint32_t>(j, image, plane, from, to, out);
  }
}

// out = lam * a + (1 - lam) * b, starting from the nearer of the two: exact at 0 and 1. out may be a.
template <class T>
void blend(const T* a, const T* b, T* out, std::int64_t n, float lam) {
  const bool from_b = lam < 0.5f;
  const float share = from_b ? lam : lam - 1;
  const VF shares = splat(share);
  std::int64_t i = 0;
  for (; i + Lanes<float>::n <= n; i += Lanes<float>::n) {
    const VF x = load_wide(a + i), y = load_wide(b + i);
    store_narrow(out + i, (from_b ? y : x) + shares * (x - y));
  }
  for (; i < n; ++i) {
    const float x = widen(a[i]), y = widen(b[i]);
    narrow((from_b ? y : x) + share * (x - y), out + i);
  }
}

template <class T>
void blend_bytes(const char* a, const char* b, char* out, std::int64_t bytes, float lam) {
  blend(reinterpret_cast<const T*>(a), reinterpret_cast<const T*>(b), reinterpret_cast<T*>(out),
        bytes / static_cast<std::int64_t>(sizeof(T)), lam);
}

// Pixels [from, to), at most a piece, of a result that is computed.
void compute(const Job& j, const Scratch& s, const Pair& p, std::int64_t from, std::int64_t to) {
  const MixArgs& a = j.a;
  const std::int64_t size = bytes_of(a.source), count = (to - from) * j.per_pixel;
  const std::int64_t at = p.plane * j.pixels + from * j.per_pixel;
  const char* in = p.own + size * at;
  if (a.fill == kPartner || a.source_channels_last != a.target_channels_last) {
    gather_any(j, p.own, p.plane, from, to, s.gathered);
    if (a.fill == kPartner) {
      for_runs(p, a.width, from, to, [&](std::int64_t low, std::int64_t high) {
        gather_any(j, p.other, p.plane, low, high, s.gathered + size * (low - from) * j.per_pixel);
      });
    }
    in = s.gathered;
  }
  char* out = p.out + bytes_of(a.target) * at;
  float* wide = a.target == kFloat32 ? reinterpret_cast<float*>(out) : s.first;
  normalize(j, s, p, in, wide, count);
  if (a.fill == kZero || a.fill == kBlend) {
    for_runs(p, a.width, from, to, [&](std::int64_t low, std::int64_t high) {
      float* inside = wide + (low - from) * j.per_pixel;
      const std::int64_t n = (high - low) * j.per_pixel;
      if (a.fill == kZero) {
        for (std::int64_t i = 0; i < n; ++i) inside[i] = 0;
      } else {
        gather_any(j, p.other, p.plane, low, high, s.gathered);
        normalize(j, s, p, s.gathered, s.second, n);
        blend(inside, s.second, inside, n, p.lam);
      }
    });
  }
  if (a.target == kBFloat16) narrow_row(wide, reinterpret_cast<bf16*>(out), count);
  if (a.target == kFloat16) narrow_row(wide, reinterpret_cast<fp16*>(out), count);
}

// Pixels [from, to) of a result that has the images' elements outside the box.
void copy(const Job& j, const Pair& p, std::int64_t from, std::int64_t to) {
  const MixArgs& a = j.a;
  const std::int64_t size = bytes_of(a.target), step = size * j.per_pixel;
  const std::int64_t plane = size * p.plane * j.pixels;
  const char* own = p.own + plane;
  const char* other = p.other == nullptr ? nullptr : p.other + plane;
  char* out = p.out + plane;
  std::int64_t done = from;
  const auto copy_until = [&](std::int64_t end) {
    std::memcpy(out + done * step, own + done * step, (end - done) * step);
  };
  for_runs(p, a.width, from, to, [&](std::int64_t low, std::int64_t high) {
    copy_until(low);
    done = high;
    const std::int64_t at = low * step, bytes = (high - low) * step;
    if (a.fill == kZero) std::memset(out + at, 0, bytes);
    else if (a.fill == kPartner) std::memcpy(out + at, other + at, bytes);
    else if (a.target == kBFloat16) blend_bytes<bf16>(own + at, other + at, out + at, bytes, p.lam);
    else if (a.target == kFloat16) blend_bytes<fp16>(own + at, other + at, out + at, bytes, p.lam);
    else blend_bytes<float>(own + at, other + at, out + at, bytes, p.lam);
  });
  copy_until(to);
}

// Pixels [begin, end) of image n in all channels.
void paint(const Job& j, const Scratch& s, std::int64_t n, std::int64_t begin, std::int64_t end) {
  const MixArgs& a = j.a;
  const std::int64_t elements = a.channels * j.pixels, bytes = elements * bytes_of(a.source);
  std::int64_t y0 = 0, y1 = a.fill == kNothing ? 0 : a.height, x0 = 0, x1 = a.width;
  if (a.boxes != nullptr) {
    const std::int64_t* box = a.boxes + n * a.box_step;
    y0 = clamp(box[0], 0, a.height);
    y1 = clamp(box[1], 0, a.height);
    x0 = clamp(box[2], 0, a.width);
    x1 = clamp(box[3], 0, a.width);
  }
  Pair p;
  p.own = a.images + n * bytes;
  p.other = nullptr;
  if (a.fill >= kPartner) p.other = a.partners + (a.index != nullptr ? a.index[n] : n) * bytes;
  p.out = a.out + n * elements * bytes_of(a.target);
  p.plane = 0;
  p.runs = x0 < x1 ? y1 - y0 : 0;
  p.start = y0 * a.width + x0;
  p.length = x1 - x0;
  p.lam = a.fill == kBlend ? a.lam[n * a.lam_step] : 0;
  if (p.runs > 0 && p.length == a.width) {  // full rows are one run
    p.length *= p.runs;
    p.runs = 1;
  }
  for (; p.plane < a.channels / j.per_pixel; ++p.plane) {
    if (j.as_it_is) {
      copy(j, p, begin, end);
      continue;
    }
    for (std::int64_t from = begin; from < end; from += j.piece)
      compute(j, s, p, from, from + j.piece < end ? from + j.piece : end);
  }
}

void work(void* context) {
  Job& j = *static_cast<Job*>(context);
  const MixArgs& a = j.a;
  const std::int64_t n = j.piece * j.per_pixel;
  float* floats = static_cast<float*>(fastkd::scratch(n * 5 * sizeof(float)));
  if (floats == nullptr) {
    __atomic_store_n(&j.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  Scratch s;
  s.first = floats;
  s.second = floats + n;
  s.mean = floats + 2 * n;
  s.std = floats + 3 * n;
  s.gathered = reinterpret_cast<char*>(floats + 4 * n);
  if (a.mean != nullptr && a.target_channels_last != 0) {
    for (std::int64_t i = 0; i < n; ++i) {
      s.mean[i] = a.mean[i % a.channels];
      s.std[i] = a.std[i % a.channels];
    }
  }
  const std::int64_t units = a.num * j.blocks;
  for (;;) {
    const std::int64_t first = __atomic_fetch_add(&j.next, j.units_per_claim, __ATOMIC_RELAXED);
    if (first >= units) return;
    const std::int64_t last = first + j.units_per_claim < units ? first + j.units_per_claim : units;
    for (std::int64_t u = first; u < last; ++u) {
      const std::int64_t begin = u % j.blocks * j.block, end = begin + j.block;
      paint(j, s, u / j.blocks, begin, end < j.pixels ? end : j.pixels);
    }
  }
}

// 0: done. n + 1: the partner of image n is out of range. -1: out of memory.
std::int64_t mix(const MixArgs& a) {
  if (a.index != nullptr)
    for (std::int64_t n = 0; n < a.num; ++n)
      if (a.index[n] < 0 || a.index[n] >= a.num) return n + 1;
  if (a.num * a.channels * a.height * a.width == 0) return 0;
  Job j(a);
  const std::int64_t claims = (a.num * j.blocks + j.units_per_claim - 1) / j.units_per_claim;
  fastkd::parallel(a.threads < claims ? a.threads : claims, work, &j);
  return j.failed != 0 ? -1 : 0;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd

FASTKD_ENTRY(mix, fastkd::MixArgs) { return fastkd::FASTKD_ISA::mix(*a); }
