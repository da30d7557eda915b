// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <string>
#include <string_view>

namespace jf {

std::array<unsigned char, 32> Sha256(std::string_view text);
std::string Hex(const std::array<unsigned char, 32>& digest);

}  // namespace jf
