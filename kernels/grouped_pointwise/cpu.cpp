// The stages of grouped_pointwise on the CPU; README.md of this folder says what they compute.
//
// The work is cut into chunks by the shape alone: strips of rows for the 3x3 convolution, tiles of
// pixels for everything else. Threads take chunks as they come; statistics and weight gradients of
// a chunk stay apart and are added up in the order of the chunks, so that results do not depend on
// the number of threads.

#include "entry.h"
#include "groups.h"
#include "runtime.h"
#include "storage.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// Pixels of a tile: a multiple of kRows, so that products waste no rows.
constexpr i64 kTile = 48;
// Chunks: enough for many threads; fewer where each keeps a large weight gradient.
constexpr i64 kMostChunks = 64, kFewestChunks = 16, kChunkBytes = 1 << 20;

i64 number_of_chunks(i64 units, i64 bytes) {
  return least(units, most(kFewestChunks, least(kMostChunks, kChunkBytes / most(bytes, 1))));
}

// Chunks of consecutive units, taken by threads in turn.
struct Queue {
  i64 units, chunks;
  i64 next = 0;
  int failed = 0;

  bool take(i64* chunk) {
    *chunk = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    return *chunk < chunks;
  }
  i64 first(i64 chunk) const { return chunk * units / chunks; }
  void fail() { __atomic_store_n(&failed, 1, __ATOMIC_RELAXED); }
};

// Runs body(chunk, scratch) for every chunk. `floats` of scratch, zeroed, per thread.
template <class Body>
struct Work {
  Queue queue;
  i64 floats;
  Body& body;

  static void run(void* context) {
    Work& w = *static_cast<Work*>(context);
    float* const scratch = static_cast<float*>(fastkd::scratch(sizeof(float) * (w.floats + L)));
    if (scratch == nullptr) {
      w.queue.fail();
      return;
    }
    __builtin_memset(scratch, 0, sizeof(float) * (w.floats + L));
    i64 chunk;
    while (w.queue.take(&chunk))
      w.body(chunk, scratch, w.queue.first(chunk), w.queue.first(chunk + 1));
  }
};
template <class Body>
int for_chunks(i64 threads, i64 units, i64 chunks, i64 floats, Body body) {
  Work<Body> work{{units, chunks}, floats, body};
  fastkd::parallel(least(threads, chunks), Work<Body>::run, &work);
  return work.queue.failed != 0 ? -1 : 0;
}

// Weight gradients of the chunks, `size` floats each. A chunk zeroes its own before it begins, on
// the thread that works on it.
struct Shares {
  i64 size, chunks;
  Array<float> all;

  Shares(i64 size_, i64 chunks_) : size(size_), chunks(chunks_), all(size_ * chunks_, false) {}
  float* begin(i64 chunk) {
    float* const own = all.data + chunk * size;
    __builtin_memset(own, 0, sizeof(float) * static_cast<std::size_t>(size));
    return own;
  }
  // Adds them to the first, in the order of the chunks.
  int add(i64 threads) {
    constexpr i64 stretch = 1024;
    const i64 units = (size + stretch - 1) / stretch;
    return for_chunks(threads, units, units, 0, [&](i64, float*, i64 first, i64 last) {
      const i64 from = first * stretch, to = least(last * stretch, size);
      for (i64 k = 1; k < chunks; ++k)
        for (i64 i = from; i < to; ++i) all.data[i] += all.data[k * size + i];
    });
  }
};

// Hands out pieces of a thread's scratch.
struct Carver {
  float* next;
  float* floats(i64 n) {
    float* const here = next;
    next += round_up(n, L);
    return here;
  }
};

i64 tiles_of(i64 pixels) { return (pixels + kTile - 1) / kTile; }

// Statistics of what the chunks wrote.
struct Statistics {
  i64 pitch, chunks;
  Array<double> moments, counts;

