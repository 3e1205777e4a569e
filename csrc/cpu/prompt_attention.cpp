#include "cpu/prompt_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/lora_kernels.h"
#include "cpu/prompt_attention_kernels.h"
#include "cpu/threads.h"

namespace peft_kernels {
namespace {

// A thread more for each 25 us of work at 100 GFLOP/s.
constexpr int64_t kFlopsPerThread = 2'500'000;
// What packing an element of a prompt costs, in FLOPs that fit into the same time.
constexpr int64_t kPackFlops = 64;
// Up to this many queries of a prompt head read the prompt in place. Not in float32, where a backward pass would see
// that its scores, from packed products, round differently.
constexpr int64_t kDirectRows = 8;
// Queries are cut for parallel sums of the prompts' gradients by the shape alone, into this many pieces at most.
constexpr int64_t kMostPieces = 64;

const PromptKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::Avx512Bf16:
      return kPromptAvx512Bf16;
    case Isa::Avx512:
      return kPromptAvx512;
    case Isa::Avx2:
      return kPromptAvx2;
    case Isa::Scalar:
      break;
  }
#endif
  return kPromptScalar;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("prompt_attention: " + message);
}

void* at(const Heads& t, DType dtype, int64_t b, int64_t h, int64_t l) {
  return t.data ? (char*)t.data + (b * t.stride_b + h * t.stride_h + l * t.stride_l) * dtype_size(dtype) : nullptr;
}

// The problem in the kernels' terms: prompt heads, each with the rows (queries) that attend to it, cut into pieces of
// blocks. A piece is one thread's work.
struct Plan {
  PromptShape shape;
  PromptSizes sizes;
  PromptPasses passes;
  int64_t groups, heads, rows, blocks, pieces, piece_blocks;

  explicit Plan(const PromptShape& s) : shape(s) {
    require(s.B > 0 && s.H > 0 && s.Hkv > 0 && s.L > 0 && s.D > 0 && s.P > 0, "expected positive sizes");
    require(s.H % s.Hkv == 0, "Hkv must divide H");
    const PromptKernels& kernel = kernels();
    const bool pairs = s.dtype == DType::BF16 && kernel.bf16.forward;
    passes = pairs ? kernel.bf16 : kernel.float32;
    const int64_t step = pairs ? 2 : 1;
    sizes = {s.D, s.P, round_up(s.D, kLanes * step), round_up(s.P, kLanes), step};
    groups = s.H / s.Hkv;
    heads = s.per_sample ? s.B * s.Hkv : s.Hkv;
    rows = (s.per_sample ? 1 : s.B) * groups * s.L;
    blocks = ceil_div(rows, kBlockRows);
    piece_blocks = ceil_div(blocks, std::clamp<int64_t>(kMostPieces / heads, 1, blocks));
    pieces = ceil_div(blocks, piece_blocks);
  }

  int64_t panel_units() const { return sizes.Dp * sizes.Pp / sizes.step; }
  int threads(int64_t products) const {
    const int64_t of_rows = 2 * products * rows / sizes.step, of_packing = kPackFlops * pieces;
    return threads_for(heads * sizes.Pp * sizes.Dp * (of_rows + of_packing), kFlopsPerThread);
  }
  // Generous for any cut of a block's scratch in prompt_attention_tiles.h.
  int64_t block_floats() const { return kBlockRows * (sizes.Pp + sizes.Dp) * 6; }

  // Calls f(block, i, b, h, l) for row i of each block of a piece, then g(block).
  template <class F, class G>
  void for_blocks(int64_t head, int64_t piece, F&& f, G&& g) const {
    for (int64_t n = piece * piece_blocks; n < std::min(blocks, (piece + 1) * piece_blocks); ++n) {
      QueryBlock block;
      const int64_t first = n * kBlockRows;
      block.rows = std::min(kBlockRows, rows - first);
      int64_t most = 1;
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = first + i, b = shape.per_sample ? head / shape.Hkv : row / (groups * shape.L);
        const int64_t h = head % shape.Hkv * groups + row / shape.L % groups, l = row % shape.L;
        block.seen[i] = shape.causal ? std::min(shape.P, l + 1) : shape.P;
        most = std::max(most, block.seen[i]);
        f(block, i, b, h, l);
      }
      block.columns = round_up(most, kLanes);
      g(block);
    }
  }

  void* row(const Heads& prompt, int64_t head, int64_t p = 0) const {
    return at(prompt, shape.prompt_dtype, shape.per_sample ? head / shape.Hkv : 0, head % shape.Hkv, p);
  }

  // Panels of a prompt head in this thread's scratch, those that `wanted` marks: kt, vt, kn, vn.
  PromptPanels pack(const Heads& prompt_k, const Heads& prompt_v, int64_t head, const bool (&wanted)[4]) const {
    const int64_t units = panel_units();
    uint32_t* next = (uint32_t*)lora_scratch(1, size_t(5 * units) * sizeof(uint32_t));
    uint32_t* panel[4];
    for (int i = 0; i < 4; ++i) panel[i] = wanted[i] ? next + (i + 1) * units : nullptr;
    const PromptPanels panels = {panel[0], panel[1], panel[2], panel[3]};
    passes.pack(sizes, row(prompt_k, head), prompt_k.stride_l, row(prompt_v, head), prompt_v.stride_l,
                shape.prompt_dtype, panels, next);
    return panels;
  }

  // dprompts = sums, [2][Pp][Dp].
  void store(const float* sums, int64_t head, const Heads& dprompt_k, const Heads& dprompt_v) const {
    for (int which = 0; which < 2; ++which, sums += sizes.Pp * sizes.Dp)
      for (int64_t p = 0; p < shape.P; ++p) {
        void* to = row(which ? dprompt_v : dprompt_k, head, p);
        for (int64_t d = 0; d < shape.D; ++d) store_f32(to, d, shape.prompt_dtype, sums[p * sizes.Dp + d]);
      }
  }
};

}  // namespace

