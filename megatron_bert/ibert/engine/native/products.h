// SPDX-License-Identifier: Apache-2.0
// Exact products of 8-bit integers with 32-bit sums, one micro kernel per instruction set.
//
// A `Products` struct multiplies up to MR rows of activations with a panel of NR = Vectors::W columns of weights. A panel
// holds its columns in the order in which packing two vectors of 32-bit sums to one of 16-bit results (which works within
// 128-bit lanes) gives them back in natural order: `column(p)` is the natural column at place p.
//
// Products take activations without sign (ZERO has been added to those that have one), or with one (LESS has been
// subtracted from those without: GELU's results and the numerators of softmax), or in 16 bits as they are. A row of them
// has ROOM times the memory that they need.
#pragma once
#include <cstddef>
#include <cstdint>

static constexpr int NR = Vectors::W;
static constexpr int column(int p) {
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
  inline void fetch() {
    for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Weights in groups of G successive k, which lie together whatever else the order is: [K / G][NR][G].
template <int G>
static inline size_t grouped(int k, int p) {
  return (size_t(k / G) * NR + p) * G + k % G;
}

#if defined(TARGET_PLAIN)
struct Products {
  using Activation = uint8_t;
  static constexpr int G = 4, MR = 4, ZERO = 128, LESS = 0, ROOM = 1;
  static size_t place(int k, int p) { return grouped<G>(k, p); }
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

#if !defined(TARGET_PLAIN) && !defined(TARGET_AMX) && !defined(TARGET_NEON_I8MM)
// The sums of R rows by NR columns. A struct of structs, not an array: compilers keep arrays that loops index in memory.
template <class F, int R>
struct RowSums {
  V low, high;
  RowSums<F, R - 1> others;
  inline void set(V first, V second) {
    low = first;
    high = second;
    others.set(first, second);
  }
  inline void add(const typename F::Activation* a, size_t lda, V first, V second) {
    int32_t group;
    std::memcpy(&group, a, 4);
    const V x = S::set32(group);
    low = F::add(low, x, first);
    high = F::add(high, x, second);
    others.add(a + lda, lda, first, second);
  }
  inline void store(int32_t* c, size_t ldc) const {
    S::store(c, low);
    S::store(c + NR / 2, high);
    others.store(c + ldc, ldc);
  }
};
template <class F>
struct RowSums<F, 0> {
  inline void set(V, V) {}
  inline void add(const typename F::Activation*, size_t, V, V) {}
  inline void store(int32_t*, size_t) const {}
};

template <class F, int R>
static void multiply_rows(const typename F::Activation* a, size_t lda, const int8_t* b, int depth, const int32_t* start,
                          int32_t* c, size_t ldc, Ahead ahead) {
  RowSums<F, R> sums;
  sums.set(S::load(start), S::load(start + NR / 2));
  for (int k = 0; k < depth; k += K_STEP) {
    ahead.fetch();
#pragma GCC unroll 2
    for (int i = 0; i < K_STEP; i += F::G, a += F::G, b += F::G * NR)
      sums.add(a, lda, F::weights(b), F::weights(b + F::G * NR / 2));
  }
  sums.store(c, ldc);
}

// F::MR rows at a time, or what is left of them.
template <class F>
struct RowProducts : F {
  static constexpr int ROOM = 1;
  static size_t place(int k, int p) { return grouped<F::G>(k, p); }
  static void tile(const typename F::Activation* a, size_t lda, int rows, const int8_t* b, int depth,
                   const int32_t* start, int32_t* c, size_t ldc, Ahead ahead = {}) {
    least<F::MR>(a, lda, rows, b, depth, start, c, ldc, ahead);
  }

 private:
  template <int R>
  static void least(const typename F::Activation* a, size_t lda, int rows, const int8_t* b, int depth,
                    const int32_t* start, int32_t* c, size_t ldc, Ahead ahead) {
    if constexpr (R > 1)
      if (rows < R) return least<R - 1>(a, lda, rows, b, depth, start, c, ldc, ahead);
    multiply_rows<F, R>(a, lda, b, depth, start, c, ldc, ahead);
  }
};
#endif

#if defined(TARGET_AVX2)
// Both factors widened to 16 bits: exact whatever the 8 bits are.
struct Wide {
  using Activation = int16_t;
  static constexpr int G = 2, MR = 6, ZERO = 0, LESS = 0;
  static V weights(const int8_t* b) { return S::load_s8(b); }
  static V add(V sum, V x, V w) { return S::add32(sum, S::madd(x, w)); }
};
using AttentionProducts = RowProducts<Wide>;

// Products of bytes are added in pairs in 16 bits, where they must fit: two activations times the largest weight. With
// weights of 7 bits any two do. With 8 bits rows are divided first, each activation into a part whose sum with its neighbor
// is small enough, and the rest, which few have: the products of these are added for themselves.
struct Pairs {
  using Activation = uint8_t;
  static constexpr int G = 4, MR = 4, ZERO = 128, LESS = 0;
  static V weights(const int8_t* b) { return S::load(b); }
  static V product(V x, V w) { return S::madd(_mm256_maddubs_epi16(x, w), S::set16(1)); }
  static V add(V sum, V x, V w) { return S::add32(sum, product(x, w)); }
};
struct Products : RowProducts<Pairs> {
  static constexpr int ROOM = 3;

  // What is subtracted from activations that ZERO has been added to, so that of small ones two fit: 76 is left of it.
  static constexpr int TAKEN = 52;
  // The rests of a row of `stride` activations, behind them: of `count` groups of G with any, which, and what.
  struct Rests {
    int8_t* values;
    uint16_t* groups;
    int32_t* count;
    Rests(const Activation* row, size_t stride)
        : values((int8_t*)row + stride), groups((uint16_t*)(row + 2 * stride)), count((int32_t*)(row + 2 * stride + stride / 2)) {}
  };
  // Takes `taken` from all activations of a row, and divides them so that pairs are at most `limit`.
  static void divide(Activation* row, size_t stride, int depth, int taken, int limit) {
    const V less = _mm256_set1_epi8(char(taken)), most = _mm256_set1_epi8(char(limit / 2 > 255 ? 255 : limit / 2));
    const V bound = S::set16(limit), ones = _mm256_set1_epi8(1);
    const Rests rests(row, stride);
    int count = 0;
    for (int k = 0; k < depth; k += 32) {
      const V x = S::load(row + k);
      const V positive = _mm256_subs_epu8(x, less), negative = _mm256_subs_epu8(less, x);
      const V large = _mm256_cmpgt_epi16(_mm256_maddubs_epi16(positive, ones), bound);
      const V part = _mm256_blendv_epi8(positive, _mm256_min_epu8(positive, most), large);
      const V rest = _mm256_sub_epi8(_mm256_sub_epi8(positive, part), negative);
      S::store(row + k, part);
      unsigned found = ~unsigned(_mm256_movemask_epi8(_mm256_cmpeq_epi32(rest, S::zero()))) & 0x11111111u;
      if (!found) continue;
      alignas(32) int8_t bytes[32];
      S::store(bytes, rest);
      for (; found; found &= found - 1, count++) {
        const int at = __builtin_ctz(found);
        rests.groups[count] = uint16_t((k + at) / G);
        std::memcpy(rests.values + G * count, bytes + at, G);
      }
    }
    *rests.count = count;
  }
  // Adds the products of the rests to a tile.
  static void add_rests(const Activation* a, size_t lda, int rows, const int8_t* b, int32_t* c) {
    for (int r = 0; r < rows; r++, a += lda, c += NR) {
      const Rests rests(a, lda / ROOM);
      const int count = *rests.count;
      if (!count) continue;
      V low = S::load(c), high = S::load(c + NR / 2);
      for (int i = 0; i < count; i++) {
        int32_t group;
        std::memcpy(&group, rests.values + G * i, G);
        const V x = S::set32(group), size = _mm256_abs_epi8(x);
        const int8_t* w = b + size_t(rests.groups[i]) * (G * NR);
        low = Pairs::add(low, size, _mm256_sign_epi8(S::load(w), x));
        high = Pairs::add(high, size, _mm256_sign_epi8(S::load(w + G * NR / 2), x));
      }
      S::store(c, low);
      S::store(c + NR / 2, high);
    }
  }
};
#endif
#if defined(TARGET_AVXVNNI) || defined(TARGET_AVX512)
struct Dot {
  using Activation = uint8_t;
  static constexpr int G = 4, ZERO = 128, LESS = 0;
  static V weights(const int8_t* b) { return S::load(b); }
#if defined(TARGET_AVXVNNI)
  static constexpr int MR = 6;
  static V add(V sum, V x, V w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
#else
  static constexpr int MR = 12;
  static V add(V sum, V x, V w) { return _mm512_dpbusd_epi32(sum, x, w); }
#endif
};
using Products = RowProducts<Dot>;
using AttentionProducts = Products;
#endif

#if defined(TARGET_NEON) || defined(TARGET_NEON_DOT)
struct Signed {
  using Activation = int8_t;
  static constexpr int G = 4, ZERO = 0, LESS = 128;
  static V weights(const int8_t* b) { return S::load(b); }
#if defined(TARGET_NEON)
  static constexpr int MR = 8;
  // Two products of -128 * 127 fit in 16 bits.
  static V add(V sum, V x, V w) {
    const int8x16_t a = vreinterpretq_s8_s16(x), b = vreinterpretq_s8_s16(w);
    const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
    return S::vector(vpadalq_s16(S::wide(sum), pairs));
  }
#else
  static constexpr int MR = 12;
  static V add(V sum, V x, V w) {
    return S::vector(vdotq_s32(S::wide(sum), vreinterpretq_s8_s16(x), vreinterpretq_s8_s16(w)));
  }
#endif
};
using Products = RowProducts<Signed>;
using AttentionProducts = Products;
#endif

#if defined(TARGET_NEON_I8MM)
// Two rows by two columns at a time, eight of the inner dimension: a row more is read where their number is odd.
struct Products {
  using Activation = int8_t;
  static constexpr int G = 8, MR = 8, ZERO = 0, LESS = 128, ROOM = 1;
  static size_t place(int k, int p) { return grouped<G>(k, p); }
  static void tile(const int8_t* a, size_t lda, int rows, const int8_t* b, int depth, const int32_t* start, int32_t* c,
                   size_t ldc, Ahead ahead = {}) {
    least<MR / 2>(a, lda, rows, b, depth, start, c, ldc, ahead);
  }

 private:
  template <int R, int = 0>
  struct Pairs {
    int32x4_t sums0, sums1, sums2, sums3;
    Pairs<R - 1> others;
    inline void set(int32x4_t low, int32x4_t high) {
      sums0 = vcombine_s32(vget_low_s32(low), vget_low_s32(low));
      sums1 = vcombine_s32(vget_high_s32(low), vget_high_s32(low));
      sums2 = vcombine_s32(vget_low_s32(high), vget_low_s32(high));
      sums3 = vcombine_s32(vget_high_s32(high), vget_high_s32(high));
      others.set(low, high);
    }
    inline void add(const int8_t* a, size_t lda, int8x16_t w0, int8x16_t w1, int8x16_t w2, int8x16_t w3) {
      const int8x16_t x = vcombine_s8(vld1_s8(a), vld1_s8(a + lda));
      sums0 = vmmlaq_s32(sums0, x, w0);
      sums1 = vmmlaq_s32(sums1, x, w1);
      sums2 = vmmlaq_s32(sums2, x, w2);
      sums3 = vmmlaq_s32(sums3, x, w3);
      others.add(a + 2 * lda, lda, w0, w1, w2, w3);
    }
    inline void store(int32_t* c, size_t ldc, int rows) const {
      vst1q_s32(c, vcombine_s32(vget_low_s32(sums0), vget_low_s32(sums1)));
      vst1q_s32(c + 4, vcombine_s32(vget_low_s32(sums2), vget_low_s32(sums3)));
      if (rows > 1) {
        vst1q_s32(c + ldc, vcombine_s32(vget_high_s32(sums0), vget_high_s32(sums1)));
        vst1q_s32(c + ldc + 4, vcombine_s32(vget_high_s32(sums2), vget_high_s32(sums3)));
      }
      others.store(c + 2 * ldc, ldc, rows - 2);
    }
  };
  template <int UNUSED>
  struct Pairs<0, UNUSED> {
    inline void set(int32x4_t, int32x4_t) {}
    inline void add(const int8_t*, size_t, int8x16_t, int8x16_t, int8x16_t, int8x16_t) {}
    inline void store(int32_t*, size_t, int) const {}
  };
  template <int R>
  static void least(const int8_t* a, size_t lda, int rows, const int8_t* b, int depth, const int32_t* start, int32_t* c,
                    size_t ldc, Ahead ahead) {
    if constexpr (R > 1)
      if (rows <= 2 * (R - 1)) return least<R - 1>(a, lda, rows, b, depth, start, c, ldc, ahead);
    Pairs<R> pairs;
    pairs.set(vld1q_s32(start), vld1q_s32(start + 4));
    for (int k = 0; k < depth; k += 8, a += 8, b += 8 * NR) {
      if (k % K_STEP == 0) ahead.fetch();
      pairs.add(a, lda, vld1q_s8(b), vld1q_s8(b + 16), vld1q_s8(b + 32), vld1q_s8(b + 48));
    }
    pairs.store(c, ldc, rows);
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
  static constexpr int G = 4, MR = 32, ZERO = 128, LESS = 0, ROOM = 1;
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
