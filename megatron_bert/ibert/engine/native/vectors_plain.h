// SPDX-License-Identifier: Apache-2.0
// Vectors of eight 16-bit (or four 32-bit) integers in plain C++: what runs on any processor.
#pragma once
#include <cstdint>

struct Vectors {
  static constexpr int W = 8;
  struct V {
    alignas(16) int16_t h[8];
  };
  struct Words {
    int32_t w[4];
  };
  static Words words(V v) {
    Words r;
    std::memcpy(&r, &v, 16);
    return r;
  }
  static V vector(const Words& r) {
    V v;
    std::memcpy(&v, &r, 16);
    return v;
  }
  template <class F>
  static V each16(V a, V b, F f) {
    V r;
    for (int i = 0; i < 8; i++) r.h[i] = static_cast<int16_t>(f(int32_t(a.h[i]), int32_t(b.h[i])));
    return r;
  }
  template <class F>
  static V each32(V a, V b, F f) {
    Words x = words(a), y = words(b), r;
    for (int i = 0; i < 4; i++) r.w[i] = static_cast<int32_t>(f(x.w[i], y.w[i]));
    return vector(r);
  }
  static int32_t sat16(int32_t a) { return a < -32768 ? -32768 : a > 32767 ? 32767 : a; }

  static V load(const void* p) {
    V v;
    std::memcpy(&v, p, 16);
    return v;
  }
  static void store(void* p, V v) { std::memcpy(p, &v, 16); }
  static V set16(int a) {
    V v;
    for (int i = 0; i < 8; i++) v.h[i] = static_cast<int16_t>(a);
    return v;
  }
  static V set32(int32_t a) { return vector(Words{{a, a, a, a}}); }
  static V zero() { return set32(0); }
  static V and_(V a, V b) { return each16(a, b, [](int32_t x, int32_t y) { return x & y; }); }
  static V add16(V a, V b) { return each16(a, b, [](int32_t x, int32_t y) { return x + y; }); }
  static V adds16(V a, V b) { return each16(a, b, [](int32_t x, int32_t y) { return sat16(x + y); }); }
  static V sub16(V a, V b) { return each16(a, b, [](int32_t x, int32_t y) { return x - y; }); }
  static V min16(V a, V b) { return each16(a, b, [](int32_t x, int32_t y) { return x < y ? x : y; }); }
  static V max16(V a, V b) { return each16(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; }); }
  static V abs16(V a) { return each16(a, a, [](int32_t x, int32_t) { return x < 0 ? -x : x; }); }
  static V mul(V a, V b) { return each16(a, b, [](int32_t x, int32_t y) { return (x * y + 16384) >> 15; }); }
  static V mulhi_u16(V a, V b) {
    return each16(a, b, [](int32_t x, int32_t y) { return int32_t((uint32_t(uint16_t(x)) * uint16_t(y)) >> 16); });
  }
  static V sll16(V a, int n) { return each16(a, a, [n](int32_t x, int32_t) { return int32_t(uint32_t(x) << n); }); }
  static V srl16(V a, int n) { return each16(a, a, [n](int32_t x, int32_t) { return uint16_t(x) >> n; }); }
  static V shifted256(V z) { return each16(z, z, [](int32_t x, int32_t) { return x > 8 ? 0 : 256 >> x; }); }
  static V add32(V a, V b) {
    return each32(a, b, [](int32_t x, int32_t y) { return int32_t(uint32_t(x) + uint32_t(y)); });
  }
  static V sub32(V a, V b) {
    return each32(a, b, [](int32_t x, int32_t y) { return int32_t(uint32_t(x) - uint32_t(y)); });
  }
  static V min32(V a, V b) { return each32(a, b, [](int32_t x, int32_t y) { return x < y ? x : y; }); }
  static V max32(V a, V b) { return each32(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; }); }
  static V minu32(V a, V b) {
    return each32(a, b, [](int32_t x, int32_t y) { return uint32_t(x) < uint32_t(y) ? x : y; });
  }
  static V sra32(V a, int n) { return each32(a, a, [n](int32_t x, int32_t) { return x >> (n > 31 ? 31 : n); }); }
  static V sll32(V a, int n) {
    return each32(a, a, [n](int32_t x, int32_t) { return n > 31 ? 0 : int32_t(uint32_t(x) << n); });
  }
  static V srav32(V a, V n) { return each32(a, n, [](int32_t x, int32_t y) { return x >> y; }); }
  static V sllv32(V a, V n) { return each32(a, n, [](int32_t x, int32_t y) { return int32_t(uint32_t(x) << y); }); }
  static V packs32(V a, V b) {
    Words x = words(a), y = words(b);
    V r;
    for (int i = 0; i < 4; i++) r.h[i] = int16_t(sat16(x.w[i])), r.h[i + 4] = int16_t(sat16(y.w[i]));
    return r;
  }
  static V packus32(V a, V b) {
    Words x = words(a), y = words(b);
    V r;
    auto cut = [](int32_t v) { return int16_t(uint16_t(v < 0 ? 0 : v > 65535 ? 65535 : v)); };
    for (int i = 0; i < 4; i++) r.h[i] = cut(x.w[i]), r.h[i + 4] = cut(y.w[i]);
    return r;
  }
  static V unpack_lo(V a, V b) { return V{{a.h[0], b.h[0], a.h[1], b.h[1], a.h[2], b.h[2], a.h[3], b.h[3]}}; }
  static V unpack_hi(V a, V b) { return V{{a.h[4], b.h[4], a.h[5], b.h[5], a.h[6], b.h[6], a.h[7], b.h[7]}}; }
  static V madd(V a, V b) {
    Words r;
    for (int i = 0; i < 4; i++) r.w[i] = int32_t(a.h[2 * i]) * b.h[2 * i] + int32_t(a.h[2 * i + 1]) * b.h[2 * i + 1];
    return vector(r);
  }
  static void store8(void* p, V v) {
    auto* out = static_cast<uint8_t*>(p);
    for (int i = 0; i < 8; i++) out[i] = static_cast<uint8_t>(v.h[i]);
  }
  static V load_s8(const int8_t* p) {
    V v;
    for (int i = 0; i < 8; i++) v.h[i] = p[i];
    return v;
  }
  static int32_t largest32(V v) {
    Words r = words(v);
    int32_t m = r.w[0];
    for (int i = 1; i < 4; i++) m = r.w[i] > m ? r.w[i] : m;
    return m;
  }
  static int64_t sum32(V v) {
    Words r = words(v);
    return int64_t(r.w[0]) + r.w[1] + r.w[2] + r.w[3];
  }
  // Adds the unsigned 32-bit elements of v to 64-bit sums.
  struct Sum64 {
    int64_t total = 0;
    void add(V v) {
      Words r = words(v);
      for (int i = 0; i < 4; i++) total += uint32_t(r.w[i]);
    }
    int64_t value() const { return total; }
  };
};
