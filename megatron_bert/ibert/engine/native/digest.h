// SPDX-License-Identifier: Apache-2.0
// CRC-32 as of zlib, eight bytes at a time: a plan's file is checked at every load.
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
    const auto* at = static_cast<const uint8_t*>(data);
    uint32_t crc = ~value_;
    for (; size >= 8; at += 8, size -= 8) {
      uint32_t next = 0;
      for (int i = 0; i < 8; i++) {
        const uint8_t byte = i < 4 ? uint8_t(at[i] ^ crc >> (8 * i)) : at[i];
        next ^= tables[7 - i][byte];
      }
      crc = next;
    }
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
  uint32_t value_ = 0;

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
