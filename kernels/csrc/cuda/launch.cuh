// One way to launch: return codes checked, programmatic dependent launch where asked for and the device is a Hopper or newer.
#pragma once
#include <atomic>

#include "lut8_cuda.cuh"

namespace lut8 {

struct Device {
  int multiprocessors, major, shared_limit;
};

// What is asked of a device once; queried without synchronisation.
inline Device device_of(int index) {
  static std::atomic<int> known[64];
  static Device devices[64];
  Device d{};
  if (index >= 0 && index < 64 && known[index].load(std::memory_order_acquire) == 2) return devices[index];
  cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&d.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  int expected = 0;
  if (index >= 0 && index < 64 && known[index].compare_exchange_strong(expected, 1)) {
    devices[index] = d;
    known[index].store(2, std::memory_order_release);
  }
  return d;
}

template <class... Wanted, class... Given>
cudaError_t launch(void (*kernel)(Wanted...), dim3 grid, dim3 block, size_t shared, bool overlap, cudaStream_t stream, Given... given) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  const Device device = device_of(index);
  if (shared > static_cast<size_t>(device.shared_limit)) return cudaErrorInvalidConfiguration;
  if (shared > 40 * 1024) {  // more than 48 KB in all, what the kernels declare themselves included, must be asked for
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = overlap && device.major >= 9 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, Wanted(given)...);
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

}  // namespace lut8
