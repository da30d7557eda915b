#include "cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "sha256.h"

namespace jf::cache {
namespace {

// An entry is the digest of the content, then the content.
constexpr size_t kDigestBytes = 32;

void WarnOnce(const std::string& path, const char* problem) {
  static std::atomic_flag warned = ATOMIC_FLAG_INIT;
  if (warned.test_and_set()) return;
  std::fprintf(stderr, "jax_flash: the kernel cache is not used where it cannot be trusted: %s: %s\n", path.c_str(),
               problem);
}

class File {
 public:
  File(const std::string& path, int flags) : descriptor_(open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, 0600)) {}
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  explicit operator bool() const { return descriptor_ >= 0; }

  bool Status(struct stat* status) const { return fstat(descriptor_, status) == 0; }

  bool ReadAll(std::string* content) const {
    char buffer[1 << 16];
    ssize_t count;
    while ((count = read(descriptor_, buffer, sizeof buffer)) > 0) content->append(buffer, static_cast<size_t>(count));
    return count == 0;
  }

  bool WriteAll(std::string_view content) const {
    while (!content.empty()) {
      const ssize_t count = write(descriptor_, content.data(), content.size());
      if (count <= 0) return false;
      content.remove_prefix(static_cast<size_t>(count));
    }
    return true;
  }

 private:
  int descriptor_;
};

// Code from a file that another user can write would run with our rights.
bool Ours(const struct stat& status) { return status.st_uid == geteuid() && (status.st_mode & 022) == 0; }

// Missing is no reason to warn.
bool UsableFolder(const std::string& folder) {
  struct stat status;
  if (stat(folder.c_str(), &status) != 0) {
    if (errno != ENOENT) WarnOnce(folder, std::strerror(errno));
    return false;
  }
  if (S_ISDIR(status.st_mode) && Ours(status)) return true;
  WarnOnce(folder, "not a folder that this user alone can write");
  return false;
}

std::string Entry(const std::string& folder, const std::string& name) { return folder + "/" + name; }

}  // namespace

std::optional<std::string> Read(const std::string& folder, const std::string& name) {
  if (folder.empty() || !UsableFolder(folder)) return std::nullopt;
  const std::string path = Entry(folder, name);
  const File file(path, O_RDONLY | O_NONBLOCK);
  if (!file) {
    if (errno != ENOENT) WarnOnce(path, std::strerror(errno));
    return std::nullopt;
  }
  struct stat status;
  std::string stored;
  if (!file.Status(&status) || !S_ISREG(status.st_mode) || !Ours(status)) {
    WarnOnce(path, "not a file that this user alone can write");
    return std::nullopt;
  }
  if (!file.ReadAll(&stored)) {
    WarnOnce(path, std::strerror(errno));
    return std::nullopt;
  }
  if (stored.size() < kDigestBytes) {
    WarnOnce(path, "damaged");
    return std::nullopt;
  }
  std::string content = stored.substr(kDigestBytes);
  const auto digest = Sha256(content);
  if (std::memcmp(digest.data(), stored.data(), kDigestBytes) != 0) {
    WarnOnce(path, "damaged");
    return std::nullopt;
  }
  return content;
}

void Write(const std::string& folder, const std::string& name, std::string_view content) {
  if (folder.empty()) return;
  std::error_code error;
  if (!std::filesystem::exists(folder, error)) {
    std::filesystem::create_directories(folder, error);
    if (!error) std::filesystem::permissions(folder, std::filesystem::perms::owner_all, error);
    if (error) return WarnOnce(folder, error.message().c_str());
  }
  if (!UsableFolder(folder)) return;

  static std::atomic<unsigned> count{0};
  const std::string path = Entry(folder, name);
  const std::string partial = path + "." + std::to_string(getpid()) + "." + std::to_string(count++);
  const auto digest = Sha256(content);
  bool written = false;
  {
    const File file(partial, O_WRONLY | O_CREAT | O_EXCL);
    written =
        file && file.WriteAll({reinterpret_cast<const char*>(digest.data()), digest.size()}) && file.WriteAll(content);
  }
  if (written && rename(partial.c_str(), path.c_str()) == 0) return;
  WarnOnce(partial, std::strerror(errno));
  unlink(partial.c_str());
}

}  // namespace jf::cache
