// SPDX-License-Identifier: Apache-2.0
// Attention of one sequence and head: scores, softmax numerators and their product with the values, blocked by queries.
#pragma once

struct AttentionShape {
  int dim, longest;
  int padded_dim, value_panels, key_panels, padded_keys, query_block;
  size_t keys_at, key_starts_at, values_at, value_starts_at, queries_at, scores_at, numerators_at, means_at, bytes;
};
using QueryPart = AttentionProducts::Activation;

static AttentionShape attention_shape(int dim, int longest) {
  AttentionShape s;
  s.dim = dim;
  s.longest = longest;
  s.padded_dim = int(rounded_up(dim, K_STEP));
  s.value_panels = int(rounded_up(dim, NR) / NR);
  s.key_panels = int(rounded_up(longest, NR) / NR);
  s.padded_keys = int(rounded_up(longest, K_STEP));
  constexpr int MR = AttentionProducts::MR;
  s.query_block = MR >= 24 ? MR : 24 / MR * MR;
  size_t at = 0;
  auto take = [&at](size_t bytes) {
    size_t here = at;
    at += rounded_up(bytes, 64);
    return here;
  };
  s.keys_at = take(size_t(s.key_panels) * NR * s.padded_dim);
  s.key_starts_at = take(size_t(s.key_panels) * NR * 4);
  s.values_at = take(size_t(s.value_panels) * NR * s.padded_keys);
  s.value_starts_at = take(size_t(s.value_panels) * NR * 4);
  s.queries_at = take(size_t(s.query_block) * s.padded_dim * sizeof(QueryPart));
  s.scores_at = take(size_t(s.query_block) * s.key_panels * NR * 4);
  s.numerators_at = take(size_t(s.query_block) * s.padded_keys * sizeof(QueryPart) + 64);
  s.means_at = take(size_t(s.query_block) * NR * 4);
  s.bytes = at;
  return s;
}

static size_t scratch_bytes(int dim, int longest) { return attention_shape(dim, longest).bytes; }

// Keys as the weights of a product: a column each. The start of a column undoes what queries have been offset by.
static void pack_keys(const AttentionShape& s, const int8_t* keys, size_t stride, int count, uint8_t* scratch) {
  auto* packed = (int8_t*)scratch + s.keys_at;
  auto* starts = (int32_t*)(scratch + s.key_starts_at);
  const int panels = int(rounded_up(count, NR) / NR), dim = s.dim;  // stores of bytes may alias whatever is not local
  const size_t panel_bytes = size_t(NR) * s.padded_dim;
  if (dim < s.padded_dim || count < panels * NR) std::memset(packed, 0, panels * panel_bytes);
  for (int panel = 0; panel < panels; panel++) {
    for (int p = 0; p < NR; p++) {
      const int key = panel * NR + column(p);
      if (key >= count) {
        starts[panel * NR + p] = -(1 << 29);  // never the largest score
        continue;
      }
      const int8_t* row = keys + key * stride;
      int8_t* to = packed + panel * panel_bytes;
      int32_t sum = 0;
      int k = 0;
      for (; k + 4 <= dim; k += 4) {
        int32_t group;
        std::memcpy(&group, row + k, 4);
        if constexpr (sizeof(QueryPart) == 2) {
          const int16_t low = int16_t(group), high = int16_t(group >> 16);
          std::memcpy(to + AttentionProducts::place(k, p), &low, 2);
          std::memcpy(to + AttentionProducts::place(k + 2, p), &high, 2);
        } else {
          std::memcpy(to + AttentionProducts::place(k, p), &group, 4);
        }
      }
      for (; k < dim; k++) to[AttentionProducts::place(k, p)] = row[k];
      if (AttentionProducts::ZERO)
        for (k = 0; k < dim; k++) sum += row[k];
      starts[panel * NR + p] = -AttentionProducts::ZERO * sum;
    }
  }
}

