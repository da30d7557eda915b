// Stands in for the CUDA driver and for NVRTC, so that the extension compiles and launches kernels as it does on a GPU;
// and lets XLA's CPU backend call its handlers.
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <regex>
#include <sstream>
#include <string>
#include <utility>

#include "host.h"
#include "xla/ffi/api/c_api.h"

namespace emulator {
namespace {

struct Settings {
  int arch = 90, multiprocessors = 2;
  unsigned seed = 0;
} settings;

struct Launch {
  unsigned grid[3], block[3], shared_bytes;
};

std::mutex error_mutex;
std::string last_error;

int Fail(const std::string& error) {
  const std::lock_guard<std::mutex> lock(error_mutex);
  last_error = error;
  return 1;
}

int LaunchKernel(const Launch* launch, void* kernel, void* const* args, void**) {
  static std::atomic<unsigned> launches{0};
  const std::string error =
      run_grid(reinterpret_cast<Kernel>(kernel), args, {launch->grid[0], launch->grid[1], launch->grid[2]},
               launch->block[0], settings.multiprocessors, settings.seed + 1000003 * launches++);
  return error.empty() ? 0 : Fail(error);
}

int EncodeTiled(void* map, int type, unsigned rank, void* data, const uint64_t* sizes, const uint64_t* strides,
                const uint32_t* box, const uint32_t*, int, int swizzle, int, int) {
  if (rank != 4 || reinterpret_cast<uintptr_t>(data) % 16 != 0) return Fail("a tensor map that the driver refuses");
  Tensor tensor{static_cast<unsigned char*>(data)};
  tensor.bytes = type == 0 ? 1 : type == 7 ? 4 : 2;
  tensor.swizzle = swizzle;
  for (int i = 0; i < 4; i++) {
    tensor.sizes[i] = sizes[i];
    tensor.box[i] = box[i];
    if (sizes[i] == 0 || box[i] == 0 || box[i] > 256) return Fail("a tensor map of a size that the driver refuses");
    if (i < 3 && strides[i] % 16 != 0) return Fail("a tensor map of a stride that the driver refuses");
    if (i < 3) tensor.strides[i] = strides[i];
  }
  if (box[0] * tensor.bytes % 16 != 0 || (swizzle && box[0] * tensor.bytes > 16u << swizzle)) {
    return Fail("a tensor map with a box that the driver refuses");
  }
  std::memcpy(map, &tensor, sizeof tensor);
  return 0;
}

std::string TemporaryFolder() {
  std::string path = "/tmp/jax_flash_emulator_XXXXXX";
  if (!mkdtemp(path.data())) std::abort();
  return path;
}

// A "cubin" is a shared object behind its length.
int LoadLibrary(void** library, const unsigned char* image, void*, void*, unsigned, void*, void*, unsigned) {
  uint64_t bytes;
  std::memcpy(&bytes, image, sizeof bytes);
  const std::string folder = TemporaryFolder(), path = folder + "/kernel.so";
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(image) + sizeof bytes, bytes);
  *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const char* problem = *library ? nullptr : dlerror();
  unlink(path.c_str());
  rmdir(folder.c_str());
  return problem ? Fail(problem) : 0;
}

int GetKernel(void** kernel, void* library, const char* name) {
  *kernel = dlsym(library, (std::string(name) + "_emulated").c_str());
  return *kernel ? 0 : Fail(std::string("no kernel ") + name);
}

int DeviceAttribute(int* value, int attribute, int) {
  const std::map<int, int> values = {
      {16, settings.multiprocessors}, {75, settings.arch / 10}, {76, settings.arch % 10}};
  *value = values.at(attribute);
  return 0;
}

int ErrorName(int, const char** name) {
  *name = last_error.c_str();
  return 0;
}

}  // namespace
}  // namespace emulator

extern "C" {

void emulator_configure(int arch, int multiprocessors, unsigned seed) {
  emulator::settings = {arch, multiprocessors, seed};
}

int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int*) {
  using namespace emulator;
  const std::map<std::string, void*> functions = {
      {"cuInit", reinterpret_cast<void*>(+[](unsigned) { return 0; })},
      {"cuDriverGetVersion", reinterpret_cast<void*>(+[](int* version) { return *version = 13000, 0; })},
      {"cuGetErrorName", reinterpret_cast<void*>(ErrorName)},
      {"cuDeviceGetCount", reinterpret_cast<void*>(+[](int* count) { return *count = 1, 0; })},
      {"cuDeviceGet", reinterpret_cast<void*>(+[](int* device, int) { return *device = 0; })},
      {"cuDeviceGetName",
       reinterpret_cast<void*>(+[](char* name, int size, int) { return std::snprintf(name, size, "emulator"), 0; })},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(DeviceAttribute)},
      {"cuLibraryLoadData", reinterpret_cast<void*>(LoadLibrary)},
      {"cuLibraryGetKernel", reinterpret_cast<void*>(GetKernel)},
      {"cuKernelGetFunction", reinterpret_cast<void*>(+[](void** out, void* kernel) { return *out = kernel, 0; })},
      {"cuKernelSetAttribute", reinterpret_cast<void*>(+[](int, int, void*, int) { return 0; })},
      {"cuLaunchKernelEx", reinterpret_cast<void*>(LaunchKernel)},
      {"cuMemsetD8Async", reinterpret_cast<void*>(+[](void* data, unsigned char value, size_t bytes, void*) {
         return std::memset(data, value, bytes), 0;
       })},
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(EncodeTiled)},
  };
  const auto found = functions.find(name);
  *function = found == functions.end() ? nullptr : found->second;
  return *function ? 0 : 1;
}