void prompt_attention_forward(const PromptShape& shape, const Heads& q, const Heads& prompt_k, const Heads& prompt_v,
                              const Heads& base, float* lse, const float* gate, const Heads& out) {
  const Plan plan(shape);
  require(q.data && prompt_k.data && prompt_v.data && lse && out.data, "null argument");
  require(base.data || !gate, "a gated prompt needs the attention that it adds to");
  const Options options = {shape.dtype, shape.scale, gate != nullptr, false};
  const bool direct = plan.rows <= kDirectRows && shape.dtype != DType::F32;
  const int threads = plan.threads(2);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < plan.heads * plan.pieces; ++item) {
    const int64_t head = item / plan.pieces;
    const PromptPanels panels =
        direct ? PromptPanels{} : plan.pack(prompt_k, prompt_v, head, {true, false, false, true});
    const int64_t floats = direct ? plan.sizes.Pp + 2 * plan.sizes.Dp + 64 : plan.block_floats();
    void* scratch = lora_scratch(2, size_t(floats) * sizeof(float));
    plan.for_blocks(
        head, item % plan.pieces,
        [&](QueryBlock& block, int64_t i, int64_t b, int64_t h, int64_t l) {
          block.q[i] = at(q, shape.dtype, b, h, l);
          block.in[i] = at(base, shape.dtype, b, h, l);
          block.to[i] = at(out, shape.dtype, b, h, l);
          block.lse[i] = lse + (b * shape.H + h) * shape.L + l;
          block.gate[i] = gate ? gate[h] : 1.0f;
        },
        [&](const QueryBlock& block) {
          if (!direct) return plan.passes.forward(plan.sizes, panels, block, options, scratch);
          plan.passes.direct(plan.sizes, plan.row(prompt_k, head), prompt_k.stride_l, plan.row(prompt_v, head),
                             prompt_v.stride_l, shape.prompt_dtype, block, options, scratch);
        });
  }
}

void prompt_attention_backward(const PromptShape& shape, const Heads& dy, const Heads& q, const Heads& prompt_k,
                               const Heads& prompt_v, const Heads& out, const float* lse, const float* gate,
                               const Heads& dq, bool add_dq, const Heads& dprompt_k, const Heads& dprompt_v,
                               float* dgate) {
  const Plan plan(shape);
  require(q.data && dy.data && prompt_k.data && prompt_v.data && lse && (gate || out.data), "null argument");
  require(!dprompt_k.data == !dprompt_v.data, "expected the gradients of both prompts or of none");
  require(gate || !dgate, "a gradient of the gate needs the gate");
  const Options options = {shape.dtype, shape.scale, gate != nullptr, add_dq};
  const bool sums_wanted = dprompt_k.data, whole = plan.pieces == 1;
  const int64_t area = 2 * plan.sizes.Dp * plan.sizes.Pp, items = plan.heads * plan.pieces;
  const int64_t shared = sums_wanted && !whole ? items * area : 0, deltas = gate ? shape.B * shape.H * shape.L : 0;
  float* partial = (float*)lora_scratch(0, size_t(shared + deltas) * sizeof(float));
  float* delta = partial + shared;
  const int threads = plan.threads(5);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t head = item / plan.pieces;
      const PromptPanels panels = plan.pack(prompt_k, prompt_v, head, {true, true, dq.data != nullptr, false});
      float* scratch = (float*)lora_scratch(2, size_t(plan.block_floats() + area) * sizeof(float));
      float* sums = whole ? scratch + plan.block_floats() : partial + item * area;
      if (sums_wanted) std::fill_n(sums, area, 0.0f);
      plan.for_blocks(
          head, item % plan.pieces,
          [&](QueryBlock& block, int64_t i, int64_t b, int64_t h, int64_t l) {
            const int64_t index = (b * shape.H + h) * shape.L + l;
            block.q[i] = at(q, shape.dtype, b, h, l);
            block.dy[i] = at(dy, shape.dtype, b, h, l);
            block.in[i] = at(out, shape.dtype, b, h, l);
            block.to[i] = at(dq, shape.dtype, b, h, l);
            block.lse[i] = const_cast<float*>(lse) + index;
            block.delta[i] = gate ? delta + index : nullptr;
            block.gate[i] = gate ? gate[h] : 1.0f;
          },
          [&](const QueryBlock& block) {
            plan.passes.backward(plan.sizes, panels, block, options, sums_wanted ? sums : nullptr,
                                 sums_wanted ? sums + area / 2 : nullptr, scratch);
          });
      if (sums_wanted && whole) plan.store(sums, head, dprompt_k, dprompt_v);
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < (sums_wanted && !whole ? plan.heads : 0); ++head) {
      float* total = partial + head * plan.pieces * area;
      for (int64_t piece = 1; piece < plan.pieces; ++piece)
        for (int64_t i = 0; i < area; ++i) total[i] += total[piece * area + i];
      plan.store(total, head, dprompt_k, dprompt_v);
    }
  }
  for (int64_t h = 0; h < (dgate ? shape.H : 0); ++h) {
    double sum = 0;
    for (int64_t b = 0; b < shape.B; ++b)
      for (int64_t l = 0; l < shape.L; ++l) sum += delta[(b * shape.H + h) * shape.L + l];
    dgate[h] = float(sum);
  }
}

}  // namespace peft_kernels