  Statistics(bool wanted, i64 chunks_, i64 pitch_)
      : pitch(pitch_),
        chunks(wanted ? chunks_ : 0),
        moments(chunks * Moments::doubles(pitch_)),
        counts(chunks) {}
  bool ok() const { return moments.data != nullptr && counts.data != nullptr; }
  Moments of(i64 chunk) { return Moments(moments.data + chunk * Moments::doubles(pitch), pitch); }
  void merge(i64 channels, float* mean, float* var) const {
    if (chunks > 0) merge_moments(moments.data, counts.data, chunks, pitch, channels, mean, var);
  }
};

// Sums over what the chunks wrote of the gradient behind a norm, and of it times xhat.
struct Sums {
  i64 pitch, chunks;
  Array<double> all;

  Sums(i64 chunks_, i64 pitch_) : pitch(pitch_), chunks(chunks_), all(chunks_ * 2 * pitch_) {}
  bool ok() const { return all.data != nullptr; }
  double* of(i64 chunk) { return all.data + chunk * 2 * pitch; }
  // In the order of the chunks; out [2, channels].
  void merge(i64 channels, float* out) const {
    for (i64 row = 0; row < 2; ++row)
      for (i64 c = 0; c < channels; ++c) {
        double total = 0;
        for (i64 k = 0; k < chunks; ++k) total += all.data[(k * 2 + row) * pitch + c];
        out[row * channels + c] = static_cast<float>(total);
      }
  }
};

// ------------------------------------------------------------------ one pixel after another

template <class S>
std::int64_t statistics(const BlockArgs& a) {
  const i64 pixels = a.samples * a.height * a.width, pitch = round_up(a.channels, L);
  const i64 tiles = tiles_of(pixels), chunks = number_of_chunks(tiles, 0);
  Statistics found(true, chunks, pitch);
  if (!found.ok()) return -1;
  const S* const x = static_cast<const S*>(a.x);
  const int code =
      for_chunks(a.threads, tiles, chunks, 0, [&](i64 chunk, float*, i64 first, i64 last) {
        Moments m = found.of(chunk);
        for (i64 t = first; t < last; ++t) {
          const i64 start = t * kTile, n = least(kTile, pixels - start);
          count_line(x + start * a.channels, n, a.channels, &m);
        }
        found.counts.data[chunk] = m.count;
      });
  found.merge(a.channels, a.mean, a.var);
  return code;
}

template <class S>
std::int64_t normalise(const BlockArgs& a) {
  const i64 pixels = a.samples * a.height * a.width, pitch = round_up(a.channels, L);
  const i64 tiles = tiles_of(pixels), chunks = number_of_chunks(tiles, 0);
  const Affine f(a.norm, a.channels, pitch);
  if (!f.ok()) return -1;
  return for_chunks(a.threads, tiles, chunks, 0, [&](i64, float*, i64 first, i64 last) {
    const i64 start = first * kTile, n = least(last * kTile, pixels) - start;
    const i64 at = start * a.channels;
    const S* const residual =
        a.residual != nullptr ? static_cast<const S*>(a.residual) + at : nullptr;
    finish_line(static_cast<const S*>(a.x) + at, a.channels, n, a.channels, nullptr, f, residual,
                a.activate_sum != 0, static_cast<S*>(a.y) + at);
  });
}

template <class S>
std::int64_t normalise_backward(const BlockArgs& a) {
  const i64 pixels = a.samples * a.height * a.width, pitch = round_up(a.channels, L);
  const i64 tiles = tiles_of(pixels), chunks = number_of_chunks(tiles, 0);
  const Affine f(a.norm, a.channels, pitch);
  const Masking mask(a.norm, f, a.channels, pitch);
  Sums sums(chunks, pitch);
  if (!f.ok() || !mask.ok() || !sums.ok()) return -1;
  const BlockAfter none{};
  const Incoming as_is(none, a.channels, pitch);
  if (!as_is.ok()) return -1;
  const int code = for_chunks(
      a.threads, tiles, chunks, 2 * kTile * pitch,
      [&](i64 chunk, float* scratch, i64 first, i64 last) {
        Carver carve{scratch};
        float* const active = carve.floats(kTile * pitch);
        float* const gradient = carve.floats(kTile * pitch);
        for (i64 t = first; t < last; ++t) {
          const i64 start = t * kTile, n = least(kTile, pixels - start), at = start * a.channels;
          const S* const x = static_cast<const S*>(a.x) + at;
          const S* const g = static_cast<const S*>(a.g) + at;
          const S* const added = a.residual != nullptr && a.activate_sum != 0
                                     ? static_cast<const S*>(a.residual) + at
                                     : nullptr;
          read_line(x, n, a.channels, f, active, pitch, added);
          read_gradient<S>(g, nullptr, n, a.channels, as_is, gradient, pitch);
          write_masked(gradient, active, x, pitch, n, a.channels, mask, static_cast<S*>(a.y) + at,
                       sums.of(chunk));
        }
      });
  if (a.sums != nullptr) sums.merge(a.channels, a.sums);
  return code;
}

