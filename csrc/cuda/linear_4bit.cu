// Few rows of x times a 4-bit weight: bound by the weight's bytes if nothing else takes longer.
//
// A warp multiplies 16 rows of W with all rows of x on the tensor cores, whatever their number: on the other units one
// row of x alone would cost a conversion and a product for each weight, more than the whole decode does.
#include "cuda/linear_4bit.cuh"
#include "cuda/linear_4bit.h"

namespace peft_kernels {
namespace {

int log2_exact(int64_t value) {
  int shift = 0;
  while (int64_t(1) << shift < value) ++shift;
  return int64_t(1) << shift == value ? shift : -1;
}

// How a call is cut: shared memory holds x, so K is split where that does not fit.
struct Plan {
  int splits, blocks_per_multiprocessor, k_per_split;
  size_t shared;
};

Plan make_plan(int device, int64_t M, int64_t K, bool table) {
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int64_t windows = (K + kWindow - 1) / kWindow;
  for (int64_t splits = 1;; ++splits) {
    const int64_t each = (windows + splits - 1) / splits, shared = shared_bytes(M, each * kWindow, table);
    if (shared > most && each > 1) continue;
    const int64_t resident = all / (shared + 1024);  // the driver keeps 1 KiB of each block's
    return {int((windows + each - 1) / each), int(resident < 2 ? 1 : most_resident(M)), int(each * kWindow),
            size_t(shared)};
  }
}

template <typename T, bool NESTED, bool TABLE>
auto* choose_kernel(int M) {
  if (M <= 4) return linear_4bit_kernel<T, 128, 1, NESTED, TABLE>;
  return M <= 8 ? linear_4bit_kernel<T, 64, 1, NESTED, TABLE> : linear_4bit_kernel<T, 64, 2, NESTED, TABLE>;
}

template <typename T>
auto* choose_kernel(int M, bool nested, bool table) {
  if (nested) return table ? choose_kernel<T, true, true>(M) : choose_kernel<T, true, false>(M);
  return table ? choose_kernel<T, false, true>(M) : choose_kernel<T, false, false>(M);
}

template <typename T>
void run(int device, uintptr_t stream, const Linear4& call, const Plan& plan, bool table) {
  auto* kernel = choose_kernel<T>(call.M, call.weight.absmax2 != nullptr, table);
  // always the most there is: another thread may launch the same kernel for another shape
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  const int64_t tiles = (call.N + kTileRows - 1) / kTileRows;
  const int64_t resident = device_attribute(cudaDevAttrMultiProcessorCount, device) * plan.blocks_per_multiprocessor;
  const int64_t columns = resident / plan.splits > 0 ? resident / plan.splits : 1;
  const dim3 grid(unsigned(tiles < columns ? tiles : columns), unsigned(plan.splits));
  bool overlaps = call.extras.s != nullptr;
  if (overlaps) {  // code for older devices has no instruction to wait with
    cudaFuncAttributes compiled;
    check_cuda(cudaFuncGetAttributes(&compiled, kernel), "linear_4bit");
    overlaps = compiled.binaryVersion >= 90;
  }
  launch(kernel, grid, kWarp * kWarps, plan.shared, stream, overlaps, call);
  if (plan.splits > 1) {
    const int64_t outputs = call.M * call.N;
    launch(sum_planes_kernel<T>, dim3(unsigned((outputs + 255) / 256)), 256, 0, stream, false, call, plan.splits);
  }
}

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("linear_4bit_decode: " + message);
}

}  // namespace

std::string linear_4bit_unsupported(const Weight4& weight) {
  if (weight.K < 64 || weight.K % 64)
    return "its in_features are " + std::to_string(weight.K) + ", not a multiple of 64";
  if (weight.blocksize < 64 || log2_exact(weight.blocksize) < 0)
    return "its blocksize is " + std::to_string(weight.blocksize) + ", not a power of two from 64 on";
  if (weight.absmax2 && log2_exact(weight.nested_blocksize) < 0) return "its nested blocksize is not a power of two";
  if (reinterpret_cast<uintptr_t>(weight.packed) % 16) return "its packed codes do not start at a multiple of 16 bytes";
  if (weight.N >= 1 << 30 || weight.K >= 1 << 30 || weight.numel() / 64 >= 1 << 30) return "it is too large";
  return "";
}

std::string device_unsupported(int device) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && device >= count) status = cudaErrorInvalidDevice;
  if (status == cudaSuccess) {
    const DeviceGuard guard(device);
    cudaFuncAttributes compiled;
    status = cudaFuncGetAttributes(&compiled, linear_4bit_kernel<__nv_bfloat16, 128, 1, true, true>);
  }
  if (status != cudaSuccess) cudaGetLastError();  // told; the next call is not to find it
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

std::vector<float> decode_table(QuantType quant_type, DType dtype) {
  const DecodeTable table = make_decode_table(quant_type, dtype);
  std::vector<float> values;
  for (int i = 0; i < 16; ++i) {
    const auto byte = [&](int plane) { return table.planes[plane][i / 4] >> 8 * (i % 4) & 0xff; };
    const uint16_t bits = uint16_t(byte(1) << 8 | byte(0));
    values.push_back(dtype == DType::BF16 ? bf16_to_f32(bits) : f16_to_f32(bits));
  }
  values.push_back(table.unit);
  return values;
}

int64_t linear_4bit_splits(int device, int64_t M, int64_t K, bool by_table) {
  return make_plan(device, M, K, by_table).splits;
}

void linear_4bit_decode(int device, uintptr_t stream, const void* x, DType dtype, int64_t M, int64_t ldx,
                        const Weight4& weight, const void* bias, DType bias_dtype, const float* s, const void* b,
                        DType b_dtype, int64_t rank, float scaling, void* y, float* planes, bool by_table) {
  const std::string reason = linear_4bit_unsupported(weight);
  require(reason.empty(), "the weight cannot be served: " + reason);
  require(dtype == DType::F16 || dtype == DType::BF16, "x must be float16 or bfloat16");
  require(M >= 1 && M <= kMostRows, "M must be 1 to 16, got " + std::to_string(M));
  require(ldx >= weight.K && ldx % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0,
          "the rows of x must start at multiples of 16 bytes");
  require(x && y && (!s || (b && rank >= 1)), "a pointer is null");
  if (weight.N == 0) return;
  const DeviceGuard guard(device);
  const Plan plan = make_plan(device, M, weight.K, by_table);
  require(plan.splits == 1 || planes, "planes is null, and K is split");
  const Linear4 call = {x,
                        weight,
                        make_decode_table(weight.quant_type, dtype),
                        {bias, bias_dtype, s, b, b_dtype, int(rank), scaling},
                        y,
                        plan.splits > 1 ? planes : nullptr,
                        ldx,
                        int(M),
                        int(weight.N),
                        plan.k_per_split,
                        log2_exact(weight.blocksize / 64),
                        weight.absmax2 ? log2_exact(weight.nested_blocksize) : 0};
  if (dtype == DType::F16) {
    run<__half>(device, stream, call, plan, by_table);
  } else {
    run<__nv_bfloat16>(device, stream, call, plan, by_table);
  }
}

}  // namespace peft_kernels
