// SPDX-License-Identifier: Apache-2.0
// Vectors of sixteen 16-bit (or eight 32-bit) integers with AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>

struct Vectors {
  static constexpr int W = 16;
  using V = __m256i;
  static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
  static void store(void* p, V v) { _mm256_storeu_si256(static_cast<V*>(p), v); }
  static V set16(int a) { return _mm256_set1_epi16(static_cast<short>(a)); }
  static V set32(int32_t a) { return _mm256_set1_epi32(a); }
  static V zero() { return _mm256_setzero_si256(); }
  static V and_(V a, V b) { return _mm256_and_si256(a, b); }
  static V add16(V a, V b) { return _mm256_add_epi16(a, b); }
  static V adds16(V a, V b) { return _mm256_adds_epi16(a, b); }
  static V sub16(V a, V b) { return _mm256_sub_epi16(a, b); }
  static V min16(V a, V b) { return _mm256_min_epi16(a, b); }
  static V max16(V a, V b) { return _mm256_max_epi16(a, b); }
  static V abs16(V a) { return _mm256_abs_epi16(a); }
  static V mul(V a, V b) { return _mm256_mulhrs_epi16(a, b); }
  static V mulhi_u16(V a, V b) { return _mm256_mulhi_epu16(a, b); }
  static V sll16(V a, int n) { return _mm256_sll_epi16(a, _mm_cvtsi32_si128(n)); }
  static V srl16(V a, int n) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(n)); }
  static V shifted256(V z) {  // there is no 16-bit variable shift: a table of bytes, and 256 apart
    const V table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0));
    V index = _mm256_or_si256(_mm256_min_epi16(z, set16(15)), set16(-32768));
    V whole = _mm256_and_si256(_mm256_cmpeq_epi16(z, zero()), set16(256));
    return _mm256_or_si256(_mm256_shuffle_epi8(table, index), whole);
  }
  static V add32(V a, V b) { return _mm256_add_epi32(a, b); }
  static V sub32(V a, V b) { return _mm256_sub_epi32(a, b); }
  static V min32(V a, V b) { return _mm256_min_epi32(a, b); }
  static V max32(V a, V b) { return _mm256_max_epi32(a, b); }
  static V minu32(V a, V b) { return _mm256_min_epu32(a, b); }
  static V sra32(V a, int n) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(n)); }
  static V sll32(V a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  static V srav32(V a, V n) { return _mm256_srav_epi32(a, n); }
  static V sllv32(V a, V n) { return _mm256_sllv_epi32(a, n); }
  static V packs32(V a, V b) { return _mm256_packs_epi32(a, b); }
  static V packus32(V a, V b) { return _mm256_packus_epi32(a, b); }
  static V unpack_lo(V a, V b) { return _mm256_unpacklo_epi16(a, b); }
  static V unpack_hi(V a, V b) { return _mm256_unpackhi_epi16(a, b); }
  static V madd(V a, V b) { return _mm256_madd_epi16(a, b); }
  static void store8(void* p, V v) {
    V low = _mm256_and_si256(v, set16(255));
    V bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
  }
  static V load_s8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static int32_t largest32(V v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    return _mm_cvtsi128_si32(m);
  }
  static int64_t sum32(V v) {
    V wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                              _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
    __m128i s = _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(s, _mm_unpackhi_epi64(s, s)));
  }
  struct Sum64 {
    V even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
    void add(V v) {
      even = _mm256_add_epi64(even, _mm256_and_si256(v, _mm256_set1_epi64x(0xffffffff)));
      odd = _mm256_add_epi64(odd, _mm256_srli_epi64(v, 32));
    }
    int64_t value() const {
      V both = _mm256_add_epi64(even, odd);
      __m128i s = _mm_add_epi64(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
      return _mm_cvtsi128_si64(_mm_add_epi64(s, _mm_unpackhi_epi64(s, s)));
    }
  };
};