// ---- NVRTC: the C++ compiler

struct Program {
  std::map<std::string, std::string> files;
  std::string log, cubin;
};

int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0; }
const char* nvrtcGetErrorString(int) { return "the C++ compiler failed"; }

int nvrtcCreateProgram(Program** program, const char* source, const char* name, int count, const char* const* contents,
                       const char* const* names) {
  *program = new Program;
  (*program)->files[name] = source;
  for (int i = 0; i < count; i++) (*program)->files[names[i]] = contents[i];
  return 0;
}

int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  std::string arch;
  for (int i = 0; i < count; i++) {
    std::cmatch match;
    if (std::regex_search(options[i], match, std::regex("-arch=sm_(\\d+)"))) arch = match[1].str() + "0";
  }
  // The launch passes pointers to the arguments.
  std::string entries;
  const std::regex entry("__global__[^;{]*?(\\w+)\\(const __grid_constant__");
  for (const auto& [name, text] : program->files) {
    for (std::sregex_iterator match(text.begin(), text.end(), entry), end; match != end; ++match) {
      const std::string kernel = (*match)[1];
      entries +=
          "extern \"C\" void " + kernel + "_emulated(void* const* args) { emulator::invoke(" + kernel + ", args); }\n";
    }
  }
  program->files["main.cu"] += entries;
  const std::string folder = emulator::TemporaryFolder();
  for (const auto& [name, text] : program->files) {
    const std::string path = folder + "/" + name;
    if (std::system(("mkdir -p $(dirname '" + path + "')").c_str()) != 0) return 1;
    std::ofstream(path) << text;
  }
  // The emulator's ptx.cuh come ahead of the kernels' own.
  const std::string command =
      "c++ -std=c++17 -O1 -w -fPIC -fno-gnu-unique -shared -x c++ -D__CUDACC__ -D__CUDA_ARCH__=" + arch +
      " -include cuda.h -I '" EMULATOR_FOLDER "' -I '" + folder + "' '" + folder + "/main.cu' -o '" + folder +
      "/kernel.so' 2> '" + folder + "/log'";
  const int status = std::system(command.c_str());
  const auto read = [&](const char* name) {
    std::ostringstream content;
    content << std::ifstream(folder + "/" + name, std::ios::binary).rdbuf();
    return content.str();
  };
  program->log = read("log");
  const std::string object = read("kernel.so");
  const uint64_t bytes = object.size();
  program->cubin = std::string(reinterpret_cast<const char*>(&bytes), sizeof bytes) + object;
  return std::system(("rm -r '" + folder + "'").c_str()) || status;
}

int nvrtcGetProgramLogSize(Program* program, size_t* size) { return *size = program->log.size() + 1, 0; }
int nvrtcGetProgramLog(Program* program, char* log) { return std::strcpy(log, program->log.c_str()), 0; }
int nvrtcGetCUBINSize(Program* program, size_t* size) { return *size = program->cubin.size(), 0; }
int nvrtcGetCUBIN(Program* program, char* cubin) {
  return std::memcpy(cubin, program->cubin.data(), program->cubin.size()), 0;
}
int nvrtcDestroyProgram(Program** program) { return delete *program, 0; }

}  // extern "C"

// ---- XLA's CPU backend has no streams and no device numbers: handlers get some

namespace {

XLA_FFI_Handler* handlers[32];

XLA_FFI_Error* NoStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = nullptr;
  return nullptr;
}
XLA_FFI_Error* FirstDevice(XLA_FFI_DeviceOrdinal_Get_Args* args) {
  args->device_ordinal = 0;
  return nullptr;
}

template <int kSlot>
XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Api api = *frame->api;
  api.XLA_FFI_Stream_Get = NoStream;
  api.XLA_FFI_DeviceOrdinal_Get = FirstDevice;
  XLA_FFI_CallFrame copy = *frame;
  copy.api = &api;
  return handlers[kSlot](&copy);
}

template <size_t... kSlots>
void* Slot(int slot, std::index_sequence<kSlots...>) {
  constexpr XLA_FFI_Handler* wrappers[] = {Handle<kSlots>...};
  return reinterpret_cast<void*>(wrappers[slot]);
}

}  // namespace

// The handler as XLA's CPU backend can call it.
extern "C" void* emulator_wrap(XLA_FFI_Handler* handler) {
  static int used = 0;
  handlers[used] = handler;
  return Slot(used++, std::make_index_sequence<std::size(handlers)>());
}
