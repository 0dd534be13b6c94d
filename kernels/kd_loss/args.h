// The one argument of the C entry point of kd_loss. `_ARGUMENTS` in cpu.py has the same fields in the
// same order: first the inputs in the order of `Inputs` (inputs.py), then the rest.
#pragma once

#include <cstdint>

namespace fastkd {

enum LabelKind : std::int64_t { kNoLabels = 0, kHardLabels = 1, kSoftLabels = 2 };
constexpr int kMaxTeachers = 4;

// "T" is double if student or teacher is, else float. Row r of the student is the class vector that
// starts at sample r / inner, position r % inner; its classes lie `inner` elements apart.
struct KdLossArgs {
  const void* student;
  const void* teacher[kMaxTeachers];
  const void* labels;  // int64 [rows], or T laid out as rows (soft), or null
  double temperature;
  double label_smoothing;
  std::int64_t ignore_index;
  const void* weights;       // T [rows] or null
  const std::uint8_t* mask;  // [rows] or null; 0 drops the row

  // Factors of the gradient.
  const void* upstream_kd;         // T: incoming gradient of the per-row losses, null for 1
  const void* upstream_ce;
  std::int64_t upstream_kd_step;   // 1: one per row, 0: one for all
  std::int64_t upstream_ce_step;
  double kd_scale;                 // further factor of the gradient of kd
  double ce_scale;

  // Outputs; null where not wanted.
  void* kd;       // T [rows]
  void* ce;       // T [rows]
  void* agree;    // T [rows]
  void* grad;     // student's storage type, contiguous
  void* loss;     // T: sum of kd_scale * kd + ce_scale * ce
  void* divisor;  // T: rows that count, at least 1
  std::int64_t average;  // 1: both scales are divided by the number of rows that count

  std::int64_t rows;
  std::int64_t classes;
  std::int64_t inner;           // 1: classes are contiguous
  std::int64_t student_stride;  // elements from one sample to the next
  std::int64_t teacher_stride[kMaxTeachers];
  std::int64_t student_type;    // Storage
  std::int64_t teacher_type;
  std::int64_t label_kind;      // LabelKind
  std::int64_t num_teachers;
  std::int64_t tile;            // 1: the tile kernel although inner == 1
  std::int64_t threads;
};

}  // namespace fastkd