// Values as the weights of a product whose inner dimension are the keys. The start of a column undoes what has been
// subtracted from numerators.
static void pack_values(const AttentionShape& s, const int8_t* values, size_t stride, int count, int padded,
                        uint8_t* scratch) {
  auto* packed = (int8_t*)scratch + s.values_at;
  const size_t panel_bytes = size_t(NR) * padded;
  if (count < padded || s.dim % NR) std::memset(packed, 0, panel_bytes * s.value_panels);
  const int dim = s.dim, value_panels = s.value_panels;
  auto* starts = (int32_t*)(scratch + s.value_starts_at);
  std::memset(starts, 0, size_t(value_panels) * NR * 4);
  static_assert(AttentionProducts::LESS == 0 || column(NR / 2) == NR / 2, "columns in natural order");
  if (AttentionProducts::LESS) {
    for (int key = 0; key < count; key++)
      for (int d = 0; d < dim; d++) starts[d] += values[key * stride + d];
    for (int d = 0; d < dim; d++) starts[d] *= AttentionProducts::LESS;
  }
  int key = 0;
#if defined(TARGET_AVX512) || defined(TARGET_AMX) || defined(TARGET_AVXVNNI)
  // Four keys by sixteen columns at a time: bytes of a column together.
  const int whole = dim / 16 * 16;
  for (; key + 4 <= count; key += 4) {
    const int8_t* row = values + key * stride;
    for (int d = 0; d < whole; d += 16) {
      auto at = [&](int i) { return _mm_loadu_si128((const __m128i*)(row + i * stride + d)); };
      const __m128i a = at(0), b = at(1), c = at(2), e = at(3);
      const __m128i ab_lo = _mm_unpacklo_epi8(a, b), ab_hi = _mm_unpackhi_epi8(a, b);
      const __m128i ce_lo = _mm_unpacklo_epi8(c, e), ce_hi = _mm_unpackhi_epi8(c, e);
      const __m128i out[4] = {_mm_unpacklo_epi16(ab_lo, ce_lo), _mm_unpackhi_epi16(ab_lo, ce_lo),
                              _mm_unpacklo_epi16(ab_hi, ce_hi), _mm_unpackhi_epi16(ab_hi, ce_hi)};
      int8_t* to = packed + d / NR * panel_bytes;
      for (int i = 0; i < 4; i++) {
        const int block = (d % NR) / 4 + i;  // of four natural columns
        const int p = (block / 2 + block % 2 * (NR / 8)) * 4;
        _mm_storeu_si128((__m128i*)(to + AttentionProducts::place(key, p)), out[i]);
      }
    }
    for (int d = whole; d < dim; d++)
      for (int i = 0; i < 4; i++) {
        const int natural = d % NR, p = (natural / 8) * 4 + natural / 4 % 2 * (NR / 2) + natural % 4;
        packed[d / NR * panel_bytes + AttentionProducts::place(key + i, p)] = row[i * stride + d];
      }
  }
#elif defined(TARGET_AVX2)
  // Two keys by sixteen columns, which is a panel.
  if (dim % NR == 0)
    for (; key + 2 <= count; key += 2) {
      const int8_t* row = values + key * stride;
      for (int panel = 0; panel < value_panels; panel++) {
        const __m128i a = _mm_loadu_si128((const __m128i*)(row + panel * NR));
        const __m128i b = _mm_loadu_si128((const __m128i*)(row + stride + panel * NR));
        const __m128i lo = _mm_unpacklo_epi8(a, b), hi = _mm_unpackhi_epi8(a, b);
        int8_t* to = packed + panel * panel_bytes + AttentionProducts::place(key, 0);
        _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi64(lo, hi));
        _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi64(lo, hi));
      }
    }
#elif defined(TARGET_NEON) || defined(TARGET_NEON_DOT)
  // Four keys by eight columns, which is a panel.
  if (dim % NR == 0)
    for (; key + 4 <= count; key += 4) {
      const int8_t* row = values + key * stride;
      for (int panel = 0; panel < value_panels; panel++, row += NR) {
        const int8x8x4_t four = {{vld1_s8(row), vld1_s8(row + stride), vld1_s8(row + 2 * stride), vld1_s8(row + 3 * stride)}};
        vst4_s8(packed + panel * panel_bytes + AttentionProducts::place(key, 0), four);
      }
    }
