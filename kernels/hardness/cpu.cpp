// Scores of samples from their logits, and the order of scores, for the CPU; formulas in README.md.
//
// `score_rows`: one row at a time, lanes run over classes; the result of a row depends neither on the
// number of threads nor on how rows are shared out. `order`: a radix sort, stable, on one thread.
//
// Names: s student (or the one tensor of a criterion), t teacher, x logits minus the row maximum.

#include "entry.h"
#include "runtime.h"
#include "softmax.h"

namespace fastkd {

// The places of `KINDS` in inputs.py.
enum Kind : std::int64_t { kKl = 0, kEntropy = 1, kCrossEntropy = 2, kMargin = 3 };

// The arguments of the two entry points; cpu.py has the same fields in the same order.
struct HardnessArgs {
  const void* logits;          // row r starts r * stride elements on, classes are contiguous
  const void* teacher;         // likewise; null without kKl
  const std::int64_t* labels;  // [rows], or null
  std::int64_t kind;
  double temperature;          // of kKl
  void* scores;                // [rows] of double if logits or teacher are, else of float
  std::int64_t rows;
  std::int64_t classes;
  std::int64_t stride;
  std::int64_t teacher_stride;
  std::int64_t type;           // Storage
  std::int64_t teacher_type;
  std::int64_t threads;
};

struct SelectArgs {
  const void* scores;     // [rows], double or float
  std::int64_t* index;    // [k]: the rows with the highest scores, highest first
  std::int64_t* num_nan;
  std::int64_t rows;
  std::int64_t k;
  std::int64_t wide;      // 1: double
};

namespace FASTKD_ISA {
namespace {

template <class T>
struct Job {
  const HardnessArgs& a;
  std::int64_t rows_per_chunk;
  std::int64_t padded;  // elements between the arrays of a row in scratch
  std::int64_t next;
  int failed;

