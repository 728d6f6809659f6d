// SPDX-License-Identifier: Apache-2.0
// Vectors of thirty-two 16-bit (or sixteen 32-bit) integers with AVX-512 (F, BW, VL, DQ).
#pragma once
#include <immintrin.h>

#include <cstdint>

struct Vectors {
  static constexpr int W = 32;
  using V = __m512i;
  static V load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, V v) { _mm512_storeu_si512(p, v); }
  static V set16(int a) { return _mm512_set1_epi16(static_cast<short>(a)); }
  static V set32(int32_t a) { return _mm512_set1_epi32(a); }
  static V zero() { return _mm512_setzero_si512(); }
  static V and_(V a, V b) { return _mm512_and_si512(a, b); }
  static V add16(V a, V b) { return _mm512_add_epi16(a, b); }
  static V adds16(V a, V b) { return _mm512_adds_epi16(a, b); }
  static V sub16(V a, V b) { return _mm512_sub_epi16(a, b); }
  static V min16(V a, V b) { return _mm512_min_epi16(a, b); }
  static V max16(V a, V b) { return _mm512_max_epi16(a, b); }
  static V abs16(V a) { return _mm512_abs_epi16(a); }
  static V mul(V a, V b) { return _mm512_mulhrs_epi16(a, b); }
  static V mulhi_u16(V a, V b) { return _mm512_mulhi_epu16(a, b); }
  static V sll16(V a, int n) { return _mm512_sll_epi16(a, _mm_cvtsi32_si128(n)); }
  static V srl16(V a, int n) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(n)); }
  static V shifted256(V z) { return _mm512_srlv_epi16(set16(256), z); }
  static V add32(V a, V b) { return _mm512_add_epi32(a, b); }
  static V sub32(V a, V b) { return _mm512_sub_epi32(a, b); }
  static V min32(V a, V b) { return _mm512_min_epi32(a, b); }
  static V max32(V a, V b) { return _mm512_max_epi32(a, b); }
  static V minu32(V a, V b) { return _mm512_min_epu32(a, b); }
  static V sra32(V a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
  static V sll32(V a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
  static V srav32(V a, V n) { return _mm512_srav_epi32(a, n); }
  static V sllv32(V a, V n) { return _mm512_sllv_epi32(a, n); }
  static V packs32(V a, V b) { return _mm512_packs_epi32(a, b); }
  static V packus32(V a, V b) { return _mm512_packus_epi32(a, b); }
  static V unpack_lo(V a, V b) { return _mm512_unpacklo_epi16(a, b); }
  static V unpack_hi(V a, V b) { return _mm512_unpackhi_epi16(a, b); }
  static V madd(V a, V b) { return _mm512_madd_epi16(a, b); }
  static void store8(void* p, V v) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi16_epi8(v)); }
  static V load_s8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static int32_t largest32(V v) { return _mm512_reduce_max_epi32(v); }
  static int64_t sum32(V v) {
    return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                                                    _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1))));
  }
  struct Sum64 {
    V even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
    void add(V v) {
      even = _mm512_add_epi64(even, _mm512_and_si512(v, _mm512_set1_epi64(0xffffffff)));
      odd = _mm512_add_epi64(odd, _mm512_srli_epi64(v, 32));
    }
    int64_t value() const { return _mm512_reduce_add_epi64(_mm512_add_epi64(even, odd)); }
  };
};
