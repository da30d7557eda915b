#include "handlers.h"

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "buffers.h"
#include "compiler.h"
#include "driver.h"
#include "kernel.h"
#include "plan.h"

namespace jf {
namespace {

namespace ffi = xla::ffi;

class CallAttributes : public Attributes {
 public:
  explicit CallAttributes(const ffi::Dictionary& dictionary) : dictionary_(dictionary) {}
  int64_t Integer(const char* name) const override { return Get<int64_t>(name); }
  float Number(const char* name) const override { return Get<float>(name); }
  bool Flag(const char* name) const override { return Get<bool>(name); }
  std::string_view Text(const char* name) const override { return Get<std::string_view>(name); }

 private:
  template <typename T>
  T Get(const char* name) const {
    const auto value = dictionary_.get<T>(name);
    if (value.has_error()) throw Error(value.error().message());
    return *value;
  }
  const ffi::Dictionary& dictionary_;
};

// A plan whose kernels are compiled and known to the driver.
struct Program {
  Plan plan;
  std::vector<driver::Function> functions;
  std::mutex mutex;
  std::set<int> prepared;  // devices
};

// Every program of the process. Plans are kept here and not in XLA's per-executable state, because programs share them.
class ProgramTable {
 public:
  std::shared_ptr<Program> Find(const std::string& key) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto found = programs_.find(key);
    return found == programs_.end() ? nullptr : found->second;
  }

  std::shared_ptr<Program> FindOrMake(const Call& call) {
    const std::string key = CallKey(call);
    if (auto program = Find(key)) return program;
    const std::lock_guard<std::mutex> one_at_a_time(making_);
    if (auto program = Find(key)) return program;
    auto program = Make(call);
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    return programs_[key] = program;
  }

 private:
  std::shared_ptr<Program> Make(const Call& call) {
    Planned planned = MakePlan(call);
    if (const auto* refusal = std::get_if<Refusal>(&planned)) throw Error("no CUDA kernel: " + refusal->reason);
    auto program = std::make_shared<Program>();
    program->plan = std::move(std::get<Plan>(planned));
    for (const KernelVariant& kernel : program->plan.kernels) {
      program->functions.push_back(Load(kernel, compiler::Compile(kernel, call.arch).cubin));
    }
    return program;
  }

  // Plans share kernels: the driver gets each entry of a cubin once for each size of dynamic shared memory, which is a
  // property of the loaded kernel.
  driver::Function Load(const KernelVariant& kernel, const std::string& cubin) {
    driver::Function& function = functions_[kernel.entry + ' ' + std::to_string(kernel.shared_bytes) + ' ' + cubin];
    if (!function) function = driver::LoadKernel(cubin, kernel.entry);
    return function;
  }

  mutable std::shared_mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<Program>> programs_;
  std::mutex making_;
  std::unordered_map<std::string, driver::Function> functions_;  // guarded by making_
};

ProgramTable& Programs() {
  static auto* table = new ProgramTable;  // never destroyed: handlers may run during the exit of the process
  return *table;
}

template <typename Step>
ffi::Error Guard(Step&& step) {
  try {
    step();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_flash: ") + error.what());
  }
}

// Attributes are all that is known here: compile for every kind of GPU of this process.
template <Direction direction>
ffi::Error Instantiate(ffi::Dictionary attributes) {
  return Guard([&] {
    Call call = DecodeCall(direction, CallAttributes(attributes));
    const int devices = driver::DeviceCount();
    if (devices == 0) throw Error("there is no GPU");
    for (int device = 0; device < devices; ++device) {
      call.arch = driver::Arch(device);
      Programs().FindOrMake(call);
    }
  });
}

template <Direction direction>
ffi::Error Initialize(int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  return Guard([&] {
    Call call = DecodeCall(direction, CallAttributes(attributes));
    call.arch = driver::Arch(device);
    const auto program = Programs().FindOrMake(call);
    const std::lock_guard<std::mutex> lock(program->mutex);
    if (program->prepared.count(device)) return;
    for (size_t i = 0; i < program->functions.size(); ++i) {
      driver::PrepareKernel(program->functions[i], device, program->plan.kernels[i].shared_bytes);
    }
    program->prepared.insert(device);
  });
}

template <Direction direction>
ffi::Error Execute(void* stream, int32_t device, ffi::RemainingArgs args, ffi::RemainingRets results,
                   ffi::Dictionary attributes) {
  return Guard([&] {
    Launch launch{};
    launch.call = DecodeCall(direction, CallAttributes(attributes));
    launch.call.arch = driver::Arch(device);
    const auto program = Programs().Find(CallKey(launch.call));
    if (!program) throw Error("the program was never initialized");
    launch.plan = &program->plan;
    launch.functions = program->functions.data();
    launch.stream = stream;
    launch.multiprocessors = driver::Multiprocessors(device);
    BindBuffers(args, results, &launch);
    program->plan.launch(launch);
  });
}

template <Direction direction>
Registration Register(const char* target) {
  XLA_FFI_DEFINE_HANDLER(instantiate, Instantiate<direction>, ffi::Ffi::BindInstantiate().Attrs());
  XLA_FFI_DEFINE_HANDLER(initialize, Initialize<direction>,
                         ffi::Ffi::BindInitialize().Ctx<ffi::DeviceOrdinal>().RemainingArgs().RemainingRets().Attrs());
  XLA_FFI_DEFINE_HANDLER(execute, Execute<direction>,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<void*>>()
                             .Ctx<ffi::DeviceOrdinal>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return {target, instantiate, initialize, execute};
}

}  // namespace

const std::vector<Registration>& Registrations() {
  static const std::vector<Registration> registrations = {
      Register<Direction::kForward>("jax_flash_forward"),
      Register<Direction::kBackward>("jax_flash_backward"),
      Register<Direction::kBiasGradient>("jax_flash_bias_gradient"),
      Register<Direction::kQuantize>("jax_flash_quantize"),
      Register<Direction::kForwardFp8>("jax_flash_forward_fp8"),
  };
  return registrations;
}

}  // namespace jf
