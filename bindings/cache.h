// A folder of compiled kernels that outlives the process. Whatever is wrong with it costs time, never a result: a
// damaged, foreign, unreadable, unwritable or full cache is ignored, with one warning per process.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace jf::cache {

// What was stored under `name`, if it is there, ours and whole.
std::optional<std::string> Read(const std::string& folder, const std::string& name);

// Stores by atomic rename, so that readers in other processes see all of it or nothing.
void Write(const std::string& folder, const std::string& name, std::string_view content);

}  // namespace jf::cache
