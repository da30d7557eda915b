#include "compiler.h"

#include <dlfcn.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <regex>
#include <sstream>
#include <string_view>

#include "cache.h"
#include "driver.h"
#include "sha256.h"

namespace jf::compiler {
namespace {

namespace fs = std::filesystem;

using Program = void*;

// X(member, name in libnvrtc, type)
#define JF_NVRTC_FUNCTIONS(X)                                                             \
  X(version, "nvrtcVersion", int(int*, int*))                                             \
  X(error_string, "nvrtcGetErrorString", const char*(int))                                \
  X(create, "nvrtcCreateProgram",                                                         \
    int(Program*, const char*, const char*, int, const char* const*, const char* const*)) \
  X(compile, "nvrtcCompileProgram", int(Program, int, const char* const*))                \
  X(log_size, "nvrtcGetProgramLogSize", int(Program, size_t*))                            \
  X(log, "nvrtcGetProgramLog", int(Program, char*))                                       \
  X(cubin_size, "nvrtcGetCUBINSize", int(Program, size_t*))                               \
  X(cubin, "nvrtcGetCUBIN", int(Program, char*))                                          \
  X(destroy, "nvrtcDestroyProgram", int(Program*))

struct Library {
#define X(member, name, ...) std::add_pointer_t<__VA_ARGS__> member;
  JF_NVRTC_FUNCTIONS(X)
#undef X
  Nvrtc info;
};

// Guards everything below. NVRTC compiles one program at a time anyway.
std::mutex mutex;
Settings settings;
std::optional<Library> library;

// Newest CUDA major version whose cubins the driver loads; without a driver any will do.
int DriverMajor() {
  try {
    return driver::Version() / 1000;
  } catch (const Error&) {
    return std::numeric_limits<int>::max();
  }
}

// Some releases look for this part of NVRTC wherever the loader looks, but not beside themselves. Once it is loaded,
// they find it.
void LoadBuiltins(const fs::path& folder) {
  std::error_code error;
  for (const auto& file : fs::directory_iterator(folder, error)) {
    const std::string name = file.path().filename();
    if (name.rfind("libnvrtc-builtins.so", 0) == 0) dlopen(file.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
  }
}

// Tells why not in `problem`.
std::optional<Library> Open(const std::string& path, std::string* problem) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    *problem = dlerror();
    return std::nullopt;
  }
  Library opened;
#define X(member, name, ...)                                                              \
  opened.member = reinterpret_cast<std::add_pointer_t<__VA_ARGS__>>(dlsym(handle, name)); \
  if (!opened.member) {                                                                   \
    *problem = path + " has no " + name;                                                  \
    return std::nullopt;                                                                  \
  }
  JF_NVRTC_FUNCTIONS(X)
#undef X
  opened.version(&opened.info.major, &opened.info.minor);
  if (opened.info.major > DriverMajor()) {
    *problem = path + " is newer than the driver";
    return std::nullopt;
  }
  Dl_info place;
  opened.info.path = dladdr(reinterpret_cast<void*>(opened.version), &place) ? place.dli_fname : path;
  LoadBuiltins(fs::path(opened.info.path).parent_path());
  return opened;
}

const Library& Opened() {
  if (library) return *library;
  std::string problems;
  for (const std::string& path : settings.nvrtc) {
    std::string problem;
    if ((library = Open(path, &problem))) return *library;
    problems += "\n  " + problem;
  }
  throw Error(
      "no NVRTC, the compiler of CUDA kernels, could be loaded: pip install 'jax_flash[cuda13]' (or [cuda12]) brings it"
      "; tried:" +
      problems);
}

std::string ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  if (!file) throw Error("cannot read " + path.string());
  return content.str();
}

void WriteFile(const fs::path& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  file << content;
  if (!file.flush()) throw Error("cannot write " + path.string());
}

// Adds the files of cuda/ that `text` includes, directly or not, by their include names. One that does not exist is
// left for the compiler to complain about.
void AddIncluded(const std::string& text, std::map<std::string, std::string>* headers) {
  constexpr std::string_view kDirective = "#include \"";
  for (size_t at = text.find(kDirective); at != std::string::npos; at = text.find(kDirective, at + 1)) {
    const size_t begin = at + kDirective.size();
    const std::string name = text.substr(begin, text.find('"', begin) - begin);
    const fs::path path = fs::path(settings.kernels) / name;
    if (headers->count(name) != 0 || !fs::exists(path)) continue;
    const std::string& content = (*headers)[name] = ReadFile(path);
    AddIncluded(content, headers);
  }
}

// The feature set of Hopper's wgmma and TMA needs the "a" target.
std::string ArchOption(int arch) { return "-arch=sm_" + std::to_string(arch) + (arch == 90 ? "a" : ""); }

struct Source {
  std::string main;
  std::map<std::string, std::string> headers;
  std::vector<std::string> options;

  // Name of the entry in the disk cache: all that decides the cubin.
  std::string Key(const Nvrtc& nvrtc) const {
    std::error_code error;
    std::ostringstream text;
    auto add = [&](const std::string& part) { text << part.size() << ':' << part; };
    text << "nvrtc " << nvrtc.major << '.' << nvrtc.minor << ' ' << fs::file_size(nvrtc.path, error) << ' ';
    for (const std::string& option : options) add(option);
    add(main);
    for (const auto& [name, content] : headers) {
      add(name);
      add(content);
    }
    return Hex(Sha256(text.str()));
  }
};

