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

// How a call is cut: registers hold x, so K is split where it does not fit.
struct Plan {
  int splits, k_per_split, windows;
};

int groups_of(int64_t M) { return M <= 8 ? 1 : 2; }

Plan make_plan(int64_t M, int64_t K) {
  const int64_t windows = (K + kWindow - 1) / kWindow, most = kWarps * most_windows(groups_of(M));
  const int64_t splits = (windows + most - 1) / most, each = (windows + splits - 1) / splits;
  return {int((windows + each - 1) / each), int(each * kWindow), int((each + kWarps - 1) / kWarps)};
}

template <typename T, bool NESTED>
auto* choose_kernel(int64_t M) {
  return groups_of(M) == 1 ? linear_4bit_kernel<T, 1, NESTED> : linear_4bit_kernel<T, 2, NESTED>;
}

// Whether code for this device has an instruction to wait with for a kernel that it overlaps; once for each kernel and
// device, it may also have all the shared memory that it needs.
template <typename Kernel>
bool prepare(Kernel* kernel, int device, int shared) {
  struct Prepared {
    void* kernel;
    int device;
    bool overlaps;
  };
  thread_local std::vector<Prepared> prepared;
  for (const Prepared& other : prepared)
    if (other.kernel == reinterpret_cast<void*>(kernel) && other.device == device) return other.overlaps;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  cudaFuncAttributes compiled;
  check_cuda(cudaFuncGetAttributes(&compiled, kernel), "linear_4bit");
  prepared.push_back({reinterpret_cast<void*>(kernel), device, compiled.binaryVersion >= 90});
  return prepared.back().overlaps;
}

template <typename T>
void run(int device, uintptr_t stream, const Linear4& call, const Plan& plan) {
  auto* kernel = call.weight.absmax2 ? choose_kernel<T, true>(call.M) : choose_kernel<T, false>(call.M);
  const int shared = shared_bytes(groups_of(call.M));
  const bool can_overlap = prepare(kernel, device, shared);
  const int64_t tiles = (call.N + kTileRows - 1) / kTileRows;
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t columns = multiprocessors / plan.splits > 0 ? multiprocessors / plan.splits : 1;
  const dim3 grid(unsigned(tiles < columns ? tiles : columns), unsigned(plan.splits));
  launch(kernel, grid, kWarp * kWarps, size_t(shared), stream, can_overlap && call.extras.s, call);
  if (plan.splits > 1) {
    const int64_t outputs = call.M * call.N;
    launch(sum_planes_kernel<T>, dim3(unsigned((outputs + 255) / 256)), 256, 0, stream, can_overlap, call, plan.splits);
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
    status = cudaFuncGetAttributes(&compiled, linear_4bit_kernel<__nv_bfloat16, 2, true>);
  }
  if (status == cudaSuccess) {
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (most < shared_bytes(2))
      return "a block has " + std::to_string(most) + " bytes of shared memory, not " + std::to_string(shared_bytes(2));
  } else {
    cudaGetLastError();  // told; the next call is not to find it
  }
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

std::vector<float> decode_table(QuantType quant_type, DType dtype) {
  const DecodeTable table = make_decode_table(quant_type, dtype);
  std::vector<float> values;
  for (const uint16_t bits : table.values)
    values.push_back(dtype == DType::BF16 ? bf16_to_f32(bits) : f16_to_f32(bits));
  values.push_back(table.unit);
  return values;
}

int64_t linear_4bit_splits(int64_t M, int64_t K) { return make_plan(M, K).splits; }

void linear_4bit_decode(int device, uintptr_t stream, const void* x, DType dtype, int64_t M, int64_t ldx,
                        const Weight4& weight, const void* bias, DType bias_dtype, const float* s, const void* b,
                        DType b_dtype, int64_t rank, float scaling, void* y, float* planes) {
  const std::string reason = linear_4bit_unsupported(weight);
  require(reason.empty(), "the weight cannot be served: " + reason);
  require(dtype == DType::F16 || dtype == DType::BF16, "x must be float16 or bfloat16");
  require(M >= 1 && M <= kMostRows, "M must be 1 to 16, got " + std::to_string(M));
  require(ldx >= weight.K && ldx % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0,
          "the rows of x must start at multiples of 16 bytes");
  require(x && y && (!s || (b && rank >= 1)), "a pointer is null");
  if (weight.N == 0) return;
  const DeviceGuard guard(device);
  const Plan plan = make_plan(M, weight.K);
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
                        plan.windows,
                        log2_exact(weight.blocksize / 64),
                        weight.absmax2 ? log2_exact(weight.nested_blocksize) : 0};
  if (dtype == DType::F16) {
    run<__half>(device, stream, call, plan);
  } else {
    run<__nv_bfloat16>(device, stream, call, plan);
  }
}

}  // namespace peft_kernels