template <class S>
std::int64_t denormalise(const BlockArgs& a) {
  const i64 pixels = a.samples * a.height * a.width, pitch = round_up(a.channels, L);
  const i64 tiles = tiles_of(pixels), chunks = number_of_chunks(tiles, 0);
  const Incoming incoming(a.after, a.channels, pitch);
  if (!incoming.ok()) return -1;
  return for_chunks(a.threads, tiles, chunks, 0, [&](i64, float*, i64 first, i64 last) {
    const i64 start = first * kTile, n = least(last * kTile, pixels) - start,
              at = start * a.channels;
    write_gradient(static_cast<const S*>(a.g) + at, static_cast<const S*>(a.after.out) + at, n,
                   a.channels, incoming, static_cast<S*>(a.y) + at);
  });
}

// ------------------------------------------------------------------ pointwise convolution

template <class S>
std::int64_t pointwise(const BlockArgs& a) {
  const i64 pixels = a.samples * a.height * a.width, tiles = tiles_of(pixels);
  const i64 pitch = round_up(a.channels, L), out_pitch = round_up(a.out_channels, L);
  const i64 chunks = number_of_chunks(tiles, 0);
  const Affine f(a.norm, a.channels, pitch);
  Array<float> packed(a.channels * out_pitch, false);
  Statistics found(a.mean != nullptr, chunks, out_pitch);
  if (!f.ok() || packed.data == nullptr || !found.ok()) return -1;
  pack_panels(a.weight, 1, a.channels, a.channels, a.out_channels, packed.data);
  const i64 floats = kTile * (pitch + out_pitch);
  const int code = for_chunks(
      a.threads, tiles, chunks, floats, [&](i64 chunk, float* scratch, i64 first, i64 last) {
        Carver carve{scratch};
        float* const line = carve.floats(kTile * pitch);
        float* const out = carve.floats(kTile * out_pitch);
        const bool counted = a.mean != nullptr;
        Moments m = counted ? found.of(chunk) : Moments(nullptr, 0);
        for (i64 t = first; t < last; ++t) {
          const i64 start = t * kTile, n = least(kTile, pixels - start);
          read_line<S>(static_cast<const S*>(a.x) + start * a.channels, n, a.channels, f, line,
                       pitch, nullptr);
          multiply_packed(line, pitch, n, a.channels, packed.data, a.out_channels, out, out_pitch);
          write_line(out, out_pitch, n, a.out_channels, a.bias,
                     static_cast<S*>(a.y) + start * a.out_channels, counted ? &m : nullptr);
        }
        if (counted) found.counts.data[chunk] = m.count;
      });
  found.merge(a.out_channels, a.mean, a.var);
  return code;
}

