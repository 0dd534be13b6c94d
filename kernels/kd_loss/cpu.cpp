// Fused temperature-KL + cross entropy and its gradient for the CPU; the formulas are in README.md.
//
// Two kernels over the same primitives. `row_kernel`: classes contiguous, lanes run over classes.
// `tile_kernel`: lanes run over rows (pixels), for dense logits [N, C, H, W] and for few classes.
// Both read the logits once from memory, keep the exponentials in scratch and write the gradient
// once. Per-row results depend neither on the number of threads nor on how rows are shared out.

#include "entry.h"
#include "rows.h"
#include "runtime.h"
#include "tile.h"

#include <cstdlib>

namespace fastkd {
namespace FASTKD_ISA {
namespace {

template <class T>
void work(void* context) {
  Job<T>& j = *static_cast<Job<T>*>(context);
  const bool tiles = j.unit_rows > 1;
  T* scratch = static_cast<T*>(fastkd::scratch(tiles ? tile_scratch<T>(j.a) : row_scratch<T>(j.a)));
  if (scratch == nullptr) {
    __atomic_store_n(&j.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (;;) {
    const std::int64_t chunk = __atomic_fetch_add(&j.next, 1, __ATOMIC_RELAXED);
    const std::int64_t begin = chunk * j.units_per_chunk;
    if (begin >= j.units) return;
    const std::int64_t end = begin + j.units_per_chunk < j.units ? begin + j.units_per_chunk : j.units;
    double total[2] = {0, 0};
    for (std::int64_t u = begin; u < end; ++u) {
      if (tiles) tile_kernel(j, u, scratch, total);
      else row_kernel(j, u, scratch, total);
    }
    j.partial[2 * chunk] = total[0];
    j.partial[2 * chunk + 1] = total[1];
  }
}

// Counts the rows that are neither ignored nor masked. 0: all their labels are in range. r + 1: the
// label of row r is not.
std::int64_t check_labels(const KdLossArgs& a, std::int64_t* counting) {
  *counting = a.rows;
  if (a.label_kind != kHardLabels && a.mask == nullptr) return 0;
  *counting = 0;
  for (std::int64_t r = 0; r < a.rows; ++r) {
    if (!counts(a, r)) continue;
    ++*counting;
    if (a.label_kind != kHardLabels) continue;
    const std::int64_t label = hard_label(a, r);
    if (label < 0 || label >= a.classes) return r + 1;
  }
  return 0;
}

// 0: done. r + 1: the label of row r is out of range. -1: out of memory.
template <class T>
std::int64_t run(const KdLossArgs& a) {
  std::int64_t counting;
  if (const std::int64_t wrong = check_labels(a, &counting)) return wrong;
  const double divisor = a.average != 0 && counting > 0 ? static_cast<double>(counting) : 1.0;
  Job<T> j(a, divisor);
  if (a.inner > 1 || a.tile != 0) {
    j.unit_rows = kTileRows;
    const std::int64_t per_sample = a.inner > 1 ? a.inner : a.rows;
    j.units = a.rows / (per_sample > 0 ? per_sample : 1) * ((per_sample + kTileRows - 1) / kTileRows);
  }
  const std::int64_t unit = j.unit_rows * a.classes;
  j.units_per_chunk = unit < kChunk ? kChunk / unit : 1;
  const std::int64_t chunks = (j.units + j.units_per_chunk - 1) / j.units_per_chunk;
  j.partial = static_cast<double*>(std::malloc(sizeof(double) * 2 * (chunks > 0 ? chunks : 1)));
  if (j.partial == nullptr) return -1;
  fastkd::parallel(a.threads < chunks ? a.threads : chunks, work<T>, &j);
  double kd = 0, ce = 0;
  for (std::int64_t c = 0; c < chunks; ++c) {
    kd += j.partial[2 * c];
    ce += j.partial[2 * c + 1];
  }
  // A term that is not wanted must not contribute 0 * inf.
  const double loss = (j.kd ? j.kd_scale * kd : 0) + (j.ce ? j.ce_scale * ce : 0);
  put<T>(a.loss, 0, loss);
  put<T>(a.divisor, 0, divisor);
  std::free(j.partial);
  return j.failed != 0 ? -1 : 0;
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd

FASTKD_ENTRY(kd_loss, fastkd::KdLossArgs) {
  const bool wide = a->student_type == fastkd::kFloat64 ||
                    (a->num_teachers > 0 && a->teacher_type == fastkd::kFloat64);
  return wide ? fastkd::FASTKD_ISA::run<double>(*a) : fastkd::FASTKD_ISA::run<float>(*a);
}
