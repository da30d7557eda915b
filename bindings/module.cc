// jax_flash._native: what Python sees of the extension.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "compiler.h"
#include "driver.h"
#include "handlers.h"
#include "plan.h"

namespace nb = nanobind;

namespace jf {
namespace {

// AttentionSpec.attributes() as a dict.
class DictAttributes : public Attributes {
 public:
  explicit DictAttributes(const nb::dict& dict) : dict_(dict) {}
  int64_t Integer(const char* name) const override { return nb::cast<int64_t>(nb::int_(Get(name))); }
  float Number(const char* name) const override { return nb::cast<float>(nb::float_(Get(name))); }
  bool Flag(const char* name) const override { return nb::cast<bool>(Get(name)); }
  std::string_view Text(const char* name) const override { return nb::cast<const char*>(Get(name)); }

 private:
  nb::object Get(const char* name) const {
    if (!dict_.contains(name)) throw nb::key_error(name);
    return dict_[name];
  }
  const nb::dict& dict_;
};

Call Decode(const std::string& target, const nb::dict& attributes, int arch) {
  Call call = DecodeCall(DirectionOf(target), DictAttributes(attributes));
  call.arch = arch;
  return call;
}

nb::dict PlanDict(const std::string& target, const nb::dict& attributes, int arch) {
  const Planned planned = MakePlan(Decode(target, attributes, arch));
  nb::dict result;
  if (const auto* refusal = std::get_if<Refusal>(&planned)) {
    result["reason"] = refusal->reason;
    return result;
  }
  const Plan& plan = std::get<Plan>(planned);
  nb::list kernels;
  for (const KernelVariant& kernel : plan.kernels) {
    nb::dict entry;
    entry["source"] = kernel.source;
    entry["entry"] = kernel.entry;
    entry["variant"] = kernel.variant;
    entry["threads"] = kernel.threads;
    entry["shared_bytes"] = kernel.shared_bytes;
    kernels.append(entry);
  }
  nb::dict facts;
  for (const auto& [name, value] : plan.facts) facts[name.c_str()] = value;
  result["name"] = plan.name;
  result["kernels"] = kernels;
  result["facts"] = facts;
  result["scratch_bytes"] = plan.scratch_bytes;
  return result;
}

nb::dict Compile(const std::string& source, const std::string& entry, const std::string& variant, int arch) {
  compiler::Compilation compilation;
  {
    nb::gil_scoped_release released;
    compilation = compiler::Compile({source, entry, variant, 0, 0}, arch);
  }
  nb::dict result;
  result["cubin"] = nb::bytes(compilation.cubin.data(), compilation.cubin.size());
  result["log"] = compilation.log;
  result["cached"] = compilation.cached;
  return result;
}

nb::dict RegistrationsDict() {
  nb::dict result;
  auto capsule = [](XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); };
  for (const Registration& registration : Registrations()) {
    nb::dict stages;
    stages["instantiate"] = capsule(registration.instantiate);
    stages["initialize"] = capsule(registration.initialize);
    stages["execute"] = capsule(registration.execute);
    result[registration.target] = stages;
  }
  return result;
}

nb::list Devices() {
  nb::list devices;
  for (int device = 0; device < driver::DeviceCount(); ++device) {
    nb::dict entry;
    entry["name"] = driver::DeviceName(device);
    entry["arch"] = driver::Arch(device);
    entry["multiprocessors"] = driver::Multiprocessors(device);
    devices.append(entry);
  }
  return devices;
}

nb::dict NvrtcDict() {
  const compiler::Nvrtc nvrtc = compiler::FindNvrtc();
  nb::dict result;
  result["path"] = nvrtc.path;
  result["version"] = nb::make_tuple(nvrtc.major, nvrtc.minor);
  return result;
}

}  // namespace
}  // namespace jf

NB_MODULE(_native, module) {
  using nb::literals::operator""_a;
  module.doc() = "Plans, compiles and launches the CUDA kernels of jax_flash.";
  module.def(
      "configure",
      [](std::vector<std::string> nvrtc, std::string kernels, std::string cache, std::string dump) {
        jf::compiler::Configure({std::move(nvrtc), std::move(kernels), std::move(cache), std::move(dump)});
      },
      "nvrtc"_a, "kernels"_a, "cache"_a, "dump"_a,
      "Sets the NVRTC libraries to try, the folder of kernel sources, the folder of the disk cache and the folder for "
      "dumps ('': none).");
  module.def("registrations", &jf::RegistrationsDict,
             "{target: {stage: capsule}}, for jax.ffi.register_ffi_target on platform CUDA.");
  module.def(
      "plan", &jf::PlanDict, "target"_a, "attributes"_a, "arch"_a,
      "{name, kernels, facts, scratch_bytes} of the kernel that runs the call on compute capability `arch` (90 for "
      "9.0), or {reason} why none does.");
  module.def("compile", &jf::Compile, "source"_a, "entry"_a, "variant"_a, "arch"_a,
             "{cubin, log, cached} of one kernel of a plan. Needs NVRTC, but no GPU.");
  module.def(
      "scratch_bytes",
      [](const std::string& target, const nb::dict& attributes) {
        return jf::ScratchBytes(jf::Decode(target, attributes, 0));
      },
      "target"_a, "attributes"_a, "Size of the scratch result: enough for every architecture.");
  module.def("driver_version", &jf::driver::Version, "13000 for CUDA 13.0; RuntimeError where there is no driver.");
  module.def("devices", &jf::Devices, "[{name, arch, multiprocessors}]; RuntimeError where there is no driver.");
  module.def("nvrtc", &jf::NvrtcDict, "{path, version} of the compiler; RuntimeError where there is none.");
}
