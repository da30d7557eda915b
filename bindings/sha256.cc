#include "sha256.h"

#include <cmath>
#include <cstdint>

namespace jf {
namespace {

// The first 32 bits of the fractional part of a root of the n-th prime.
struct Constants {
  std::array<uint32_t, 8> state;
  std::array<uint32_t, 64> rounds;
};

Constants MakeConstants() {
  Constants constants{};
  auto fraction = [](long double value) { return static_cast<uint32_t>((value - std::floor(value)) * 4294967296.0L); };
  size_t found = 0;
  for (int candidate = 2; found < 64; ++candidate) {
    bool prime = true;
    for (int divisor = 2; divisor * divisor <= candidate; ++divisor) prime = prime && candidate % divisor != 0;
    if (!prime) continue;
    if (found < 8) constants.state[found] = fraction(std::sqrt(static_cast<long double>(candidate)));
    constants.rounds[found++] = fraction(std::cbrt(static_cast<long double>(candidate)));
  }
  return constants;
}

uint32_t RotateRight(uint32_t value, int bits) { return value >> bits | value << (32 - bits); }

}  // namespace

std::array<unsigned char, 32> Sha256(std::string_view text) {
  static const Constants constants = MakeConstants();
  std::string message(text);
  message += static_cast<char>(0x80);
  message.append((120 - message.size() % 64) % 64, '\0');
  const uint64_t bits = static_cast<uint64_t>(text.size()) * 8;
  for (int shift = 56; shift >= 0; shift -= 8) message += static_cast<char>(bits >> shift);

  std::array<uint32_t, 8> state = constants.state;
  for (size_t block = 0; block < message.size(); block += 64) {
    uint32_t words[64];
    for (int i = 0; i < 16; ++i) {
      words[i] = 0;
      for (int byte = 0; byte < 4; ++byte) {
        words[i] = words[i] << 8 | static_cast<unsigned char>(message[block + 4 * i + byte]);
      }
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t w15 = words[i - 15], w2 = words[i - 2];
      words[i] = words[i - 16] + words[i - 7] + (RotateRight(w15, 7) ^ RotateRight(w15, 18) ^ w15 >> 3) +
                 (RotateRight(w2, 17) ^ RotateRight(w2, 19) ^ w2 >> 10);
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i) {
      const uint32_t first = h + (RotateRight(e, 6) ^ RotateRight(e, 11) ^ RotateRight(e, 25)) + ((e & f) ^ (~e & g)) +
                             constants.rounds[i] + words[i];
      const uint32_t second =
          (RotateRight(a, 2) ^ RotateRight(a, 13) ^ RotateRight(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g;
      g = f;
      f = e;
      e = d + first;
      d = c;
      c = b;
      b = a;
      a = first + second;
    }
    const uint32_t mixed[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += mixed[i];
  }

  std::array<unsigned char, 32> digest;
  for (int i = 0; i < 32; ++i) digest[i] = static_cast<unsigned char>(state[i / 4] >> (24 - 8 * (i % 4)));
  return digest;
}

std::string Hex(const std::array<unsigned char, 32>& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : digest) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace jf