  explicit Job(const HardnessArgs& args)
      : a(args),
        rows_per_chunk(args.classes < kChunk ? kChunk / args.classes : 1),
        padded((args.classes + 15) / 16 * 16 + 16),
        next(0),
        failed(0) {}
};

// Entropy of softmax(x) = log z - sum(e x) / z, which has no 0 log 0.
template <class T>
double entropy(const T* s, std::int64_t n, T top) {
  const V<T> m = splat(top), log2e = splat(static_cast<T>(1.4426950408889634));
  const T least = static_cast<T>(-INFINITY);
  double z = 0, dot = 0;
  for (std::int64_t b = 0; b < n; b += kBlock) {
    V<T> part_z{}, part_dot{};
    each_vector<T>(b, b + kBlock < n ? b + kBlock : n, [&](std::int64_t i, int count) {
      const V<T> x = floored<T>(at(s + i, count, least) - m);
      const V<T> e = exp2_of(x, log2e);
      part_z += e;
      part_dot = fma(e, x, part_dot);
    });
    z += lane_sum<T>(part_z);
    dot += lane_sum<T>(part_dot);
  }
  return std::log(z) - dot / z;
}

// max over c != y of x_c, minus x_y; NaN if any class is, which row_max alone would drop.
template <class T>
double margin(const T* s, std::int64_t n, std::int64_t y) {
  int nan = 0;
  for (std::int64_t i = 0; i < n; ++i) nan |= s[i] != s[i];
  if (nan != 0) return NAN;
  const T below = row_max(s, y), above = row_max(s + y + 1, n - y - 1);
  return static_cast<double>(below > above ? below : above) - s[y];
}

template <class T>
double kl(const T* s, const T* t, std::int64_t n, double temperature, T* es, T* et) {
  const T ms = row_max(s, n), mt = row_max(t, n);
  const T scale = static_cast<T>(1.4426950408889634 / temperature);
  const Sums z = exponentials<T, false>(s, t, n, ms, mt, scale, 0, es, et, nullptr);
  const double value = kl_of_row(s, t, n, ms, mt, z, 1 / temperature, es, et);
  // Only the floor that replaces a logit of minus infinity can give so much.
  return value > 1e25 ? INFINITY : value;
}

template <class T>
double score(const Job<T>& j, std::int64_t r, T* scratch) {
  const HardnessArgs& a = j.a;
  const std::int64_t n = a.classes;
  const T* s = fetch(a.logits, a.type, r * a.stride, n, scratch);
  if (a.kind == kKl) {
    const T* t = fetch(a.teacher, a.teacher_type, r * a.teacher_stride, n, scratch + j.padded);
    return kl(s, t, n, a.temperature, scratch + 2 * j.padded, scratch + 3 * j.padded);
  }
  if (a.kind == kEntropy) return entropy(s, n, row_max(s, n));
  const std::int64_t y = a.labels[r];
  if (y < 0 || y >= n) return NAN;
  if (a.kind == kMargin) return margin(s, n, y);
  const T top = row_max(s, n), log2e = static_cast<T>(1.4426950408889634);
  const double z = exp_row(s, n, top, log2e, scratch + 2 * j.padded);
  return std::log(z) - (static_cast<double>(s[y]) - top);
}

template <class T>
void score_rows(void* context) {
  Job<T>& j = *static_cast<Job<T>*>(context);
  T* scratch = static_cast<T*>(fastkd::scratch(4 * j.padded * sizeof(T)));
  if (scratch == nullptr) {
    __atomic_store_n(&j.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (;;) {
    const std::int64_t begin = __atomic_fetch_add(&j.next, 1, __ATOMIC_RELAXED) * j.rows_per_chunk;
    if (begin >= j.a.rows) return;
    const std::int64_t end = begin + j.rows_per_chunk < j.a.rows ? begin + j.rows_per_chunk : j.a.rows;
    for (std::int64_t r = begin; r < end; ++r)
      static_cast<T*>(j.a.scores)[r] = static_cast<T>(score(j, r, scratch));
  }
}

template <class T>
std::int64_t hardness(const HardnessArgs& a) {
  Job<T> j(a);
  const std::int64_t chunks = (a.rows + j.rows_per_chunk - 1) / j.rows_per_chunk;
  fastkd::parallel(a.threads < chunks ? a.threads : chunks, score_rows<T>, &j);
  return j.failed != 0 ? -1 : 0;
}

// An unsigned number that grows as the score falls; the largest is NaN's.
template <class T, class U>
U key_of(T score) {
  if (score != score) return ~static_cast<U>(0);
  score += 0;  // minus zero and zero are a tie
  const U sign = static_cast<U>(1) << (8 * sizeof(U) - 1);
  U bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  return (bits & sign) != 0 ? bits : ~(bits | sign);
}

template <class U>
struct Entry {
  U key;
  std::int64_t row;
};

template <class T, class U>
std::int64_t order(const SelectArgs& a) {
  const std::int64_t n = a.rows;
  Entry<U>* from = static_cast<Entry<U>*>(fastkd::scratch((2 * n + 1) * sizeof(Entry<U>)));
  if (from == nullptr) return -1;
  Entry<U>* to = from + n;
  *a.num_nan = 0;
  for (std::int64_t r = 0; r < n; ++r) {
    from[r] = {key_of<T, U>(static_cast<const T*>(a.scores)[r]), r};
    *a.num_nan += from[r].key == ~static_cast<U>(0);
  }
  // Least significant byte first; each pass keeps the order of equal bytes, so ties stay in row order.
  for (unsigned shift = 0; shift < 8 * sizeof(U); shift += 8) {
    std::int64_t place[257] = {};
    for (std::int64_t r = 0; r < n; ++r) ++place[(from[r].key >> shift & 255) + 1];
    for (int b = 0; b < 256; ++b) place[b + 1] += place[b];
    for (std::int64_t r = 0; r < n; ++r) to[place[from[r].key >> shift & 255]++] = from[r];
    Entry<U>* sorted = to;
    to = from;
    from = sorted;
  }
  for (std::int64_t i = 0; i < a.k; ++i) a.index[i] = from[i].row;
  return 0;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd

// Both return 0, or -1 if there is no memory for the scratch.
FASTKD_ENTRY(hardness, fastkd::HardnessArgs) {
  const bool wide = a->type == fastkd::kFloat64 ||
                    (a->teacher != nullptr && a->teacher_type == fastkd::kFloat64);
  return wide ? fastkd::FASTKD_ISA::hardness<double>(*a) : fastkd::FASTKD_ISA::hardness<float>(*a);
}

FASTKD_ENTRY(select_hardest, fastkd::SelectArgs) {
  return a->wide != 0 ? fastkd::FASTKD_ISA::order<double, std::uint64_t>(*a)
                      : fastkd::FASTKD_ISA::order<float, std::uint32_t>(*a);
}
