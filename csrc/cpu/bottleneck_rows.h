// A block of rows whose hidden stays in cache: its products with the panels of both weights.
#pragma once

#include "cpu/bottleneck_pack.h"
#include "cpu/bottleneck_tiles.h"

namespace peft_kernels {
namespace {

constexpr int64_t kPackedLd = kChunkUnits + 16;  // a power of two would put the rows of a tile in one set of L1

// A thread's memory for one block of rows.
template <class U>
struct RowBlock {
  int64_t m0, rows, lanes, ld_hidden;
  uint32_t *packed, *hidden;             // [rows][kPackedLd], [rows][ld_hidden] units
  float *sums, *value, *slope, *z;       // [rows][lanes], [lanes] each
  float c1[kBlockRows], c2[kBlockRows];  // of the layer norm's backward pass: dx = v / std + c1 + (x - mean) c2

  RowBlock(const BottleneckJob& job, int64_t from, int64_t to) : m0(from), rows(to - from), lanes(job.rank_lanes) {
    ld_hidden = lanes / U::kElements + 16;
    char* memory = (char*)bottleneck_scratch(1, size_t(kBlockRows * (kPackedLd + ld_hidden + lanes) + 3 * lanes) * 4);
    packed = (uint32_t*)memory;
    hidden = packed + kBlockRows * kPackedLd;
    sums = (float*)(hidden + kBlockRows * ld_hidden);
    value = sums + kBlockRows * lanes;
    slope = value + lanes;
    z = slope + lanes;
  }
};

// block.sums = rows of `from` times the panels that job.reduce holds.
template <class U>
void reduce(const BottleneckJob& job, const Source& from, int64_t length, RowBlock<U>& block) {
  const int64_t units = units_of<U>(length), size = dtype_size(from.matrix.dtype);
  const bool direct = plain(from) && from.matrix.dtype == U::kDtype && length % U::kElements == 0;
  // Units summed apart: a chunk of float32 in one chain errs up to twice as much as eager's product of a single row.
  const int64_t chain = from.matrix.dtype == DType::F32 ? 64 : kChunkUnits;
  for (int64_t u = 0; u < units; u += kChunkUnits) {
    const int64_t count = min64(kChunkUnits, units - u), k = u * U::kElements;
    const char* rows = (const char*)block.packed;
    if (direct)
      rows = (const char*)from.matrix.data + (block.m0 * from.matrix.ld + k) * size;
    else
      pack_rows<U>(from, block.m0, block.rows, k, min64(count * U::kElements, length - k), block.packed, kPackedLd);
    for (int64_t lane = 0; lane < block.lanes; lane += kPanelLanes) {
      const int64_t W = min64(kPanelLanes, block.lanes - lane);
      for (int64_t v = 0; v < count; v += chain)
        multiply_rows<U>(rows + v * 4, direct ? from.matrix.ld * size : kPackedLd * 4, block.rows,
                         job.reduce + lane * units + (u + v) * W, min64(chain, count - v), W, block.sums + lane,
                         block.lanes, u + v > 0);
    }
  }
}

// The block's hidden times job.expand, tile by tile: for a whole tile that `direct` says finish can take from
// registers, finish.whole(registers, row, column) after a product with finish.ahead(row, column), else
// finish.part(sums, row, rows, column).
template <class U, class Finish>
void expand(const BottleneckJob& job, int64_t width, const RowBlock<U>& block, bool direct, const Finish& finish) {
  const int64_t units = units_of<U>(job.adapter.r);
  alignas(64) float sums[kTileRows * kPanelLanes];
  direct = direct && kVecRegisters == 32 && units <= kChunkUnits;
  for (int64_t i = 0; i < block.rows; i += kTileRows) {
    const int64_t count = min64(kTileRows, block.rows - i);
    const char* hidden = (const char*)(block.hidden + i * block.ld_hidden);
    for (int64_t n = 0; n < width; n += kPanelLanes) {
      const uint32_t* panel = job.expand + n * units;
      if (direct && count == kTileRows && n + kPanelLanes <= width) {
        multiply_tile<U, kTileRows, 4, kPanelLanes>(
            hidden, block.ld_hidden * 4, panel, units, [&](Vec(&acc)[kTileRows][4]) { finish.whole(acc, i, n); },
            finish.ahead(i, n));
        continue;
      }
      for (int64_t u = 0; u < units; u += kChunkUnits)
        multiply_rows<U>(hidden + u * 4, block.ld_hidden * 4, count, panel + u * kPanelLanes,
                         min64(kChunkUnits, units - u), kPanelLanes, sums, kPanelLanes, u > 0);
      finish.part(sums, i, count, n);
    }
  }
}

template <class U>
void store_hidden(RowBlock<U>& block, int64_t i, const float* values) {
  for (int64_t j = 0; j < block.lanes; j += kVec)
    vec_store(block.hidden + i * block.ld_hidden, U::kDtype, j, vec_load(values + j));
}

}  // namespace
}  // namespace peft_kernels
