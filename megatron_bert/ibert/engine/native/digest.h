// SPDX-License-Identifier: Apache-2.0
// CRC-32 as of zlib: a plan's file is checked at every load. Eight bytes at a time, each step of which waits for the one
// before: so four stretches of a tensor are taken side by side, and their checksums put together.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace ibert {

class Digest {
 public:
  void add(const void* data, size_t size) {
    static const Tables tables = made();
    static const Ahead ahead = ahead_of(tables);
    const auto* at = static_cast<const uint8_t*>(data);
    uint32_t crc = ~value_;
    for (; size >= 4 * STRETCH; at += 4 * STRETCH, size -= 4 * STRETCH) {
      uint32_t a = crc, b = 0, c = 0, d = 0;
      for (const uint8_t* p = at; p < at + STRETCH; p += 8) {
        a = eight(tables, a, p);
        b = eight(tables, b, p + STRETCH);
        c = eight(tables, c, p + 2 * STRETCH);
        d = eight(tables, d, p + 3 * STRETCH);
      }
      crc = over(ahead, over(ahead, over(ahead, a) ^ b) ^ c) ^ d;
    }
    for (; size >= 8; at += 8, size -= 8) crc = eight(tables, crc, at);
    for (; size > 0; at++, size--) crc = tables[0][uint8_t(crc ^ *at)] ^ crc >> 8;
    value_ = ~crc;
  }
  void add(const std::string& text) { add(text.data(), text.size()); }
  std::string hexadecimal() const {
    std::string out;
    for (int shift = 28; shift >= 0; shift -= 4) out += "0123456789abcdef"[value_ >> shift & 15];
    return out;
  }

 private:
  using Tables = std::array<std::array<uint32_t, 256>, 8>;
  using Ahead = std::array<std::array<uint32_t, 256>, 4>;
  static constexpr size_t STRETCH = 4096;
  uint32_t value_ = 0;

  static inline uint32_t eight(const Tables& tables, uint32_t crc, const uint8_t* at) {
    uint32_t next = 0;
    for (int i = 0; i < 8; i++) {
      const uint8_t byte = i < 4 ? uint8_t(at[i] ^ crc >> (8 * i)) : at[i];
      next ^= tables[7 - i][byte];
    }
    return next;
  }
  // What becomes of a checksum over a stretch of zeros.
  static inline uint32_t over(const Ahead& ahead, uint32_t crc) {
    return ahead[0][crc & 255] ^ ahead[1][crc >> 8 & 255] ^ ahead[2][crc >> 16 & 255] ^ ahead[3][crc >> 24];
  }
  // It is linear: known of single bits, it is known of all.
  static Ahead ahead_of(const Tables& tables) {
    const uint8_t zeros[8] = {};
    Ahead ahead{};
    for (size_t bit = 0; bit < 32; bit++) {
      uint32_t crc = uint32_t(1) << bit;
      for (size_t i = 0; i < STRETCH; i += 8) crc = eight(tables, crc, zeros);
      auto& table = ahead[bit / 8];
      const size_t low = size_t(1) << bit % 8;
      for (size_t byte = low; byte < 2 * low; byte++) table[byte] = crc ^ table[byte - low];
    }
    return ahead;
  }

  // tables[n][byte]: what a byte does to the checksum n bytes later.
  static Tables made() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; byte++) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
      tables[0][byte] = crc;
    }
    for (size_t n = 1; n < 8; n++)
      for (uint32_t byte = 0; byte < 256; byte++) {
        const uint32_t before = tables[n - 1][byte];
        tables[n][byte] = before >> 8 ^ tables[0][before & 255];
      }
    return tables;
  }
};

}  // namespace ibert