template <class S>
std::int64_t pointwise_backward(const BlockArgs& a) {
  const i64 pixels = a.samples * a.height * a.width, tiles = tiles_of(pixels);
  const i64 pitch = round_up(a.channels, L), out_pitch = round_up(a.out_channels, L);
  const bool inputs = a.y != nullptr, weights = a.dweight != nullptr;
  const i64 own = weights ? (a.out_channels + 1) * pitch + out_pitch : 0;
  const i64 chunks = number_of_chunks(tiles, own * sizeof(float));
  const Affine f(a.norm, a.channels, pitch);
  const Masking mask(a.norm, f, a.channels, pitch);
  const Incoming incoming(a.after, a.out_channels, out_pitch);
  Array<float> packed(inputs ? a.out_channels * pitch : 0, false);
  Shares shares(own, chunks);
  Sums sums(chunks, pitch);
  if (!f.ok() || !mask.ok() || !incoming.ok() || packed.data == nullptr ||
      shares.all.data == nullptr || !sums.ok())
    return -1;
  if (inputs)
    pack_panels(a.weight, a.channels, 1, a.out_channels, a.channels, packed.data);
  const i64 floats = kTile * (2 * pitch + out_pitch);
  const int code = for_chunks(
      a.threads, tiles, chunks, floats, [&](i64 chunk, float* scratch, i64 first, i64 last) {
        Carver carve{scratch};
        float* const active = carve.floats(kTile * pitch);
        float* const back = carve.floats(kTile * pitch);
        float* const g = carve.floats(kTile * out_pitch);
        float* const dweight = shares.begin(chunk);
        float* const dbias = dweight + a.out_channels * pitch;
        for (i64 t = first; t < last; ++t) {
          const i64 start = t * kTile, n = least(kTile, pixels - start);
          const S* const x = static_cast<const S*>(a.x) + start * a.channels;
          const i64 out_at = start * a.out_channels;
          read_gradient(static_cast<const S*>(a.g) + out_at,
                        incoming.normed ? static_cast<const S*>(a.after.out) + out_at : nullptr, n,
                        a.out_channels, incoming, g, out_pitch);
          read_line<S>(x, n, a.channels, f, active, pitch, nullptr);
          if (weights) {
            const float *left = g, *right = active;
            multiply({&left, &right, 1, n, 1, out_pitch, pitch, dweight, pitch, true},
                     a.out_channels, pitch);
            if (a.dbias != nullptr) add_pixels(g, out_pitch, n, dbias);
          }
          if (!inputs) continue;
          multiply_packed(g, out_pitch, n, a.out_channels, packed.data, a.channels, back, pitch);
          write_masked(back, active, x, pitch, n, a.channels, mask,
                       static_cast<S*>(a.y) + start * a.channels, sums.of(chunk));
        }
      });
  if (a.sums != nullptr && inputs) sums.merge(a.channels, a.sums);
  if (weights) {
    if (shares.add(a.threads) != 0) return -1;
    const float* const total = shares.all.data;
    for (i64 o = 0; o < a.out_channels; ++o)
      for (i64 c = 0; c < a.channels; ++c) a.dweight[o * a.channels + c] = total[o * pitch + c];
    if (a.dbias != nullptr)
      for (i64 o = 0; o < a.out_channels; ++o) a.dbias[o] = total[a.out_channels * pitch + o];
  }
  return code;
}

// ------------------------------------------------------------------ grouped 3x3 convolution

// Strips of output rows; the input rows of strip [first, last) are [first * stride, last * stride),
// and all that are left for the last strip of an image.
struct Strips {
  i64 rows, per_image, count;
  explicit Strips(const BlockArgs& a) {
    const i64 wanted = (kMostChunks + a.samples - 1) / a.samples;
    per_image = most(1, least(wanted, a.out_height / 4));
    rows = (a.out_height + per_image - 1) / per_image;
    per_image = (a.out_height + rows - 1) / rows;
    count = a.samples * per_image;
  }
};

// The last few lines that were read, by (image, row).
struct Lines {
  static constexpr int kept = 4;
  float* line[kept];
  i64 key[kept], used[kept], clock = 0;

  Lines(Carver& carve, i64 floats) {
    for (int k = 0; k < kept; ++k) {
      line[k] = carve.floats(floats);
      key[k] = -1;
      used[k] = 0;
    }
  }
  // The line; `fresh` if it has to be filled.
  float* find(i64 wanted, bool* fresh) {
    int oldest = 0;
    for (int k = 0; k < kept; ++k) {
      if (key[k] == wanted) {
        used[k] = ++clock;
        *fresh = false;
        return line[k];
      }
      if (used[k] < used[oldest]) oldest = k;
    }
    key[oldest] = wanted;
    used[oldest] = ++clock;
    *fresh = true;
    return line[oldest];
  }
};

