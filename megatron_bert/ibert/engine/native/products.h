// SPDX-License-Identifier: Apache-2.0
// Exact products of 8-bit integers with 32-bit sums, one micro kernel per instruction set.
//
// A `Products` struct multiplies up to MR rows of activations with a panel of NR = Vectors::W columns of weights. A panel
// holds its columns in the order in which packing two vectors of 32-bit sums to one of 16-bit results (which works within
// 128-bit lanes) gives them back in natural order: `column(p)` is the natural column at place p.
#pragma once
#include <cstddef>
#include <cstdint>

static constexpr int NR = Vectors::W;
static inline int column(int p) {
  constexpr int half = NR / 2;
  return (p % half) / 4 * 8 + p / half * 4 + p % 4;
}
// Inner dimensions are padded with zero weights to a multiple of this, whatever the instruction set.
static constexpr int K_STEP = 64;

// Weights that are needed next, fetched from memory while others are multiplied: so many lines of 64 bytes for each 64 of
// the inner dimension.
struct Ahead {
  const int8_t* at = nullptr;
  int lines = 0;
#if !defined(TARGET_PLAIN)
  inline void fetch() {
    for (int i = 0; i < lines; i++, at += 64) _mm_prefetch((const char*)at, _MM_HINT_T1);
  }
#endif
};

// Weights in groups of G successive k: [K / G][NR][G].
template <int G>
static inline size_t grouped(int k, int p) {
  return (size_t(k / G) * NR + p) * G + k % G;
}

#if defined(TARGET_PLAIN)
struct Products {
  using Activation = uint8_t;
  static constexpr int MR = 4, ZERO = 128;
  static size_t place(int k, int p) { return grouped<4>(k, p); }
  static void tile(const uint8_t* a, size_t lda, int rows, const int8_t* b, int depth, const int32_t* start, int32_t* c,
                   size_t ldc, Ahead ahead = {}) {
    (void)ahead;
    for (int r = 0; r < rows; r++) {
      uint32_t sums[NR];  // which may wrap on the way to a result that does not
      std::memcpy(sums, start, sizeof sums);
      for (int k = 0; k < depth; k += 4)
        for (int p = 0; p < NR; p++)
          for (int g = 0; g < 4; g++) sums[p] += uint32_t(int32_t(a[r * lda + k + g]) * b[size_t(k) * NR + p * 4 + g]);
      std::memcpy(c + r * ldc, sums, sizeof sums);
    }
  }
};
using AttentionProducts = Products;
#endif

#if defined(TARGET_AVX2) || defined(TARGET_AVX2_SEVEN) || defined(TARGET_AVXVNNI)
template <class F, int R>
static inline void rows256(const typename F::Activation* a, size_t lda, const int8_t* b, int depth,
                           const int32_t* start, int32_t* c, size_t ldc, Ahead ahead) {
  __m256i sums[R][2];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) sums[r][j] = _mm256_loadu_si256((const __m256i*)(start + 8 * j));
  for (int k = 0; k < depth; k += F::G, b += F::G * NR) {
    if (k % K_STEP == 0) ahead.fetch();
    __m256i b0 = F::weights(b), b1 = F::weights(b + F::G * 8);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      int32_t group;
      std::memcpy(&group, a + r * lda + k, 4);
      __m256i x = _mm256_set1_epi32(group);
      sums[r][0] = F::add(sums[r][0], x, b0);
      sums[r][1] = F::add(sums[r][1], x, b1);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) _mm256_storeu_si256((__m256i*)(c + r * ldc + 8 * j), sums[r][j]);
}

template <class F>
struct Products256 : F {
  static constexpr int MR = 6;
  static size_t place(int k, int p) { return grouped<F::G>(k, p); }
  static void tile(const typename F::Activation* a, size_t lda, int rows, const int8_t* b, int depth,
                   const int32_t* start, int32_t* c, size_t ldc, Ahead ahead = {}) {
    switch (rows) {
      case 6: return rows256<F, 6>(a, lda, b, depth, start, c, ldc, ahead);
      case 5: return rows256<F, 5>(a, lda, b, depth, start, c, ldc, ahead);
      case 4: return rows256<F, 4>(a, lda, b, depth, start, c, ldc, ahead);
      case 3: return rows256<F, 3>(a, lda, b, depth, start, c, ldc, ahead);
      case 2: return rows256<F, 2>(a, lda, b, depth, start, c, ldc, ahead);
      default: return rows256<F, 1>(a, lda, b, depth, start, c, ldc, ahead);
    }
  }
};