Source MakeSource(const Nvrtc& nvrtc, const KernelVariant& kernel, int arch) {
  Source source{"#include \"variant.h\"\n#include \"" + kernel.source + "\"\n",
                {{"variant.h", kernel.variant}},
                {ArchOption(arch), "-std=c++17", "--ptxas-options=-v"}};
  // Since 12.9 NVRTC has a cache of its own, from which kernels come without ptxas's log.
  if (nvrtc.major * 100 + nvrtc.minor >= 1209) source.options.push_back("--no-cache");
  AddIncluded(kernel.variant, &source.headers);
  AddIncluded(source.main, &source.headers);
  if (source.headers.count(kernel.source) == 0) throw Error("no kernel " + kernel.source + " in " + settings.kernels);
  return source;
}

std::string Describe(const KernelVariant& kernel, int arch, const std::string& log) {
  return kernel.source + ", " + ArchOption(arch) + "\nvariant.h:\n" + kernel.variant + "\nlog:\n" + log;
}

Compilation RunNvrtc(const Library& nvrtc, const Source& source, const KernelVariant& kernel, int arch) {
  std::vector<const char*> names, contents, options;
  for (const auto& [name, content] : source.headers) {
    names.push_back(name.c_str());
    contents.push_back(content.c_str());
  }
  for (const std::string& option : source.options) options.push_back(option.c_str());

  Program program = nullptr;
  auto check = [&](int code) {
    if (code != 0) throw Error(std::string("NVRTC: ") + nvrtc.error_string(code));
  };
  check(nvrtc.create(&program, source.main.c_str(), "main.cu", static_cast<int>(names.size()), contents.data(),
                     names.data()));
  const auto destroy = [&](void*) { nvrtc.destroy(&program); };
  const std::unique_ptr<void, decltype(destroy)> destroyer(program, destroy);
  const int compiled = nvrtc.compile(program, static_cast<int>(options.size()), options.data());

  Compilation result{};
  size_t size = 0;
  check(nvrtc.log_size(program, &size));
  result.log.resize(size);
  check(nvrtc.log(program, result.log.data()));
  result.log.erase(result.log.find_last_not_of(std::string("\0\n", 2)) + 1);
  if (compiled != 0) throw Error("a kernel does not compile: " + Describe(kernel, arch, result.log));
  check(nvrtc.cubin_size(program, &size));
  result.cubin.resize(size);
  check(nvrtc.cubin(program, result.cubin.data()));
  return result;
}

// In the cache: length of the log in decimal, newline, log, cubin.
std::string Pack(const Compilation& compilation) {
  return std::to_string(compilation.log.size()) + "\n" + compilation.log + compilation.cubin;
}

Compilation Unpack(const std::string& content) {
  const size_t newline = content.find('\n'), log_size = std::stoul(content);
  return {content.substr(newline + 1 + log_size), content.substr(newline + 1, log_size), true};
}

// In every process, whether or not the kernel comes from the disk.
void WarnIfSerialised(const KernelVariant& kernel, int arch, const std::string& log) {
  static const std::regex serialised("\\(C751[0-5]\\)");
  if (!std::regex_search(log, serialised)) return;
  std::fprintf(stderr, "jax_flash: a kernel is right but slow, since ptxas made wgmma wait; please report this: %s\n",
               Describe(kernel, arch, log).c_str());
}

void Dump(const KernelVariant& kernel, int arch, const std::string& key, const Compilation& compilation) {
  const fs::path folder = settings.dump;
  fs::create_directories(folder);
  const std::string name = kernel.entry + "-sm_" + std::to_string(arch) + "-" + key.substr(0, 8);
  WriteFile(folder / (name + ".cu"), kernel.variant + "#include \"" + kernel.source + "\"\n");
  WriteFile(folder / (name + ".cubin"), compilation.cubin);
  WriteFile(folder / (name + ".log"), compilation.log + "\n");
}

}  // namespace

void Configure(Settings wanted) {
  const std::lock_guard<std::mutex> lock(mutex);
  settings = std::move(wanted);
  library.reset();
}

Compilation Compile(const KernelVariant& kernel, int arch) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Library& nvrtc = Opened();
  const Source source = MakeSource(nvrtc.info, kernel, arch);
  const std::string key = source.Key(nvrtc.info), name = key + ".cubin";
  Compilation compilation;
  if (const auto stored = cache::Read(settings.cache, name)) {
    compilation = Unpack(*stored);
  } else {
    compilation = RunNvrtc(nvrtc, source, kernel, arch);
    cache::Write(settings.cache, name, Pack(compilation));
  }
  WarnIfSerialised(kernel, arch, compilation.log);
  if (!settings.dump.empty()) Dump(kernel, arch, key, compilation);
  return compilation;
}

Nvrtc FindNvrtc() {
  const std::lock_guard<std::mutex> lock(mutex);
  return Opened().info;
}

}  // namespace jf::compiler