// What the passes over the 3x3 convolution share: normalised input lines of one thread.
template <class S>
struct Inputs {
  const BlockArgs& a;
  const Groups& g;
  const Affine& f;
  i64 left;  // pixels of padding on both sides
  Lines lines;
  const float* zeros;

  static i64 floats(const BlockArgs& a, const Groups& g) {
    return (Lines::kept + 1) * round_up((a.width + 2 * padding(a)) * g.pitch, L);
  }
  static i64 padding(const BlockArgs& a) { return a.padding + a.dilation; }
  Inputs(const BlockArgs& args, const Groups& groups, const Affine& affine, Carver& carve)
      : a(args),
        g(groups),
        f(affine),
        left(padding(args)),
        lines(carve, (args.width + 2 * left) * groups.pitch),
        zeros(carve.floats((args.width + 2 * left) * groups.pitch)) {}

  // Column 0 of a row, or of a row of zeros.
  const float* row(i64 image, i64 y) {
    if (y < 0 || y >= a.height) return zeros + left * g.pitch;
    bool fresh;
    float* const line = lines.find(image * a.height + y, &fresh);
    if (fresh)
      read_line<S>(at(image, y), a.width, a.channels, f, line + left * g.pitch, g.pitch, nullptr);
    return line + left * g.pitch;
  }
  const S* at(i64 image, i64 y) const {
    return static_cast<const S*>(a.x) + (image * a.height + y) * a.width * a.channels;
  }
  // The first column that the kernel reads in each of its rows, for output row y.
  void window(i64 image, i64 y, const float** rows) {
    for (i64 k = 0; k < 3; ++k)
      rows[k] = row(image, y * a.stride - a.padding + k * a.dilation) - a.padding * g.pitch;
  }
};

// One row of the convolution.
void convolve_row(const BlockArgs& a, const Convolution& conv, const float* const* rows,
                  float* out) {
  const Groups& g = conv.g;
  if (a.stride == 1 && !g.wide) {
    for (i64 first = 0; first < least(a.dilation, a.out_width); ++first) {
      const i64 shift = first * g.pitch;
      const float* const at[3] = {rows[0] + shift, rows[1] + shift, rows[2] + shift};
      conv.rows(at, (a.out_width - first + a.dilation - 1) / a.dilation, a.dilation * g.pitch,
                out + shift);
    }
    return;
  }
  Taps taps;
  for (i64 k = 0; k < 3; ++k)
    for (i64 column = 0; column < 3; ++column)
      taps.add(rows[k] + column * a.dilation * g.pitch, k * 3 + column);
  conv.taps(taps, a.out_width, a.stride * g.pitch, out, g.pitch);
}

// Rows in an order in which the kernel meets the lines that are kept: every dilation-th.
template <class Row>
void for_rows(i64 first, i64 last, i64 dilation, Row row) {
  for (i64 start = first; start < least(first + dilation, last); ++start)
    for (i64 y = start; y < last; y += dilation) row(y);
}

