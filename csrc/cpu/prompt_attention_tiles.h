// The prompt attention kernels over sixteen-lane vectors, for the instruction set of the including file.
#pragma once

#include <cmath>

#include "cpu/prompt_attention_kernels.h"
#include "cpu/prompt_attention_units.h"

namespace peft_kernels {
namespace {

// Accumulators of a product's tile, as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVectors = 1;
#else
constexpr int kTileRows = 2, kTileVectors = 1;
#endif

// c[kTileRows][16 * VECTORS] (+)= a b over K units; a is [row * row_stride + k * k_stride], b and c are row-major.
template <class Unit, int VECTORS>
inline void product_tile(const uint32_t* a, int64_t row_stride, int64_t k_stride, const uint32_t* b, int64_t ldb,
                         int64_t K, float* c, int64_t ldc, bool add) {
  Vec sums[kTileRows][VECTORS];
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = vec_zero();
  for (int64_t k = 0; k < K; ++k, a += k_stride, b += ldb) {
    typename Unit::Vector columns[VECTORS];
    for (int j = 0; j < VECTORS; ++j) columns[j] = Unit::load(b + kLanes * j);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const typename Unit::Vector value = Unit::broadcast(a + i * row_stride);
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = Unit::multiply(value, columns[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * ldc + kLanes * j;
      // added last: a sum over all queries is a chain of block sums rather than one of single products
      vec_store(to, add ? sums[i][j] + vec_load(to) : sums[i][j]);
    }
}

// c[M][N] (+)= a b; N is a multiple of kLanes, M is rounded up to kTileRows.
template <class Unit>
void product(const uint32_t* a, int64_t row_stride, int64_t k_stride, const uint32_t* b, int64_t ldb, int64_t M,
             int64_t N, int64_t K, float* c, bool add) {
  for (int64_t n = 0; n < N;) {
    const int64_t vectors = (N - n) / kLanes;
    const int width = vectors >= kTileVectors ? kTileVectors : int(vectors);
    for (int64_t m = 0; m < M; m += kTileRows) {
      const uint32_t* rows = a + m * row_stride;
      float* to = c + m * N + n;
      if (width == 1)
        product_tile<Unit, 1>(rows, row_stride, k_stride, b + n, ldb, K, to, N, add);
      else if (width == 2)
        product_tile < Unit, kTileVectors<2 ? kTileVectors : 2>(rows, row_stride, k_stride, b + n, ldb, K, to, N, add);
      else
        product_tile<Unit, kTileVectors>(rows, row_stride, k_stride, b + n, ldb, K, to, N, add);
    }
    n += width * kLanes;
  }
}

// How the scratch of a block is cut.
struct Cutter {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* taken = (T*)at;
    at += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
};

template <class Unit>
void pack(const PromptSizes& s, const void* k, int64_t ldk, const void* v, int64_t ldv, DType dtype,
          const PromptPanels& panels, void* scratch) {
  const int64_t width = s.Dp / s.step;
  uint32_t* rows = (uint32_t*)scratch;  // [Pp][width]
  for (int which = 0; which < 2; ++which) {
    uint32_t *transposed = which ? panels.vt : panels.kt, *natural = which ? panels.vn : panels.kn;
    if (!transposed && !natural) continue;
    for (int64_t p = 0; p < s.Pp; ++p)
      Unit::load_row(which ? v : k, dtype, p * (which ? ldv : ldk), p < s.P ? s.D : 0, width, rows + p * width);
    if (transposed) transpose(rows, s.Pp, width, transposed);
    if (natural && Unit::along_rows(rows, s.Pp, s.Dp, natural) == rows)
      std::memcpy(natural, rows, size_t(s.Pp * width) * sizeof *rows);
  }
}

// Scores of the block's queries, scaled; those that a query does not see are -inf.
template <class Unit>
void scores_of(const PromptSizes& s, const PromptPanels& panels, const QueryBlock& block, const uint32_t* q,
               float scale, float* scores) {
  const int64_t width = s.Dp / s.step;
  product<Unit>(q, width, 1, panels.kt, s.Pp, block.rows, block.columns, width, scores, false);
  for (int64_t i = 0; i < block.rows; ++i)
    for (int64_t p = 0; p < block.columns; p += kLanes) {
      float* at = scores + i * block.columns + p;
      const Vec scaled = vec_load(at) * vec_set(scale);
      vec_store(at, p + kLanes <= block.seen[i] ? scaled : vec_first(scaled, block.seen[i] - p, -INFINITY));
    }
}

// Weights of one row of scores, not yet divided by their sum; returns that and the largest score.
template <class Unit>
inline void exponentials(const float* scores, int64_t columns, uint32_t* weights, float* sum, float* largest) {
  Vec most = vec_load(scores), sums = vec_zero();
  for (int64_t p = kLanes; p < columns; p += kLanes) most = vec_larger(vec_load(scores + p), most);
  *largest = vec_max(most);
  for (int64_t p = 0; p < columns; p += kLanes) {
    const Vec weight = exponential(vec_load(scores + p) - vec_set(*largest));
    sums = sums + weight;
    Unit::store(weights + p / Unit::kStep, weight);
  }
  *sum = vec_sum(sums);
}

// out and lse of a row from the prompt's part: its weighted values, not yet divided by the weights' sum.
inline void merge(const PromptSizes& s, const QueryBlock& block, int64_t i, const Options& options,
                  const float* prompted, float sum, float largest) {
  float lse = largest + std::log(sum), of_input = 1.0f, of_prompt = (options.gated ? block.gate[i] : 1.0f) / sum;
  if (!options.gated && block.in[i]) {
    const float other = *block.lse[i], most = other > lse ? other : lse;
    const float merged = most + std::log(std::exp(other - most) + std::exp(lse - most));
    of_input = std::exp(other - merged), of_prompt *= std::exp(lse - merged);
    lse = merged;
  }
  *block.lse[i] = lse;
  for (int64_t d = 0; d < s.D; d += kLanes) {
    const int64_t n = s.D - d;
    Vec merged = vec_load(prompted + d) * vec_set(of_prompt);
    if (block.in[i]) {
      const Vec input = vec_load(block.in[i], options.dtype, d, n);
      merged = multiply_add(input, vec_set(of_input), merged);
      if (options.gated && block.gate[i] == 0) merged = input;  // its signed zeros too
    }
    vec_store(block.to[i], options.dtype, d, merged, n);
  }
}

template <class Unit>
void forward(const PromptSizes& s, const PromptPanels& panels, const QueryBlock& block, const Options& options,
             void* scratch) {
  const int64_t width = s.Dp / s.step, keys = block.columns / s.step;
  Cutter cut{(char*)scratch};
  uint32_t* q = cut.take<uint32_t>(kBlockRows * width);
  float* scores = cut.take<float>(kBlockRows * block.columns);
  uint32_t* weights = cut.take<uint32_t>(kBlockRows * keys);
  float* prompted = cut.take<float>(kBlockRows * s.Dp);
  for (int64_t i = 0; i < block.rows; ++i) Unit::load_row(block.q[i], options.dtype, 0, s.D, width, q + i * width);
  scores_of<Unit>(s, panels, block, q, options.scale, scores);
  float sum[kBlockRows], largest[kBlockRows];
  for (int64_t i = 0; i < block.rows; ++i)
    exponentials<Unit>(scores + i * block.columns, block.columns, weights + i * keys, &sum[i], &largest[i]);
  product<Unit>(weights, keys, 1, panels.vn, s.Dp, block.rows, s.Dp, keys, prompted, false);
  for (int64_t i = 0; i < block.rows; ++i) merge(s, block, i, options, prompted + i * s.Dp, sum[i], largest[i]);
}

void direct(const PromptSizes& s, const void* k, int64_t ldk, const void* v, int64_t ldv, DType prompt_dtype,
            const QueryBlock& block, const Options& options, void* scratch) {
  Cutter cut{(char*)scratch};
  float *q = cut.take<float>(s.Dp), *scores = cut.take<float>(block.columns), *prompted = cut.take<float>(s.Dp);
  for (int64_t i = 0; i < block.rows; ++i) {
    Float32Unit::load_row(block.q[i], options.dtype, 0, s.D, s.Dp, (uint32_t*)q);
    for (int64_t p = 0; p < block.columns; ++p) {
      Vec sums = vec_zero();
      for (int64_t d = 0; d < s.D && p < block.seen[i]; d += kLanes)
        sums = multiply_add(vec_load(q + d), vec_load(k, prompt_dtype, p * ldk + d, s.D - d), sums);
      scores[p] = p < block.seen[i] ? vec_sum(sums) * options.scale : -INFINITY;
    }
    float sum, largest;
    exponentials<Float32Unit>(scores, block.columns, (uint32_t*)scores, &sum, &largest);
    for (int64_t d = 0; d < s.D; d += kLanes) {
      Vec sums = vec_zero();
      for (int64_t p = 0; p < block.seen[i]; ++p)
        sums = multiply_add(vec_load(v, prompt_dtype, p * ldv + d, s.D - d), vec_set(scores[p]), sums);
      vec_store(prompted + d, sums);
    }
    merge(s, block, i, options, prompted, sum, largest);
  }
}

// Rows of P and of dS from rows of scores and of dP; delta is sum(dP * P), or null to find it and leave it in delta_to.
template <class Unit>
inline void score_gradients(float* scores, const float* dweights, int64_t columns, float lse, const float* delta,
                            float gate, float scale, float* delta_to, uint32_t* weights, uint32_t* dscores) {
  Vec sums = vec_zero();
  for (int64_t p = 0; p < columns; p += kLanes) {
    const Vec weight = exponential(vec_load(scores + p) - vec_set(lse));
    vec_store(scores + p, weight);
    sums = multiply_add(weight, vec_load(dweights + p), sums);
  }
  if (delta_to) *delta_to = vec_sum(sums);
  const Vec mean = vec_set(delta_to ? *delta_to : *delta);
  for (int64_t p = 0; p < columns; p += kLanes) {
    const Vec weight = vec_load(scores + p) * vec_set(gate);
    Unit::store(weights + p / Unit::kStep, weight);
    Unit::store(dscores + p / Unit::kStep, weight * (vec_load(dweights + p) - mean) * vec_set(scale));
  }
}

inline float dot(const void* x, const void* y, DType dtype, int64_t n) {
  Vec sums = vec_zero();
  for (int64_t d = 0; d < n; d += kLanes) {
    const int64_t count = n - d;
    sums = multiply_add(vec_load(x, dtype, d, count), vec_load(y, dtype, d, count), sums);
  }
  return vec_sum(sums);
}

template <class Unit>
void backward(const PromptSizes& s, const PromptPanels& panels, const QueryBlock& block, const Options& options,
              float* dk, float* dv, void* scratch) {
  const int64_t width = s.Dp / s.step, columns = block.columns, keys = columns / s.step, units = kBlockRows / s.step;
  const DType dtype = options.dtype;
  Cutter cut{(char*)scratch};
  uint32_t *q = cut.take<uint32_t>(kBlockRows * width), *dy = cut.take<uint32_t>(kBlockRows * width);
  float *scores = cut.take<float>(kBlockRows * columns), *dweights = cut.take<float>(kBlockRows * columns);
  uint32_t *weights = cut.take<uint32_t>(kBlockRows * keys), *dscores = cut.take<uint32_t>(kBlockRows * keys);
  float* dq = cut.take<float>(kBlockRows * s.Dp);
  uint32_t *left = cut.take<uint32_t>(units * columns), *right = cut.take<uint32_t>(units * s.Dp);
  for (int64_t i = 0; i < kBlockRows; ++i) {  // rows past the last are zero: they add nothing to sums over the rows
    const bool inside = i < block.rows;
    Unit::load_row(inside ? block.q[i] : nullptr, dtype, 0, inside ? s.D : 0, width, q + i * width);
    Unit::load_row(inside ? block.dy[i] : nullptr, dtype, 0, inside ? s.D : 0, width, dy + i * width);
    if (inside) continue;
    std::memset(weights + i * keys, 0, size_t(keys) * sizeof *weights);
    std::memset(dscores + i * keys, 0, size_t(keys) * sizeof *dscores);
  }
  scores_of<Unit>(s, panels, block, q, options.scale, scores);
  product<Unit>(dy, width, 1, panels.vt, s.Pp, block.rows, columns, width, dweights, false);
  for (int64_t i = 0; i < block.rows; ++i) {
    const float delta = options.gated ? 0.0f : dot(block.dy[i], block.in[i], dtype, s.D);
    score_gradients<Unit>(scores + i * columns, dweights + i * columns, columns, *block.lse[i], &delta,
                          options.gated ? block.gate[i] : 1.0f, options.scale, block.delta[i], weights + i * keys,
                          dscores + i * keys);
  }
  if (panels.kn) {
    product<Unit>(dscores, keys, 1, panels.kn, s.Dp, block.rows, s.Dp, keys, dq, false);
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t d = 0; d < s.D; d += kLanes) {
        const int64_t n = s.D - d;
        Vec value = vec_load(dq + i * s.Dp + d);
        if (options.add_dq) value = value + vec_load(block.to[i], dtype, d, n);
        vec_store(block.to[i], dtype, d, value, n);
      }
  }
  if (!dk) return;
  product<Unit>(Unit::along_rows(dscores, kBlockRows, columns, left), 1, columns,
                Unit::along_rows(q, kBlockRows, s.Dp, right), s.Dp, columns, s.Dp, units, dk, true);
  product<Unit>(Unit::along_rows(weights, kBlockRows, columns, left), 1, columns,
                Unit::along_rows(dy, kBlockRows, s.Dp, right), s.Dp, columns, s.Dp, units, dv, true);
}

}  // namespace
}  // namespace peft_kernels
