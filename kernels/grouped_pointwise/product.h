// Small matrix products on scratch lines, with the result in registers.
#pragma once

#include "lines.h"

namespace fastkd {
namespace FASTKD_ISA {
namespace {

// Rows of the result that are in registers at a time, two vectors wide.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif

// out[i, :] = or += the sum over terms t and k < depth of a[t][i * row + k * step] * b[t][k * ldb +
// :].
struct Product {
  const float* const* a;
  const float* const* b;
  i64 terms, depth, row, step, ldb;
  float* out;
  i64 ldo;
  bool accumulate;
};

// Products that are added up before their sum goes to the total: long fp32 sums lose digits.
constexpr i64 kRun = 64;

// sums += the products of `count` columns of a and rows of b, from where both point on.
template <int R, int V>
FASTKD_INLINE void add_run(const float* a, i64 row, i64 step, const float* b, i64 ldb, i64 count,
                           VF (&sums)[R][V]) {
  for (i64 k = 0; k < count; ++k, a += step, b += ldb) {
    VF right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + v * L);
    for (int r = 0; r < R; ++r) {
      const VF number = splat(a[r * row]);
      for (int v = 0; v < V; ++v) sums[r][v] = fma(number, right[v], sums[r][v]);
    }
  }
}

template <int R, int V>
FASTKD_INLINE void store_tile(const Product& q, float* out, const VF (&sums)[R][V]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* const at = out + r * q.ldo + v * L;
      store(at, q.accumulate ? load(at) + sums[r][v] : sums[r][v]);
    }
}

// A product of one run.
template <int R, int V>
void product_tile_short(const Product& q, i64 first, i64 column) {
  VF sums[R][V];
  clear<R * V>(&sums[0][0]);
  add_run(q.a[0] + first * q.row, q.row, q.step, q.b[0] + column, q.ldb, q.depth, sums);
  store_tile(q, q.out + first * q.ldo + column, sums);
}

// Of several; `total` stays in memory and is touched once a run.
template <int R, int V>
void product_tile_long(const Product& q, i64 first, i64 column) {
  VF total[R][V], sums[R][V];
  clear<R * V>(&total[0][0]);
  clear<R * V>(&sums[0][0]);
  i64 left = kRun;  // of the run
  for (i64 t = 0; t < q.terms; ++t) {
    const float* a = q.a[t] + first * q.row;
    const float* b = q.b[t] + column;
    for (i64 done = 0; done < q.depth;) {
      const i64 count = least(left, q.depth - done);
      add_run(a, q.row, q.step, b, q.ldb, count, sums);
      a += count * q.step;
      b += count * q.ldb;
      done += count;
      left -= count;
      const bool last = t + 1 == q.terms && done == q.depth;
      if (left > 0 && !last) continue;
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) total[r][v] += sums[r][v];
      clear<R * V>(&sums[0][0]);
      left = kRun;
    }
  }
  store_tile(q, q.out + first * q.ldo + column, total);
}

template <int R, int V, bool Short>
void product_rows(const Product& q, i64 first, i64 rows, i64 column) {
  if constexpr (R > 0) {
    if (rows != R)
      product_rows<R - 1, V, Short>(q, first, rows, column);
    else if constexpr (Short)
      product_tile_short<R, V>(q, first, column);
    else
      product_tile_long<R, V>(q, first, column);
  }
}

// All rows, in tiles of nearly equal height: a tile of one row waits for its own sums.
template <int V>
void product_column(const Product& q, i64 rows, i64 column) {
  const bool is_short = q.terms == 1 && q.depth <= kRun;
  const i64 tiles = (rows + kRows - 1) / kRows;
  for (i64 tile = 0; tile < tiles; ++tile) {
    const i64 first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;
    if (is_short)
      product_rows<kRows, V, true>(q, first, count, column);
    else
      product_rows<kRows, V, false>(q, first, count, column);
  }
}

// `columns` is a multiple of the vector.
void multiply(const Product& q, i64 rows, i64 columns) {
  i64 column = 0;
  for (; column + 2 * L <= columns; column += 2 * L) product_column<2>(q, rows, column);
  if (column < columns) product_column<1>(q, rows, column);
}

// A matrix [depth][columns] for `multiply`, in panels of two vectors (the last of one, where one is
// enough), each [depth][width]. `down` and `across`: from one element of `matrix` to the next.
void pack_panels(const float* matrix, i64 down, i64 across, i64 depth, i64 columns, float* packed) {
  for (i64 first = 0; first < columns; first += 2 * L) {
    const i64 width = least(2 * L, round_up(columns - first, L));
    const i64 here = least(width, columns - first);
    // Reads run along the matrix.
    if (down == 1)
      for (i64 n = 0; n < here; ++n)
        for (i64 k = 0; k < depth; ++k) packed[k * width + n] = matrix[k + (first + n) * across];
    else
      for (i64 k = 0; k < depth; ++k)
        for (i64 n = 0; n < here; ++n)
          packed[k * width + n] = matrix[k * down + (first + n) * across];
    for (i64 k = 0; k < depth; ++k)
      for (i64 n = here; n < width; ++n) packed[k * width + n] = 0.0f;
    packed += depth * width;
  }
}

// out [rows][pitch] = a [rows][depth] * the packed matrix.
void multiply_packed(const float* a, i64 row, i64 rows, i64 depth, const float* packed, i64 columns,
                     float* out, i64 pitch) {
  for (i64 first = 0; first < columns; first += 2 * L) {
    const i64 width = least(2 * L, round_up(columns - first, L));
    const Product q{&a, &packed, 1, depth, row, 1, width, out + first, pitch, false};
    if (width == 2 * L)
      product_column<2>(q, rows, 0);
    else
      product_column<1>(q, rows, 0);
    packed += depth * width;
  }
}

}  // namespace
}  // namespace FASTKD_ISA
}  // namespace fastkd