template <class S>
std::int64_t grouped(const BlockArgs& a) {
  const Groups g(a.channels, a.groups);
  const Turns turns(g);
  const Affine f(a.norm, a.channels, g.pitch);
  const Strips strips(a);
  const i64 chunks = number_of_chunks(strips.count, 0);
  const Convolution conv(g, turns, a.weight, false);
  Statistics found(a.mean != nullptr, chunks, g.pitch);
  if (!turns.ok() || !f.ok() || !conv.ok() || !found.ok()) return -1;
  const i64 floats = Inputs<S>::floats(a, g) + round_up(a.out_width * g.pitch, L);
  const int code = for_chunks(
      a.threads, strips.count, chunks, floats, [&](i64 chunk, float* scratch, i64 first, i64 last) {
        Carver carve{scratch};
        Inputs<S> inputs(a, g, f, carve);
        float* const line = carve.floats(a.out_width * g.pitch);
        const bool counted = a.mean != nullptr;
        Moments m = counted ? found.of(chunk) : Moments(nullptr, 0);
        for (i64 s = first; s < last; ++s) {
          const i64 image = s / strips.per_image, top = s % strips.per_image * strips.rows;
          for_rows(top, least(top + strips.rows, a.out_height), a.dilation, [&](i64 y) {
            const float* rows[3];
            inputs.window(image, y, rows);
            convolve_row(a, conv, rows, line);
            write_line(line, g.pitch, a.out_width, a.channels, a.bias,
                       static_cast<S*>(a.y) + (image * a.out_height + y) * a.out_width * a.channels,
                       counted ? &m : nullptr);
          });
        }
        if (counted) found.counts.data[chunk] = m.count;
      });
  found.merge(a.channels, a.mean, a.var);
  return code;
}

template <class S>
std::int64_t pair(const BlockArgs& a) {
  const Groups g(a.channels, a.groups);
  const Turns turns(g);
  const i64 out_pitch = round_up(a.out_channels, L);
  const Affine f(a.norm, a.channels, g.pitch), f1(a.norm1, a.channels, g.pitch);
  const Affine f2(a.norm2, a.out_channels, out_pitch);
  const Strips strips(a);
  const i64 chunks = number_of_chunks(strips.count, 0);
  const Convolution conv(g, turns, a.weight, false);
  Array<float> packed(a.channels * out_pitch, false);
  Statistics found(a.mean != nullptr, chunks, out_pitch);
  if (!turns.ok() || !f.ok() || !f1.ok() || !f2.ok() || !conv.ok() || packed.data == nullptr ||
      !found.ok())
    return -1;
  pack_panels(a.weight1, 1, a.channels, a.channels, a.out_channels, packed.data);
  // Rows of narrow images share a product.
  const i64 together = most(1, kTile / a.out_width);
  const i64 floats = Inputs<S>::floats(a, g) + round_up(a.out_width * g.pitch, L) +
                     together * a.out_width * (g.pitch + out_pitch) + 2 * L;
  const int code = for_chunks(
      a.threads, strips.count, chunks, floats, [&](i64 chunk, float* scratch, i64 first, i64 last) {
        Carver carve{scratch};
        Inputs<S> inputs(a, g, f, carve);
        float* const line = carve.floats(a.out_width * g.pitch);
        float* const active = carve.floats(together * a.out_width * g.pitch);
        float* const out = carve.floats(together * a.out_width * out_pitch);
        const bool counted = a.mean != nullptr;
        Moments m = counted ? found.of(chunk) : Moments(nullptr, 0);
        i64 waiting[kTile], count = 0;  // rows in `active`, by their first pixel in the output
        const auto flush = [&] {
          multiply_packed(active, g.pitch, count * a.out_width, a.channels, packed.data,
                          a.out_channels, out, out_pitch);
          for (i64 k = 0; k < count; ++k) {
            float* const own = out + k * a.out_width * out_pitch;
            const i64 at = waiting[k] * a.out_channels;
            S* const y = static_cast<S*>(a.y) + at;
            if (counted) {
              write_line(own, out_pitch, a.out_width, a.out_channels, a.bias1, y, &m);
              continue;
            }
            finish_line(own, out_pitch, a.out_width, a.out_channels, a.bias1, f2,
                        a.residual != nullptr ? static_cast<const S*>(a.residual) + at : nullptr,
                        a.activate_sum != 0, y);
          }
          count = 0;
        };
        for (i64 s = first; s < last; ++s) {
          const i64 image = s / strips.per_image, top = s % strips.per_image * strips.rows;
          for_rows(top, least(top + strips.rows, a.out_height), a.dilation, [&](i64 y) {
            const float* rows[3];
            inputs.window(image, y, rows);
            convolve_row(a, conv, rows, line);
            activate_line<S>(line, g.pitch, a.out_width, a.channels, a.bias, f1,
                             active + count * a.out_width * g.pitch);
            waiting[count++] = (image * a.out_height + y) * a.out_width;
            if (count == together) flush();
          });
        }
        if (count > 0) flush();
        if (counted) found.counts.data[chunk] = m.count;
      });
  found.merge(a.out_channels, a.mean, a.var);
  return code;
}

