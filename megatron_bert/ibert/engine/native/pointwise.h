// SPDX-License-Identifier: Apache-2.0
// Element-wise integer arithmetic on vectors of 16 bits.
#pragma once

using Activation = Products::Activation;

// A row of activations, of which `stride` have room in one.
static inline Activation* activations(void* rows, size_t stride, int row) {
  return (Activation*)rows + row * stride * Products::ROOM;
}

static inline V clamped(V v, int limit) { return S::max16(S::min16(v, S::set16(limit)), S::set16(-limit)); }

// Stores signed 8-bit results as what products read.
template <class A, int ZERO>
static inline void store_activation(A* p, V v) {
  if constexpr (sizeof(A) == 2)
    S::store(p, v);
  else
    S::store8(p, S::add16(v, S::set16(ZERO)));
}

// rs of a 16-bit value, saturated to 16 bits: a rounding shift to the right, or a shift to the left.
static inline V shifted16(V x, int shift) {
  if (shift > 15) return S::zero();
  if (shift > 0) return S::mul(x, S::set16(1 << (15 - shift)));
  for (int i = 0; i > shift && i > -16; i--) x = S::adds16(x, x);
  return x;
}

// rs of 32-bit sums with the same shift for all: sat16 of two vectors.
static inline V shifted32(V lo, V hi, int shift) {
  if (shift > 30) return S::zero();
  if (shift > 0) {
    const V half = S::set32(1 << (shift - 1));
    return S::packs32(S::sra32(S::add32(lo, half), shift), S::sra32(S::add32(hi, half), shift));
  }
  const V high = S::set32(32767), low = S::set32(-32767);
  const int left = -shift > 16 ? 16 : -shift;
  if (left == 0) return S::packs32(lo, hi);
  lo = S::sll32(S::max32(S::min32(lo, high), low), left);
  hi = S::sll32(S::max32(S::min32(hi, high), low), left);
  return S::packs32(lo, hi);
}

// GELU of w (scale 2^-exponent) before its result is scaled.
struct GeluConstants {
  V cut, c5, c4, c3, c2;
  int left;
  explicit GeluConstants(int exponent)
      : cut(S::set16(exponent >= 1 ? 7 << (exponent - 1) : 3)),
        c5(S::set16(-15097)),
        c4(S::set16(29496)),
        c3(S::set16(-9868)),
        c2(S::set16(1655)),
        left(13 - exponent) {}
};
static inline V gelu(V w, const GeluConstants& c) {
  V t = S::min16(S::abs16(w), c.cut);
  V u = S::sll16(S::sub16(c.cut, t), c.left);
  V h = S::add16(S::mul(u, c.c5), c.c4);
  h = S::add16(S::mul(h, u), c.c3);
  h = S::add16(S::mul(h, u), c.c2);
  V p = S::mul(S::mul(h, u), u);
  return S::sub16(S::max16(w, S::zero()), S::mul(t, S::sll16(p, 2)));
}

static void gelu16(const Gelu& g, int16_t* values, size_t count) {
  const GeluConstants constants(g.exponent);
  for (size_t i = 0; i < count; i += NR) S::store(values + i, gelu(S::load(values + i), constants));
}

static inline int bit_length(uint64_t n) { return n == 0 ? 0 : 64 - __builtin_clzll(n); }

static inline uint64_t square_root(uint64_t n) {
  if (n == 0) return 0;
  uint64_t root = uint64_t(1) << ((bit_length(n) + 1) / 2);  // above the root, so that Newton's steps fall
  for (;;) {
    uint64_t next = (root + n / root) >> 1;
    if (next >= root) return root;
    root = next;
  }
}

// ---------------------------------------------------------------- layer norm