// Both factors widened to 16 bits: exact whatever the 8 bits are.
struct Wide {
  using Activation = int16_t;
  static constexpr int G = 2, ZERO = 0;
  static __m256i weights(const int8_t* b) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)b)); }
  static __m256i add(__m256i sum, __m256i x, __m256i w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }
};
#endif
#if defined(TARGET_AVX2)
using Products = Products256<Wide>;
using AttentionProducts = Products;
#endif
#if defined(TARGET_AVX2_SEVEN)
// Weights of 7 bits: two products of 255 * 63 fit in 16 bits, so nothing saturates.
struct Seven {
  using Activation = uint8_t;
  static constexpr int G = 4, ZERO = 128;
  static __m256i weights(const int8_t* b) { return _mm256_loadu_si256((const __m256i*)b); }
  static __m256i add(__m256i sum, __m256i x, __m256i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
  }
};
using Products = Products256<Seven>;
using AttentionProducts = Products256<Wide>;  // keys and values may have 8 bits
#endif
#if defined(TARGET_AVXVNNI)
struct Dot {
  using Activation = uint8_t;
  static constexpr int G = 4, ZERO = 128;
  static __m256i weights(const int8_t* b) { return _mm256_loadu_si256((const __m256i*)b); }
  static __m256i add(__m256i sum, __m256i x, __m256i w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
};
using Products = Products256<Dot>;
using AttentionProducts = Products;
#endif

#if defined(TARGET_AVX512) || defined(TARGET_AMX)
template <int R>
static inline void rows512(const uint8_t* a, size_t lda, const int8_t* b, int depth, const int32_t* start, int32_t* c,
                           size_t ldc, Ahead ahead) {
  __m512i sums[R][2];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) sums[r][j] = _mm512_loadu_si512(start + 16 * j);
  for (int k = 0; k < depth;) {
    ahead.fetch();
    for (const int end = k + K_STEP; k < end; k += 4, b += 128) {
      __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
      _mm_prefetch((const char*)(b + 1024), _MM_HINT_T0);
      _mm_prefetch((const char*)(b + 1088), _MM_HINT_T0);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        int32_t group;
        std::memcpy(&group, a + r * lda + k, 4);
        __m512i x = _mm512_set1_epi32(group);
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, b0);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, b1);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) _mm512_storeu_si512(c + r * ldc + 16 * j, sums[r][j]);
}
#endif
#if defined(TARGET_AVX512)
struct Products {
  using Activation = uint8_t;
  static constexpr int MR = 12, ZERO = 128;
  static size_t place(int k, int p) { return grouped<4>(k, p); }
  static void tile(const uint8_t* a, size_t lda, int rows, const int8_t* b, int depth, const int32_t* start, int32_t* c,
                   size_t ldc, Ahead ahead = {}) {
    switch (rows) {
      case 12: return rows512<12>(a, lda, b, depth, start, c, ldc, ahead);
      case 11: return rows512<11>(a, lda, b, depth, start, c, ldc, ahead);
      case 10: return rows512<10>(a, lda, b, depth, start, c, ldc, ahead);
      case 9: return rows512<9>(a, lda, b, depth, start, c, ldc, ahead);
      case 8: return rows512<8>(a, lda, b, depth, start, c, ldc, ahead);
      case 7: return rows512<7>(a, lda, b, depth, start, c, ldc, ahead);
      case 6: return rows512<6>(a, lda, b, depth, start, c, ldc, ahead);
      case 5: return rows512<5>(a, lda, b, depth, start, c, ldc, ahead);
      case 4: return rows512<4>(a, lda, b, depth, start, c, ldc, ahead);
      case 3: return rows512<3>(a, lda, b, depth, start, c, ldc, ahead);
      case 2: return rows512<2>(a, lda, b, depth, start, c, ldc, ahead);
      default: return rows512<1>(a, lda, b, depth, start, c, ldc, ahead);
    }
  }
};
using AttentionProducts = Products;
#endif

#if defined(TARGET_AMX)
// Tiles of 16 rows of 64 bytes; 32 rows by 32 columns at a time. Rows up to the next multiple of 16 are read and written.
//
// Tiles multiply in a unit of their own, so `between` is called for every 64 of the inner dimension to do vector work
// meanwhile: without it that work would wait for the tiles, and they for it.
struct Products {
  using Activation = uint8_t;
  static constexpr int MR = 32, ZERO = 128;
  static size_t place(int k, int p) {
    return size_t(k / 64) * 2048 + (p / 16) * 1024 + (k % 64) / 4 * 64 + (p % 16) * 4 + k % 4;
  }
  template <class Between>
  static inline void tile(const uint8_t* a, size_t lda, int rows, const int8_t* b, int depth, const int32_t* start,
                          int32_t* c, size_t ldc, Ahead ahead, Between between) {
    __asm__ volatile("" ::: "memory");  // compilers do not know that loading a tile reads memory
    // A stride of 0 gives every row of a tile the same start.
    _tile_loadd(0, start, 0);
    _tile_loadd(1, start + 16, 0);
    if (rows > 16) {
      const uint8_t* a1 = a + 16 * lda;
      _tile_loadd(2, start, 0);
      _tile_loadd(3, start + 16, 0);
      for (int k = 0; k < depth; k += 64, b += 2048) {
        ahead.fetch();
        _tile_loadd(4, a + k, lda);
        _tile_loadd(6, b, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbusd(1, 4, 7);
        _tile_loadd(5, a1 + k, lda);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
        between();
      }
      _tile_stored(2, c + 16 * ldc, ldc * 4);
      _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
    } else {
      for (int k = 0; k < depth; k += 64, b += 2048) {
        ahead.fetch();
        _tile_loadd(4, a + k, lda);
        _tile_loadd(6, b, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbusd(1, 4, 7);
        between();
      }
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
  }
  static void tile(const uint8_t* a, size_t lda, int rows, const int8_t* b, int depth, const int32_t* start, int32_t* c,
                   size_t ldc) {
    tile(a, lda, rows, b, depth, start, c, ldc, Ahead(), [] {});
  }
};
using AttentionProducts = Products;
#endif

// Tiles have to be configured on a thread before it multiplies, and released after it.
struct TileScope {
#if defined(TARGET_AMX)
  TileScope() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~TileScope() { _tile_release(); }
#else
  TileScope() {}
  ~TileScope() {}
#endif
  TileScope(const TileScope&) = delete;
};