// Gradients at the outputs of the 3x3 convolution, line by line, with zeros around them.
template <class S>
struct Gradients {
  const BlockArgs& a;
  const Groups& g;
  const Incoming& incoming;
  i64 left;
  Lines lines;
  const float* zeros;

  static i64 padding(const BlockArgs& a) { return 2 * a.dilation + 1; }
  static i64 floats(const BlockArgs& a, const Groups& g) {
    return (Lines::kept + 1) * round_up((a.out_width + 2 * padding(a)) * g.pitch, L);
  }
  Gradients(const BlockArgs& args, const Groups& groups, const Incoming& in, Carver& carve)
      : a(args),
        g(groups),
        incoming(in),
        left(padding(args)),
        lines(carve, (args.out_width + 2 * left) * groups.pitch),
        zeros(carve.floats((args.out_width + 2 * left) * groups.pitch)) {}

  const float* row(i64 image, i64 y) {
    if (y < 0 || y >= a.out_height) return zeros + left * g.pitch;
    bool fresh;
    float* const line = lines.find(image * a.out_height + y, &fresh);
    if (fresh) {
      const i64 at = (image * a.out_height + y) * a.out_width * a.channels;
      read_gradient(static_cast<const S*>(a.g) + at,
                    incoming.normed ? static_cast<const S*>(a.after.out) + at : nullptr,
                    a.out_width, a.channels, incoming, line + left * g.pitch, g.pitch);
    }
    return line + left * g.pitch;
  }
};

// Gradient at input row y of an image: the convolution from outputs to inputs.
template <class S>
void convolve_back(const BlockArgs& a, const Convolution& conv, Gradients<S>& gradients, i64 image,
                   i64 y, float* out) {
  const Groups& g = conv.g;
  const i64 pad = 2 * a.dilation - a.padding;
  if (a.stride == 1 && !g.wide) {
    const float* rows[3];
    for (i64 k = 0; k < 3; ++k)
      rows[k] = gradients.row(image, y - pad + k * a.dilation) - pad * g.pitch;
    for (i64 first = 0; first < least(a.dilation, a.width); ++first) {
      const i64 shift = first * g.pitch;
      const float* const at[3] = {rows[0] + shift, rows[1] + shift, rows[2] + shift};
      conv.rows(at, (a.width - first + a.dilation - 1) / a.dilation, a.dilation * g.pitch,
                out + shift);
    }
    return;
  }
  // Columns (and rows) of the same remainder have the same taps.
  for (i64 first = 0; first < least(a.stride, a.width); ++first) {
    Taps taps;
    for (i64 k = 0; k < 3; ++k) {
      const i64 down = y + a.padding - k * a.dilation;
      if (down % a.stride != 0 || down < 0 || down / a.stride >= a.out_height) continue;
      const float* const row = gradients.row(image, down / a.stride);
      for (i64 column = 0; column < 3; ++column) {
        const i64 across = first + a.padding - column * a.dilation;
        if (across % a.stride == 0)
          taps.add(row + across / a.stride * g.pitch, 8 - (k * 3 + column));
      }
    }
    conv.taps(taps, (a.width - first + a.stride - 1) / a.stride, g.pitch, out + first * g.pitch,
              a.stride * g.pitch);
  }
}

