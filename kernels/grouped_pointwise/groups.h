// The grouped 3x3 convolution of one line of pixels, forward and backward, on scratch lines.
//
// Up to L channels a group: a vector holds whole groups. Each input lane is multiplied with the
// weights that lead to the channel `turn` lanes further on in its group, for every turn; nine taps
// are added up before the sum is turned into place. So nine multiply-adds share one permutation,
// and any number of channels a group that does not exceed the vector is computed without padding
// zeros. More channels a group: products of the group's matrices.
#pragma once

#include "product.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

struct Groups {
  i64 channels, each, number;
  bool wide;    // more channels a group than lanes
  i64 real;     // narrow: channels in a vector. wide: channels of a group
  i64 vectors;  // narrow: vectors of a pixel. wide: vectors of a group
  i64 pitch;    // floats of a pixel of a scratch line

  Groups(i64 channels_, i64 groups)
      : channels(channels_), each(channels_ / groups), number(groups) {
    wide = each > L;
    real = wide ? each : L / each * each;
    vectors = wide ? (each + L - 1) / L : (channels + real - 1) / real;
    const i64 last = wide ? (number - 1) * each + vectors * L : (vectors - 1) * real + L;
    pitch = round_up(most(channels, last), L);
  }
  i64 turns() const { return each; }
  // Floats of packed weights, and of their gradient.
  i64 weights() const { return wide ? number * 9 * each * vectors * L : vectors * turns() * 9 * L; }
};

// Which lane takes part in which: `ahead`, lane l reads the one `turn` further on in its group;
// `back`, the one `turn` before it. [turns][L] each.
struct Turns {
  Array<std::int32_t> ahead, back;
  explicit Turns(const Groups& g)
      : ahead(g.wide ? 0 : g.turns() * L), back(g.wide ? 0 : g.turns() * L) {
    if (!ok() || g.wide) return;
    for (i64 turn = 0; turn < g.turns(); ++turn)
      for (i64 l = 0; l < L; ++l) {
        const i64 start = l / g.each * g.each, at = l % g.each;
        const bool inside = l < g.real;
        ahead.data[turn * L + l] =
            static_cast<std::int32_t>(inside ? start + (at + turn) % g.each : l);
        back.data[turn * L + l] =
            static_cast<std::int32_t>(inside ? start + (at - turn + g.each) % g.each : l);
      }
  }
  bool ok() const { return ahead.data != nullptr && back.data != nullptr; }
};

FASTKD_INLINE IF load_order(const std::int32_t* p) {
  IF order;
  __builtin_memcpy(&order, p, sizeof order);
  return order;
}

// Place of a weight [out channel][in channel of the group][tap] in packed order, for the
// convolution or, with `backward`, for the one that carries gradients from outputs to inputs (taps
// reversed).
template <class Visit>
void visit_weights(const Groups& g, bool backward, Visit visit) {
  const i64 step = g.wide ? g.each * g.vectors * L : L;  // from tap to tap
  for (i64 group = 0; group < g.number; ++group)
    for (i64 to = 0; to < g.each; ++to)
      for (i64 in = 0; in < g.each; ++in) {
        const i64 source = backward ? to : in, target = backward ? in : to;
        i64 place;
        if (g.wide) {
          place = (group * 9 * g.each + source) * g.vectors * L + target;
        } else {
          const i64 channel = group * g.each + source, vector = channel / g.real;
          const i64 turn = target < source ? target - source + g.each : target - source;
          place = (vector * g.turns() + turn) * 9 * L + channel - vector * g.real;
        }
        const i64 weight = ((group * g.each + to) * g.each + in) * 9;
        for (i64 tap = 0; tap < 9; ++tap)
          visit(weight + tap, place + (backward ? 8 - tap : tap) * step);
      }
}

void pack_groups(const Groups& g, const float* weight, bool backward, float* packed) {
  visit_weights(g, backward, [&](i64 from, i64 to) { packed[to] = weight[from]; });
}

// Taps that reach a line of outputs: x[i] is the input at tap which[i] of the first output.
struct Taps {
  i64 count = 0;
  const float* x[9];
  i64 which[9];
  void add(const float* at, i64 tap) {
    x[count] = at;
    which[count++] = tap;
  }
};