#endif
  for (; key < count; key++)
    for (int panel = 0; panel < value_panels; panel++)
      for (int p = 0; p < NR; p++) {
        const int d = panel * NR + column(p);
        if (d < dim)
          packed[panel * panel_bytes + AttentionProducts::place(key, p)] = values[key * stride + d];
      }
}

// A query as products read it: with what is added to signed integers, or in 16 bits.
static inline void take_query(const int8_t* query, int dim, QueryPart* to) {
  int k = 0;
  if constexpr (sizeof(QueryPart) == 1) {
    for (; k + 8 <= dim; k += 8) {
      uint64_t eight;
      std::memcpy(&eight, query + k, 8);
      if (AttentionProducts::ZERO) eight ^= 0x8080808080808080u;  // adds 128 to each
      std::memcpy(to + k, &eight, 8);
    }
  } else {
    for (; k + NR <= dim; k += NR) S::store(to + k, S::load_s8(query + k));
  }
  for (; k < dim; k++) to[k] = QueryPart(query[k] + AttentionProducts::ZERO);
}

// A row of scores to numerators; returns their sum.
template <bool LEFT>
static inline int32_t numerators(const int32_t* scores, int keys, int padded, int shift, V multiplier, QueryPart* out) {
  const int half = NR / 2, panels = (keys + NR - 1) / NR;
  V largest = S::load(scores);
  for (int i = half; i < panels * NR; i += half) largest = S::max32(largest, S::load(scores + i));
  const V top = S::set32(S::largest32(largest)), ones = S::set16(1);
  const V c3 = S::set16(-1305), c2 = S::set16(7562), c1 = S::set16(-22579), c0 = S::set16(32640), mask = S::set16(2047);
  V sum = S::zero();
  auto step = [&](int i) {
    V lo = S::sub32(top, S::load(scores + i)), hi = S::sub32(top, S::load(scores + i + half));
    if constexpr (LEFT) {
      const V bound = S::set32(32768), full = S::set32(65535);
      lo = S::minu32(S::sll32(S::minu32(lo, bound), -shift), full);
      hi = S::minu32(S::sll32(S::minu32(hi, bound), -shift), full);
    } else {
      lo = S::sra32(lo, shift);
      hi = S::sra32(hi, shift);
    }
    V t = S::mulhi_u16(S::packus32(lo, hi), multiplier);
    V z = S::srl16(t, 11), f = S::sll16(S::and_(t, mask), 4);
    V h = S::add16(S::mul(f, c3), c2);
    h = S::add16(S::mul(h, f), c1);
    V e = S::add16(S::mul(h, f), c0);
    return S::mul(e, S::shifted256(z));
  };
  auto put = [&](int i, V p) {
    sum = S::add32(sum, S::madd(p, ones));
    if constexpr (sizeof(QueryPart) == 2)
      S::store(out + i, p);
    else
      S::store8(out + i, S::sub16(p, S::set16(AttentionProducts::LESS)));
  };
  int i = 0;
  for (; i + NR <= keys; i += NR) put(i, step(i));
  if (i < keys) {
    int16_t rest[NR];
    S::store(rest, step(i));
    for (int j = keys - i; j < NR; j++) rest[j] = 0;
    put(i, S::load(rest));
    i += NR;
  }
  for (; i < padded; i++) out[i] = 0;
  return int32_t(S::sum32(sum));
}

struct AttentionJob {
  const Layer* layer;
  const AttentionShape* shape;
  const int8_t* qkv;
  size_t qkv_stride;
  const int32_t* starts;
  int heads, attended, units, counter;
  void* context;
  size_t context_stride;
  uint8_t* scratch;
  size_t scratch_stride;