template <class S>
std::int64_t grouped_backward(const BlockArgs& a) {
  const Groups g(a.channels, a.groups);
  const Turns turns(g);
  const bool wants_input = a.y != nullptr, wants_weights = a.dweight != nullptr;
  const i64 own = wants_weights ? g.weights() + g.pitch : 0;
  const Strips strips(a);
  const i64 chunks = number_of_chunks(strips.count, own * sizeof(float));
  const Affine f(a.norm, a.channels, g.pitch);
  const Masking mask(a.norm, f, a.channels, g.pitch);
  const Incoming incoming(a.after, a.channels, g.pitch);
  const Convolution conv(g, turns, wants_input ? a.weight : nullptr, true);
  Shares shares(own, chunks);
  Sums sums(chunks, g.pitch);
  if (!turns.ok() || !f.ok() || !mask.ok() || !incoming.ok() || !conv.ok() ||
      shares.all.data == nullptr || !sums.ok())
    return -1;
  const i64 floats =
      Inputs<S>::floats(a, g) + Gradients<S>::floats(a, g) + round_up(a.width * g.pitch, L);
  const int code = for_chunks(
      a.threads, strips.count, chunks, floats, [&](i64 chunk, float* scratch, i64 first, i64 last) {
        Carver carve{scratch};
        Inputs<S> inputs(a, g, f, carve);
        Gradients<S> gradients(a, g, incoming, carve);
        float* const line = carve.floats(a.width * g.pitch);
        float* const dweight = shares.begin(chunk);
        float* const dbias = dweight + g.weights();
        const auto back = [&](i64 image, i64 y) {
          convolve_back(a, conv, gradients, image, y, line);
          const i64 at = (image * a.height + y) * a.width * a.channels;
          write_masked(line, inputs.row(image, y), static_cast<const S*>(a.x) + at, g.pitch,
                       a.width, a.channels, mask, static_cast<S*>(a.y) + at,
                       sums.of(chunk));
        };
        for (i64 s = first; s < last; ++s) {
          const i64 image = s / strips.per_image, top = s % strips.per_image * strips.rows;
          const i64 bottom = least(top + strips.rows, a.out_height);
          for_rows(top, bottom, a.dilation, [&](i64 y) {
            if (wants_weights) {
              const float* rows[3];
              inputs.window(image, y, rows);
              const float* const dy = gradients.row(image, y);
              weigh_line(g, turns, rows, a.dilation * g.pitch, a.stride * g.pitch, dy, a.out_width,
                         dweight);
              if (a.dbias != nullptr) add_pixels(dy, g.pitch, a.out_width, dbias);
            }
            if (wants_input && a.stride == 1 && y < a.height) back(image, y);
          });
          if (!wants_input) continue;
          // Rows of the input that no row of the strip stands for.
          const i64 from = a.stride == 1 ? most(top, bottom) : top * a.stride;
          const i64 to = bottom == a.out_height ? a.height : least(bottom * a.stride, a.height);
          for (i64 y = from; y < to; ++y) back(image, y);
        }
      });
  if (a.sums != nullptr && wants_input) sums.merge(a.channels, a.sums);
  if (wants_weights) {
    if (shares.add(a.threads) != 0) return -1;
    const float* const total = shares.all.data;
    visit_weights(g, false, [&](i64 to, i64 from) { a.dweight[to] = total[from]; });
    if (a.dbias != nullptr)
      for (i64 c = 0; c < a.channels; ++c) a.dbias[c] = total[g.weights() + c];
  }
  return code;
}

typedef std::int64_t (*Stage)(const BlockArgs&);
std::int64_t by_type(const BlockArgs& a, Stage fp32, Stage bf, Stage half) {
  return a.type == kFloat32 ? fp32(a) : a.type == kBFloat16 ? bf(a) : half(a);
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd

// Each returns 0, or -1 without memory.
#define FASTKD_STAGE(name)                                   \
  FASTKD_ENTRY(block_##name, fastkd::BlockArgs) {            \
    using namespace fastkd::FASTKD_ISA;                      \
    return by_type(*a, name<float>, name<bf16>, name<fp16>); \
  }
FASTKD_STAGE(statistics)
FASTKD_STAGE(grouped)
FASTKD_STAGE(pointwise)
FASTKD_STAGE(pair)
FASTKD_STAGE(normalise)
FASTKD_STAGE(grouped_backward)
FASTKD_STAGE(pointwise_backward)
FASTKD_STAGE(normalise_backward)
FASTKD_STAGE(denormalise)
