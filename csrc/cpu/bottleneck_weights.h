// Weights into panels, and what of them the layer norm needs.
#pragma once

#include "cpu/bottleneck_pack.h"

namespace peft_kernels {
namespace {

// Which part of the packing an item is: a chunk of a reduce panel (64 lanes by kChunkUnits), a tile of the expand
// panels, or sixteen sums over a row of Wd.
struct PackItem {
  enum Kind { Reduce, Expand, Sums } kind;
  int64_t lane, begin;  // of the hidden; a unit of the reduced index, or a column of the expanded one

  template <class U>
  static PackItem of(const BottleneckJob& job, int64_t item, int64_t reduced, int64_t expanded) {
    const int64_t chunks = (units_of<U>(reduced) + kChunkUnits - 1) / kChunkUnits;
    const int64_t groups = (job.rank_lanes + kPanelLanes - 1) / kPanelLanes;
    const int64_t tiles = (expanded + kPanelLanes - 1) / kPanelLanes;
    if (item < chunks * groups) return {Reduce, item % groups * kPanelLanes, item / groups * kChunkUnits};
    item -= chunks * groups;
    if (item < tiles) return {Expand, 0, item * kPanelLanes};
    return {Sums, (item - tiles) * kVec, 0};
  }
};

template <class U>
int64_t pack_items(int64_t rank_lanes, int64_t reduced, int64_t expanded) {
  const int64_t chunks = (units_of<U>(reduced) + kChunkUnits - 1) / kChunkUnits;
  return chunks * ((rank_lanes + kPanelLanes - 1) / kPanelLanes) + (expanded + kPanelLanes - 1) / kPanelLanes +
         rank_lanes / kVec;
}

// hidden_bias = bd + Wd b and, with layer norm, the sums over k of Wd w as it is multiplied, for sixteen ranks: four at
// a time, so that no addition waits for the one before it.
template <class U>
void hidden_sums(const BottleneckJob& job, int64_t j0) {
  const Adapter& adapter = job.adapter;
  const Matrix& down = adapter.down;
  for (int64_t j = j0; j < j0 + kVec; ++j) job.hidden_bias[j] = job.hidden_sum[j] = 0;
  for (int64_t j = j0; j < min64(j0 + kVec, adapter.r); j += 4) {
    const int64_t ranks = min64(4, adapter.r - j);
    Vec bias[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()}, sum[4] = {bias[0], bias[0], bias[0], bias[0]};
    for (int64_t k = 0; job.ln_weight && k < adapter.K; k += kVec) {
      const int64_t count = adapter.K - k;
      const Vec scale = vec_load(job.ln_weight, DType::F32, k, count);
      const Vec shift = job.ln_bias ? vec_load(job.ln_bias, DType::F32, k, count) : vec_zero();
      for (int64_t i = 0; i < ranks; ++i) {
        const Vec w = vec_load(down.data, down.dtype, (j + i) * down.ld + k, count);
        bias[i] = multiply_add(w, shift, bias[i]);
        sum[i] = sum[i] + U::rounded(w * scale);
      }
    }
    for (int64_t i = 0; i < ranks; ++i) {
      job.hidden_bias[j + i] = vec_sum(bias[i]) + (job.down_bias ? job.down_bias[j + i] : 0.0f);
      job.hidden_sum[j + i] = vec_sum(sum[i]);
    }
  }
}

template <class U>
void pack_forward(const BottleneckJob& job, int64_t item) {
  const Adapter& adapter = job.adapter;
  const PackItem part = PackItem::of<U>(job, item, adapter.K, adapter.N);
  const int64_t units = units_of<U>(adapter.K);
  if (part.kind == PackItem::Sums) return hidden_sums<U>(job, part.lane);
  if (part.kind == PackItem::Reduce) {
    const int64_t W = min64(kPanelLanes, job.rank_lanes - part.lane), k = part.begin * U::kElements;
    return pack_lanes_from_rows<U>({adapter.down, nullptr, nullptr, job.ln_weight, {}}, part.lane,
                                   min64(W, adapter.r - part.lane), k, min64(kChunkUnits * U::kElements, adapter.K - k),
                                   W, job.reduce + part.lane * units + part.begin * W);
  }
  const int64_t n0 = part.begin, lanes = min64(kPanelLanes, adapter.N - n0);
  pack_lanes_from_rows<U>({adapter.up, nullptr, nullptr, nullptr, {}}, n0, lanes, 0, adapter.r, kPanelLanes,
                          job.expand + n0 * units_of<U>(adapter.r));
  for (int64_t n = n0; n < n0 + kPanelLanes; ++n) {
    const float scale = n >= adapter.N ? 0.0f : adapter.scaling * (job.channel ? job.channel[n] : 1.0f);
    job.column_scale[n] = scale;
    job.column_bias[n] = n < adapter.N && job.up_bias ? scale * job.up_bias[n] : 0.0f;
  }
}

template <class U>
void pack_backward(const BottleneckJob& job, int64_t item) {
  const Adapter& adapter = job.adapter;
  const PackItem part = PackItem::of<U>(job, item, adapter.N, adapter.K);
  if (part.kind == PackItem::Sums) return hidden_sums<U>(job, part.lane);
  if (part.kind == PackItem::Reduce) {
    const int64_t W = min64(kPanelLanes, job.rank_lanes - part.lane), n = part.begin * U::kElements;
    const int64_t rows = min64(kChunkUnits * U::kElements, adapter.N - n);
    for (int64_t i = n; job.gate_bias && i < n + rows; ++i)
      job.gate_bias[i] = job.up_bias[i] * (job.channel ? job.channel[i] : 1.0f);
    return pack_lanes_from_columns<U>({adapter.up, nullptr, job.channel, nullptr, {}}, n, rows, part.lane,
                                      min64(W, adapter.r - part.lane), W,
                                      job.reduce + part.lane * units_of<U>(adapter.N) + part.begin * W);
  }
  const int64_t k0 = part.begin;
  pack_lanes_from_columns<U>({adapter.down, nullptr, nullptr, job.ln_weight, {}}, 0, adapter.r, k0,
                             min64(kPanelLanes, adapter.K - k0), kPanelLanes, job.expand + k0 * units_of<U>(adapter.r));
}

}  // namespace
}  // namespace peft_kernels