struct PackedNormHeader {
  int columns, read, shift, limit, read_limit, spread;
  int64_t epsilon;
};
static size_t packed_norm_bytes(int columns) { return 64 + rounded_up(columns, 64) * 8; }
static const int32_t* norm_gain(const PackedNorm* n) { return (const int32_t*)((const uint8_t*)n + 64); }
static const int32_t* norm_offset(const PackedNorm* n, int columns) {
  return norm_gain(n) + rounded_up(columns, 64);
}
static void pack_norm(const Norm& n, int columns, uint8_t* memory) {
  PackedNormHeader header = {columns, n.read, n.shift, n.limit, n.read_limit, 0, n.epsilon};
  header.spread = 14 - (bit_length(columns - 1) + 1) / 2;
  std::memcpy(memory, &header, sizeof header);
  auto* gain = (int32_t*)(memory + 64);
  int32_t* offset = gain + rounded_up(columns, 64);
  // In the order of the low and the high halves of 128-bit lanes, which is that of the columns of a panel.
  for (size_t i = 0; i < rounded_up(columns, 64); i++) {
    size_t from = i / NR * NR + column(int(i % NR));
    bool real = from < size_t(columns);
    gain[i] = real ? int32_t(uint16_t(n.gain[from])) : 0;
    offset[i] = real ? n.offset[from] : 0;
  }
}

// What a norm or a sum reads of the stream, whose elements never are -32768.
static inline V read_stream(V x, int shift, int limit) {
  return shift == 0 && limit == 32767 ? x : clamped(shifted16(x, shift), limit);
}

// `store(column, v)` gets the results of one row.
template <class F>
static inline void normalize(const PackedNorm* norm, const int16_t* x, F store) {
  PackedNormHeader n;
  std::memcpy(&n, norm, sizeof n);
  const int columns = n.columns;
  const V ones = S::set16(1), zero = S::zero();
  V sum = zero;
  S::Sum64 squares;
  auto at = [&](int i) { return read_stream(S::load(x + i), n.read, n.read_limit); };
  auto add = [&](V v) {
    sum = S::add32(sum, S::madd(v, ones));
    squares.add(S::madd(v, v));
  };
  int whole = columns / NR * NR;
  for (int i = 0; i < whole; i += NR) add(at(i));
  if (whole < columns) {
    int16_t rest[NR] = {};
    std::memcpy(rest, x + whole, sizeof(int16_t) * (columns - whole));
    add(read_stream(S::load(rest), n.read, n.read_limit));
  }
  const int64_t s1 = S::sum32(sum), s2 = squares.value();
  const uint64_t variance = uint64_t(columns) * uint64_t(s2) - uint64_t(s1) * uint64_t(s1) + uint64_t(n.epsilon);
  uint64_t deviation = int64_t(variance) <= 0 ? 1 : square_root(variance);
  if (deviation == 0) deviation = 1;
  const int length = bit_length(deviation);
  const int shift = length - 1 - n.spread;
  uint64_t m = (uint64_t(1) << (length + 14)) / deviation;
  const V multiplier = S::set16(m > 32767 ? 32767 : int(m));
  const V width = S::set32(columns), total = S::set32(int32_t(s1));
  const int32_t *gain = norm_gain(norm), *offset = norm_offset(norm, columns);
  const int half = NR / 2;
  for (int i = 0; i < columns; i += NR) {
    V v = at(i);
    V lo = S::sub32(S::madd(S::unpack_lo(v, zero), width), total);
    V hi = S::sub32(S::madd(S::unpack_hi(v, zero), width), total);
    V y = S::mul(shifted32(lo, hi, shift), multiplier);
    lo = S::madd(S::unpack_lo(y, zero), S::load(gain + i));
    hi = S::madd(S::unpack_hi(y, zero), S::load(gain + i + half));
    lo = S::sra32(S::add32(lo, S::load(offset + i)), n.shift);
    hi = S::sra32(S::add32(hi, S::load(offset + i + half)), n.shift);
    store(i, clamped(S::packs32(lo, hi), n.limit));
  }
}