// Adds up the turns of P outputs of one vector and stores them. sums(turn, VF[P]): the taps of a
// turn, not yet in place; turn 0 is.
template <int P, class Sums>
FASTKD_INLINE void turns_block(i64 turns, const std::int32_t* back, float* out, i64 out_step,
                               Sums sums) {
  VF total[P];
  sums(0, total);
  for (i64 turn = 1; turn < turns; ++turn) {
    // Inputs are loaded in every turn: kept for the next one they would fill the stack.
    asm volatile("" ::: "memory");
    VF moved[P];
    sums(turn, moved);
    const IF order = load_order(back + turn * L);
    for (int p = 0; p < P; ++p) total[p] += permute(moved[p], order);
  }
  for (int p = 0; p < P; ++p) store(out + p * out_step, total[p]);
}

// P outputs of one vector; inputs of neighbouring outputs are `step` floats apart.
template <int P>
void taps_block(const Taps& taps, i64 offset, i64 step, const float* weights, i64 turns,
                const std::int32_t* back, float* out, i64 out_step) {
  const auto sums_of = [&](i64 turn, VF* sums) __attribute__((always_inline)) {
    clear<P>(sums);
    for (i64 t = 0; t < taps.count; ++t) {
      const VF w = load(weights + (turn * 9 + taps.which[t]) * L);
      const float* const x = taps.x[t] + offset;
      for (int p = 0; p < P; ++p) sums[p] = fma(load(x + p * step), w, sums[p]);
    }
  };
  turns_block<P>(turns, back, out, out_step, sums_of);
}

// The same for all nine taps of neighbouring outputs, which share their columns: row[k] is the
// first column of kernel row k, columns are `step` floats apart.
template <int P>
void rows_block(const float* const* row, i64 offset, i64 step, const float* weights, i64 turns,
                const std::int32_t* back, float* out, i64 out_step) {
  const auto sums_of = [&](i64 turn, VF* sums) __attribute__((always_inline)) {
    clear<P>(sums);
    for (int k = 0; k < 3; ++k) {
      const float* const w = weights + (turn * 9 + k * 3) * L;
      const VF left = load(w), middle = load(w + L), right = load(w + 2 * L);
      const float* const x = row[k] + offset;
#pragma GCC unroll 16
      for (int column = 0; column < P + 2; ++column) {
        const VF v = load(x + column * step);
        if (column < P) sums[column < P ? column : 0] = fma(v, left, sums[column < P ? column : 0]);
        if (column >= 1 && column <= P)
          sums[column >= 1 && column <= P ? column - 1 : 0] =
              fma(v, middle, sums[column >= 1 && column <= P ? column - 1 : 0]);
        if (column >= 2)
          sums[column >= 2 ? column - 2 : 0] = fma(v, right, sums[column >= 2 ? column - 2 : 0]);
      }
    }
  };
  turns_block<P>(turns, back, out, out_step, sums_of);
}

// One direction of a convolution: packed weights and what it needs to place its results.
struct Convolution {
  const Groups& g;
  const Turns& turns;
  Array<float> weights;

  Convolution(const Groups& groups, const Turns& order, const float* weight, bool backward)
      : g(groups), turns(order), weights(weight != nullptr ? groups.weights() : 0) {
    if (ok() && weight != nullptr) pack_groups(g, weight, backward, weights.data);
  }
  bool ok() const { return weights.data != nullptr; }

  // `pixels` outputs, `out_step` floats apart, from inputs `step` apart.
  void taps(const Taps& t, i64 pixels, i64 step, float* out, i64 out_step) const {
    if (g.wide) {
      wide_taps(t, pixels, step, out, out_step);
      return;
    }
    for (i64 v = 0; v < g.vectors; ++v) {
      const float* const w = weights.data + v * g.turns() * 9 * L;
      const i64 at = v * g.real;
      i64 p = 0;
      for (; p + 8 <= pixels; p += 8)
        taps_block<8>(t, at + p * step, step, w, g.turns(), turns.back.data,
                      out + at + p * out_step, out_step);
      for (; p + 2 <= pixels; p += 2)
        taps_block<2>(t, at + p * step, step, w, g.turns(), turns.back.data,
                      out + at + p * out_step, out_step);
      if (p < pixels)
        taps_block<1>(t, at + p * step, step, w, g.turns(), turns.back.data,
                      out + at + p * out_step, out_step);
    }
  }

