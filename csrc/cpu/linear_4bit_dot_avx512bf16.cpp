// y = x W' for few rows: lanes run along k, W is decoded in registers and used by all rows of a tile of x.
#include "cpu/linear_4bit_bf16.h"

namespace peft_kernels {
namespace {

constexpr int kMaxRows = 8;
// Rows of W that the prefetch runs ahead. Into L2: the misses that L1 can have in flight are too few for the memory's
// latency (M = 1 at 4096 x 4096 on Zen 4: 0.27 ms, into L1 0.35).
constexpr int64_t kAhead = 16;

// 64-element blocks per pass over a tile of `rows` of x: they take at most 32 KB of L1, and 16 KB where passes are
// many. Without it x streams from L2: M = 16 takes 6 % longer at K = 4096. For few rows W is read along its rows as far
// as that goes, as the prefetchers like it: 64 blocks rather than 32 save a tenth of M = 4.
constexpr int64_t chunk_blocks(int rows) { return rows > 4 ? 128 / rows : 256 / rows; }

// Columns that a pass over a chunk of K takes. Their sums lie across lanes, 64 bytes each, in L1 beside the tile of x:
// 8 rows x 48 columns would take 24 of its 32 KB.
constexpr int64_t pass_columns(int rows) { return rows > 4 ? 16 : kLinear4DotLanes; }

struct DotTile {
  const uint16_t* x;  // rows in nibble order, ldx apart
  int64_t ldx;
  const uint8_t* packed;  // first row of W
  const float* scales;    // a row of W apart: ld_scales
  int64_t K, ld_scales, blocks;
  float* partial;  // [MR][pass_columns(MR)][16]: sums that still lie across lanes
  bool add;        // to what partial holds
};

// `groups` of NR columns. The decode of the block that comes next, here or in the next group, is spread between the
// products of a block. Zen 4 issues the decode beside vdpbf16ps only if they alternate in program order: 8 rows x 2
// columns take 36 cycles per block so, 39 when each group of 16 blocks begins with a decode, and 34 is what the
// multiplier pipes need.
template <int MR, int NR>
inline void dot_tiles(DotTile tile, int64_t groups, const CodeBook& book) {
  constexpr int kGroups = 2 * MR, kSteps = 3 * NR;
  constexpr int64_t kColumns = pass_columns(MR);
  if (groups == 0) return;
  const __m512 code = _mm512_loadu_ps(book.code);
  const uint8_t* packed = tile.packed;
  const float* scales = tile.scales;
  const int64_t row_bytes = tile.K / 2;
  Pair512 w[NR];
#pragma GCC unroll 8
  for (int n = 0; n < NR; ++n)
    w[n] = decode64(bf16_table(code, scales[n * tile.ld_scales]), load64(packed + n * row_bytes));
  for (; groups > 0; --groups, tile.partial += NR * 16) {
    // From the last block to the first of the next group; the last group's is decoded again, for nothing.
    const int64_t columns = groups > 1 ? NR : 0;
    const int64_t packed_jump = columns * row_bytes - 32 * (tile.blocks - 1);
    const int64_t scales_jump = columns * tile.ld_scales - (tile.blocks - 1);
    __m512 acc[MR][NR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n)
        acc[i][n] = tile.add ? _mm512_load_ps(tile.partial + (i * kColumns + n) * 16) : _mm512_setzero_ps();
    const uint16_t* x = tile.x;
    for (int64_t b = 1; b <= tile.blocks; ++b, x += 64) {
      packed += b < tile.blocks ? 32 : packed_jump;
      scales += b < tile.blocks ? 1 : scales_jump;
      Pair512 next[NR];
      __m512i table[NR];
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        const int i = g % MR;
        const __m512bh v = (__m512bh)_mm512_loadu_si512(x + i * tile.ldx + (g < MR ? 0 : 32));
#pragma GCC unroll 8
        for (int n = 0; n < NR; ++n)
          acc[i][n] = _mm512_dpbf16_ps(acc[i][n], v, (__m512bh)(g < MR ? w[n].first : w[n].second));
#pragma GCC unroll 32
        for (int s = g * kSteps / kGroups; s < (g + 1) * kSteps / kGroups; ++s) {
          const int n = s % NR;
          if (s < NR) {
            _mm_prefetch((const char*)packed + (n + kAhead) * row_bytes, _MM_HINT_T1);
            table[n] = bf16_table(code, scales[n * tile.ld_scales]);
          } else if (s < 2 * NR) {
            next[n].first = decode64_first(table[n], load64(packed + n * row_bytes));
          } else {
            next[n].second = decode64_second(table[n], load64(packed + n * row_bytes));
          }
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) w[n] = next[n];
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) _mm512_store_ps(tile.partial + (i * kColumns + n) * 16, acc[i][n]);
  }
}

// Sums of 16 vectors, as the 16 lanes of one.
inline __m512 reduce16(const float* partial) {
  __m512 v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_ps(partial + 16 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const int to = i == 2 ? 0 : i, a = i == 2 ? 0 : 2 * i, b = a + 1;
    v[to] = _mm512_add_ps(_mm512_shuffle_f32x4(v[a], v[b], 0x88), _mm512_shuffle_f32x4(v[a], v[b], 0xdd));
  }
  return v[0];
}

template <int MR, int NR>
void dot_block(const Linear4Job& job, const uint16_t* x, int64_t ldx, int64_t m, int64_t n0, int64_t count,
               const float* scales, float* partial, const float* terms) {
  const Weight4& w = *job.weight;
  const int64_t blocks = w.K / 64, row_bytes = w.K / 2;
  constexpr int64_t kColumns = pass_columns(MR);
  alignas(64) float sums[MR][kLinear4Lanes];
  for (int64_t from = 0; from < count; from += kColumns) {
    const int64_t columns = min64(kColumns, count - from), whole = columns / NR * NR;
    for (int64_t b = 0; b < blocks; b += chunk_blocks(MR)) {
      DotTile tile = {x + 64 * b, ldx,    w.packed + (n0 + from) * row_bytes + 32 * b, scales + from * blocks + b,
                      w.K,        blocks, min64(chunk_blocks(MR), blocks - b),         partial,
                      b > 0};
      dot_tiles<MR, NR>(tile, whole / NR, w.book());
      tile.packed += whole * row_bytes;
      tile.scales += whole * blocks;
      tile.partial += whole * 16;
      dot_tiles<MR, 1>(tile, columns - whole, w.book());
    }
    for (int i = 0; i < MR; ++i)
      for (int64_t g = 0; g < columns; g += 16)  // columns past `count` are stale and not stored
        _mm512_store_ps(sums[i] + from + g, reduce16(partial + (i * kColumns + g) * 16));
  }
  finish(job, {sums[0], m, n0, count, terms}, MR);
}

using DotBlock = void (*)(const Linear4Job&, const uint16_t*, int64_t, int64_t, int64_t, int64_t, const float*, float*,
                          const float*);
constexpr DotBlock kDotBlocks[kMaxRows] = {dot_block<1, 6>, dot_block<2, 4>, dot_block<3, 4>, dot_block<4, 3>,
                                           dot_block<5, 2>, dot_block<6, 2>, dot_block<7, 2>, dot_block<8, 2>};

// Element 4 j + t of each 64 moves to 16 t + j, the order that decode64 gives W.
void to_nibble_order(const uint16_t* from, int64_t K, uint16_t* to) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                                      1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61};
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(2));
  for (int64_t k = 0; k < K; k += 64) {
    const __m512i a = _mm512_loadu_si512(from + k), b = _mm512_loadu_si512(from + k + 32);
    _mm512_storeu_si512(to + k, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(to + k + 32, _mm512_permutex2var_epi16(a, second, b));
  }
}

