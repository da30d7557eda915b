#include "driver.h"

#include <dlfcn.h>

#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "kernel.h"

namespace jf::driver {
namespace {

// Numbers of cuda.h.
constexpr int kVersionOfSymbols = 12000;
constexpr int kMultiprocessorCount = 16;
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;
constexpr int kMaxDynamicSharedBytes = 8;
constexpr int kL2Promotion128Bytes = 2;

using Handle = void*;

// X(member, name in libcuda, type)
#define JF_DRIVER_FUNCTIONS(X)                                                                                     \
  X(init, "cuInit", int(unsigned))                                                                                 \
  X(version, "cuDriverGetVersion", int(int*))                                                                      \
  X(error_name, "cuGetErrorName", int(int, const char**))                                                          \
  X(device_count, "cuDeviceGetCount", int(int*))                                                                   \
  X(device_get, "cuDeviceGet", int(int*, int))                                                                     \
  X(device_name, "cuDeviceGetName", int(char*, int, int))                                                          \
  X(device_attribute, "cuDeviceGetAttribute", int(int*, int, int))                                                 \
  X(library_load, "cuLibraryLoadData", int(Handle*, const void*, void*, void*, unsigned, void*, void*, unsigned))  \
  X(library_kernel, "cuLibraryGetKernel", int(Handle*, Handle, const char*))                                       \
  X(kernel_function, "cuKernelGetFunction", int(Handle*, Function))                                                \
  X(kernel_attribute, "cuKernelSetAttribute", int(int, int, Function, int))                                        \
  X(launch, "cuLaunchKernelEx", int(const LaunchConfig*, Function, const void* const*, void**))                    \
  X(zero, "cuMemsetD8Async", int(unsigned long long, unsigned char, size_t, Handle))                               \
  X(encode_tiled, "cuTensorMapEncodeTiled",                                                                        \
    int(TensorMap*, int, unsigned, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, \
        int, int, int))

struct Api {
#define X(member, name, ...) std::add_pointer_t<__VA_ARGS__> member;
  JF_DRIVER_FUNCTIONS(X)
#undef X
};

std::string ErrorName(const Api& api, int code) {
  const char* name = nullptr;
  api.error_name(code, &name);
  return std::string(name ? name : "unknown error") + " (" + std::to_string(code) + ")";
}

Api Load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Error(std::string("no NVIDIA driver: ") + dlerror());
  using GetProcAddress = int (*)(const char*, void**, int, uint64_t, int*);
  auto get = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  if (!get) throw Error("the NVIDIA driver is older than CUDA 12.0: update it");
  Api api;
  auto find = [&](const char* name) {
    void* symbol = nullptr;
    int status = 0;
    if (get(name, &symbol, kVersionOfSymbols, 0, &status) != 0 || !symbol) {
      throw Error(std::string("the NVIDIA driver has no ") + name + ": update it to CUDA 12.0 or newer");
    }
    return symbol;
  };
#define X(member, name, ...) api.member = reinterpret_cast<std::add_pointer_t<__VA_ARGS__>>(find(name));
  JF_DRIVER_FUNCTIONS(X)
#undef X
  if (int code = api.init(0)) throw Error("the NVIDIA driver does not start: " + ErrorName(api, code));
  return api;
}

const Api& Driver() {
  static const Api api = Load();  // a failed load throws again at the next call
  return api;
}

void Check(int code, const char* what) {
  if (code != 0) throw Error(std::string(what) + ": " + ErrorName(Driver(), code));
}

int Device(int index) {
  int device = 0;
  Check(Driver().device_get(&device, index), "cuDeviceGet");
  return device;
}

int DeviceAttribute(int index, int attribute) {
  int value = 0;
  Check(Driver().device_attribute(&value, attribute, Device(index)), "cuDeviceGetAttribute");
  return value;
}

}  // namespace

int Version() {
  int version = 0;
  Check(Driver().version(&version), "cuDriverGetVersion");
  return version;
}

int DeviceCount() {
  int count = 0;
  Check(Driver().device_count(&count), "cuDeviceGetCount");
  return count;
}

std::string DeviceName(int device) {
  char name[256] = "";
  Check(Driver().device_name(name, sizeof name, Device(device)), "cuDeviceGetName");
  return name;
}

int Arch(int device) {
  return 10 * DeviceAttribute(device, kCapabilityMajor) + DeviceAttribute(device, kCapabilityMinor);
}

int Multiprocessors(int device) { return DeviceAttribute(device, kMultiprocessorCount); }

Function LoadKernel(const std::string& cubin, const std::string& entry) {
  Handle library = nullptr, kernel = nullptr;
  Check(Driver().library_load(&library, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
  Check(Driver().library_kernel(&kernel, library, entry.c_str()), "cuLibraryGetKernel");
  return kernel;
}

void PrepareKernel(Function function, int device, size_t shared_bytes) {
  Handle loaded = nullptr;  // asking for it forces the load now, outside of any stream capture
  Check(Driver().kernel_function(&loaded, function), "cuKernelGetFunction");
  Check(Driver().kernel_attribute(kMaxDynamicSharedBytes, static_cast<int>(shared_bytes), function, Device(device)),
        "cuKernelSetAttribute");
}

void LaunchKernel(const LaunchConfig& config, Function function, const void* const* args) {
  Check(Driver().launch(&config, function, args, nullptr), "cuLaunchKernelEx");
}

void ZeroAsync(void* data, size_t bytes, void* stream) {
  Check(Driver().zero(reinterpret_cast<unsigned long long>(data), 0, bytes, stream), "cuMemsetD8Async");
}

TensorMap EncodeTiled(int element_type, const void* data, const uint64_t* sizes, const uint64_t* byte_strides,
                      const uint32_t* box, int swizzle) {
  constexpr uint32_t kRank = 4, kUnitSteps[kRank] = {1, 1, 1, 1};
  TensorMap map;
  Check(Driver().encode_tiled(&map, element_type, kRank, const_cast<void*>(data), sizes, byte_strides, box, kUnitSteps,
                              /*interleave=*/0, swizzle, kL2Promotion128Bytes, /*out of bounds: zeros*/ 0),
        "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace jf::driver