  void unit(int u, uint8_t* memory) const {
    const AttentionShape& s = *shape;
    const int sequence = u / heads, head = u % heads;
    const int first = starts[sequence], count = starts[sequence + 1] - first;
    const int dim = s.dim;
    const int8_t* queries = qkv + first * qkv_stride + head * dim;
    const int padded = int(rounded_up(count, K_STEP)), key_panels = (count + NR - 1) / NR;
    pack_keys(s, queries + attended, qkv_stride, count, memory);
    pack_values(s, queries + 2 * attended, qkv_stride, count, padded, memory);
    auto* own_queries = (QueryPart*)(memory + s.queries_at);
    auto* scores = (int32_t*)(memory + s.scores_at);
    auto* own_numerators = (QueryPart*)(memory + s.numerators_at);
    auto* means = (int32_t*)(memory + s.means_at);
    const auto* keys = (const int8_t*)memory + s.keys_at;
    const auto* key_starts = (const int32_t*)(memory + s.key_starts_at);
    const auto* values = (const int8_t*)memory + s.values_at;
    const auto* value_starts = (const int32_t*)(memory + s.value_starts_at);
    const V multiplier = S::set16(layer->score_multiplier);
    constexpr int MR = AttentionProducts::MR;
    int32_t totals[64];
    for (int row = 0; row < count; row += s.query_block) {
      const int rows = count - row < s.query_block ? count - row : s.query_block;
      for (int r = 0; r < rows; r++)
        take_query(queries + (row + r) * qkv_stride, dim, own_queries + r * s.padded_dim);
      const size_t ld = size_t(key_panels) * NR;
      for (int panel = 0; panel < key_panels; panel++)
        for (int r = 0; r < rows; r += MR)
          AttentionProducts::tile(own_queries + r * s.padded_dim, s.padded_dim, rows - r < MR ? rows - r : MR,
                                  keys + size_t(panel) * NR * s.padded_dim, s.padded_dim, key_starts + panel * NR,
                                  scores + r * ld + panel * NR, ld);
      for (int r = 0; r < rows; r++)
        totals[r] = layer->score_shift < 0 ? numerators<true>(scores + r * ld, count, padded, layer->score_shift,
                                                              multiplier, own_numerators + r * padded)
                                           : numerators<false>(scores + r * ld, count, padded, layer->score_shift,
                                                               multiplier, own_numerators + r * padded);
      for (int panel = 0; panel < s.value_panels; panel++) {
        for (int r = 0; r < rows; r += MR)
          AttentionProducts::tile(own_numerators + r * padded, padded, rows - r < MR ? rows - r : MR,
                                  values + size_t(panel) * NR * padded, padded, value_starts + panel * NR, means + r * NR, NR);
        for (int r = 0; r < rows; r++) {
          const int length = bit_length(totals[r]);
          const uint64_t inverse = (uint64_t(1) << (length + 15)) / uint64_t(totals[r]);
          const int factor = int((inverse * uint64_t(layer->context_multiplier)) >> 20);
          V o = shifted32(S::load(means + r * NR), S::load(means + r * NR + NR / 2),
                          length - 5 - layer->context_exponent);
          o = clamped(S::mul(o, S::set16(factor)), layer->context_limit);
          Activation* to = activations(context, context_stride, first + row + r) + head * s.dim + panel * NR;
          if (panel * NR + NR <= s.dim) {
            store_activation<Activation, Products::ZERO>(to, o);
          } else {
            Activation rest[NR];
            store_activation<Activation, Products::ZERO>(rest, o);
            std::memcpy(to, rest, (s.dim - panel * NR) * sizeof(Activation));
          }
        }
      }
    }
  }
  static void part(void* argument, int thread) {
    auto* job = static_cast<AttentionJob*>(argument);
    TileScope scope;
    uint8_t* memory = job->scratch + thread * job->scratch_stride;
    for (int u = next_unit(&job->counter); u < job->units; u = next_unit(&job->counter)) job->unit(u, memory);
  }
};