  // All nine taps, stride 1: row[k] is the first column of kernel row k, `columns` floats from one
  // column of the kernel to the next, which is also the distance of the outputs.
  void rows(const float* const* row, i64 pixels, i64 columns, float* out) const {
    for (i64 v = 0; v < g.vectors; ++v) {
      const float* const w = weights.data + v * g.turns() * 9 * L;
      const i64 at = v * g.real;
      i64 p = 0;
      for (; p + 8 <= pixels; p += 8)
        rows_block<8>(row, at + p * columns, columns, w, g.turns(), turns.back.data,
                      out + at + p * columns, columns);
      if (p + 4 <= pixels) {
        rows_block<4>(row, at + p * columns, columns, w, g.turns(), turns.back.data,
                      out + at + p * columns, columns);
        p += 4;
      }
      for (; p < pixels; ++p)
        rows_block<1>(row, at + p * columns, columns, w, g.turns(), turns.back.data,
                      out + at + p * columns, columns);
    }
  }

 private:
  void wide_taps(const Taps& t, i64 pixels, i64 step, float* out, i64 out_step) const {
    const i64 width = g.vectors * L;
    for (i64 group = 0; group < g.number; ++group) {
      const float *a[9], *b[9];
      for (i64 i = 0; i < t.count; ++i) {
        a[i] = t.x[i] + group * g.each;
        b[i] = weights.data + (group * 9 + t.which[i]) * g.each * width;
      }
      // What the last vector writes beyond the group is overwritten by the next one, or is padding.
      multiply({a, b, t.count, g.each, step, 1, width, out + group * g.each, out_step, false},
               pixels, width);
    }
  }
};

// Adds a line's share to the gradient of the weights, packed as for the convolution. x[k]: the
// first input of kernel row k; `columns` floats from one column of the kernel to the next, `step`
// from the input of one output to the next; dy: gradients of the outputs.
template <int P>
FASTKD_INLINE void weigh_pixels(const float* const* x, i64 columns, i64 step, const float* dy,
                                i64 pitch, bool turned, IF order, VF* sums) {
  VF d[P];
  for (int p = 0; p < P; ++p) {
    d[p] = load(dy + p * pitch);
    if (turned) d[p] = permute(d[p], order);
  }
  for (int k = 0; k < 3; ++k)
    for (int column = 0; column < 3; ++column)
      for (int p = 0; p < P; ++p)
        sums[k * 3 + column] =
            fma(d[p], load(x[k] + column * columns + p * step), sums[k * 3 + column]);
}

void weigh_line(const Groups& g, const Turns& turns, const float* const* x, i64 columns, i64 step,
                const float* dy, i64 pixels, float* gradient) {
  if (g.wide) {
    const i64 width = g.vectors * L;
    for (i64 group = 0; group < g.number; ++group)
      for (i64 tap = 0; tap < 9; ++tap) {
        const float* const a = x[tap / 3] + tap % 3 * columns + group * g.each;
        const float* const b = dy + group * g.each;
        float* const out = gradient + (group * 9 + tap) * g.each * width;
        multiply({&a, &b, 1, pixels, 1, step, g.pitch, out, width, true}, g.each, width);
      }
    return;
  }
  for (i64 v = 0; v < g.vectors; ++v)
    for (i64 turn = 0; turn < g.turns(); ++turn) {
      const float* const row[3] = {x[0] + v * g.real, x[1] + v * g.real, x[2] + v * g.real};
      const float* const d = dy + v * g.real;
      float* const out = gradient + (v * g.turns() + turn) * 9 * L;
      const IF order = load_order(turns.ahead.data + turn * L);
      VF sums[9];
      clear<9>(sums);
      i64 p = 0;
      for (; p + 2 <= pixels; p += 2) {
        const float* const at[3] = {row[0] + p * step, row[1] + p * step, row[2] + p * step};
        weigh_pixels<2>(at, columns, step, d + p * g.pitch, g.pitch, turn != 0, order, sums);
      }
      if (p < pixels) {
        const float* const at[3] = {row[0] + p * step, row[1] + p * step, row[2] + p * step};
        weigh_pixels<1>(at, columns, step, d + p * g.pitch, g.pitch, turn != 0, order, sums);
      }
      for (int t = 0; t < 9; ++t) store(out + t * L, load(out + t * L) + sums[t]);
    }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