// Rows of x alternate between the halves of L1's sets.
int64_t input_ld(int64_t K) { return (K + 2047) / 2048 * 2048 + 1024; }

}  // namespace

const uint16_t* linear4_dot_input_avx512bf16(const Linear4Job& job) {
  const int64_t K = job.weight->K, ldx = input_ld(K);
  uint16_t* x = (uint16_t*)linear4_scratch(Linear4Scratch::Input, size_t(job.M) * ldx * 2);
  for (int64_t m = 0; m < job.M; ++m) to_nibble_order((const uint16_t*)job.in + m * job.ld_in, K, x + m * ldx);
  return x;
}

void linear4_dot_avx512bf16(const Linear4Job& job, const uint16_t* x, int64_t n0, int64_t n1) {
  const Weight4& w = *job.weight;
  const int64_t blocks = w.K / 64, ldx = input_ld(w.K);
  float* scales = (float*)linear4_scratch(Linear4Scratch::Panel, size_t(kLinear4DotLanes) * blocks * sizeof(float));
  float* partial = (float*)linear4_scratch(Linear4Scratch::Sums, kMaxRows * kLinear4DotLanes * 16 * sizeof(float));
  const int64_t tiles = (job.M + kMaxRows - 1) / kMaxRows;
  for (int64_t n = n0; n < n1; n += kLinear4DotLanes) {
    const int64_t count = min64(kLinear4DotLanes, n1 - n);
    block_scales(w, n * blocks, count * blocks, scales);
    const float* terms = pack_terms(job, n, w.N, true);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = job.M * t / tiles, rows = job.M * (t + 1) / tiles - m;
      kDotBlocks[rows - 1](job, x + m * ldx, ldx, m, n, count, scales, partial, terms);
    }
  }
}

}  // namespace peft_kernels
