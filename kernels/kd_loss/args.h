// The one argument of the C entry points of kd_loss; cpu.py packs it field by field in this order.
#pragma once

#include <cstdint>

namespace fastkd {

enum LabelKind : std::int64_t { kNoLabels = 0, kHardLabels = 1, kSoftLabels = 2 };

// "T" is double if student or teacher is, else float. Row r of the student is the class vector that
// starts at sample r / inner, position r % inner; its classes lie `inner` elements apart.
struct KdLossArgs {
  const void* student;
  const void* teacher[4];
  const void* labels;          // int64 [rows], or T laid out as rows (soft), or null
  const void* weight;          // T [rows] or null
  const std::uint8_t* mask;    // [rows] or null; 0 drops the row
  const void* upstream_kd;     // T: incoming gradient of the per-row losses, null for 1
  const void* upstream_ce;
  void* kd;                    // T [rows] or null
  void* ce;                    // T [rows] or null
  void* agree;                 // T [rows] or null
  void* grad;                  // student's storage type, contiguous, or null
  void* loss;                  // T: sum of kd_scale*kd + ce_scale*ce, or null
  void* divisor;               // T: rows that count, at least 1; or null
  std::int64_t rows;
  std::int64_t classes;
  std::int64_t inner;          // 1: classes are contiguous
  std::int64_t student_stride; // elements from one sample to the next
  std::int64_t teacher_stride[4];
  std::int64_t student_type;
  std::int64_t teacher_type;
  std::int64_t label_kind;
  std::int64_t teachers;       // 0 to 4
  std::int64_t ignore_index;
  std::int64_t threads;
  std::int64_t average;        // 1: both scales are divided by the number of rows that count
  std::int64_t tile;           // 1: the tile kernel although inner == 1
  std::int64_t upstream_kd_step;  // 1: one per row, 0: one for all
  std::int64_t upstream_ce_step;
  double temperature;
  double smoothing;
  double kd_scale;             // factor of the KL gradient beside the upstream one
  double ce_scale;
};

}  // namespace fastkd
