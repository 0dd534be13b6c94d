// What Python passes to the stages of grouped_pointwise: one struct for all of them (_BLOCK in
// cpu.py); a stage reads the fields that it needs, the others are null or 0.
#pragma once

#include <cstdint>

namespace fastkd {

// A batch norm with known statistics and the activation behind it. mean == nullptr: no norm.
struct BlockNorm {
  const float *mean, *var, *weight, *bias;
  double eps;
  std::int64_t act;  // 0 none, 1 ReLU, 2 ReLU6
};

// The norm behind a stage's output; out == nullptr: none.
struct BlockAfter {
  const void* out;
  const float *mean, *var, *weight, *mean_sums;
  double eps;
};

// Activations are [samples, height, width, channels] in `type`; everything else is fp32.
struct BlockArgs {
  const void* g;
  BlockAfter after;
  const void* x;
  BlockNorm norm;
  const float *weight, *bias;
  BlockNorm norm1;
  const float *weight1, *bias1;
  BlockNorm norm2;
  const void* residual;
  void* y;  // what the stage writes: its output, or the gradient at its input
  float *mean, *var, *sums, *dweight, *dbias;
  std::int64_t type, samples, channels, height, width, out_channels, out_height, out_width;
  std::int64_t stride, padding, dilation, groups, activate_sum, threads;
};

}  // namespace fastkd
