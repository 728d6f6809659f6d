// SPDX-License-Identifier: Apache-2.0
// Whole encoder layers.
#pragma once

static void norm16(Pool* pool, const PackedNorm* norm, int, int rows, int16_t* stream, size_t stride) {
  for_rows(pool, rows, [=](int row) {
    int16_t* x = stream + row * stride;
    normalize(norm, x, [=](int i, V v) { S::store(x + i, v); });
  });
}

static void norm8(Pool* pool, const PackedNorm* norm, int, int rows, const int16_t* stream, size_t stride, void* out,
                  size_t out_stride) {
  for_rows(pool, rows, [=](int row) {
    Activation* to = activations(out, out_stride, row);
    normalize(norm, stream + row * stride, [=](int i, V v) { store_activation<Activation, Products::ZERO>(to + i, v); });
  });
}

static void read8(Pool* pool, const Read8& read, int columns, int rows, const int16_t* stream, size_t stride, void* out,
                  size_t out_stride) {
  const V multiplier = S::set16(read.multiplier);
  const int shift = read.shift, limit = read.limit;
  for_rows(pool, rows, [=](int row) {
    Activation* to = activations(out, out_stride, row);
    for (int i = 0; i < columns; i += NR) {
      V v = S::mul(shifted16(S::load(stream + row * stride + i), shift), multiplier);
      store_activation<Activation, Products::ZERO>(to + i, clamped(v, limit));
    }
  });
}

static void embed_row(const int8_t* word, int shift, int multiplier, int limit, int columns, int16_t* out) {
  int i = 0;
  for (; i + NR <= columns; i += NR)
    S::store(out + i, clamped(S::mul(shifted16(S::load_s8(word + i), shift), S::set16(multiplier)), limit));
  if (i < columns) {
    int8_t rest[NR] = {};
    std::memcpy(rest, word + i, columns - i);
    int16_t results[NR];
    S::store(results, clamped(S::mul(shifted16(S::load_s8(rest), shift), S::set16(multiplier)), limit));
    std::memcpy(out + i, results, sizeof(int16_t) * (columns - i));
  }
}

static void add_product(Pool* pool, const Packed* matrix, void* in, size_t in_stride, int rows, int read,
                        int limit, int16_t* stream, size_t stride) {
  if (read == 0) {
    multiply<false>(pool, matrix, in, in_stride, rows, [=](int panel, int row, V v) {
      int16_t* x = stream + row * stride + panel * NR;
      S::store(x, clamped(S::adds16(S::load(x), v), limit));
    });
  } else {
    multiply<false>(pool, matrix, in, in_stride, rows, [=](int panel, int row, V v) {
      int16_t* x = stream + row * stride + panel * NR;
      S::store(x, clamped(S::adds16(read_stream(S::load(x), read, 32767), v), limit));
    });
  }
}

static void layer(Pool* pool, const Layer& l, const Packed* const matrices[4], const PackedNorm* const norms[2],
                  const Sizes& sizes, const int32_t* starts, const Buffers& b) {
  const int rows = sizes.tokens, hidden = sizes.hidden, attended = l.query_key_value.rows / 3;
  const size_t stride = rounded_up(hidden, K_STEP), context_stride = rounded_up(attended, K_STEP);
  const size_t wide_stride = rounded_up(l.intermediate.rows, K_STEP), qkv_stride = rounded_up(3 * attended, K_STEP);
  void *narrow = b.narrow, *wide = b.wide;
  if (l.post)
    read8(pool, l.read_attention, hidden, rows, b.stream, stride, narrow, stride);
  else
    norm8(pool, norms[0], hidden, rows, b.stream, stride, narrow, stride);
  int8_t* qkv = b.qkv;
  multiply<false>(pool, matrices[0], narrow, stride, rows, [=, limit = l.query_limit](int panel, int row, V v) {
    S::store8(qkv + row * qkv_stride + panel * NR, clamped(v, limit));
  });
  const AttentionShape shape = attention_shape(attended / l.heads, sizes.longest);
  AttentionJob job = {&l,     &shape,         qkv,       qkv_stride,      starts, l.heads, attended, sizes.sequences * l.heads, 0,
                      narrow, context_stride, b.scratch, b.scratch_stride};
  pool->run(pool, AttentionJob::part, &job);
  add_product(pool, matrices[1], narrow, context_stride, rows, l.attention_read, l.attention_limit, b.stream, stride);
  if (l.post) {
    norm16(pool, norms[0], hidden, rows, b.stream, stride);
    read8(pool, l.read_mlp, hidden, rows, b.stream, stride, narrow, stride);
  } else {
    norm8(pool, norms[1], hidden, rows, b.stream, stride, narrow, stride);
  }
  const GeluConstants gelu_constants(l.gelu.exponent);
  const int zero_point = l.gelu.zero_point, top = l.gelu.top, stored_zero = zero_point - Products::LESS;
  const V scale = S::set16(l.gelu.multiplier);
  multiply<false>(pool, matrices[2], narrow, stride, rows, [=](int panel, int row, V v) {
    V y = S::mul(gelu(v, gelu_constants), scale);
    y = S::max16(S::min16(y, S::set16(top - zero_point)), S::set16(-zero_point));
    store_activation<Activation, 0>(activations(wide, wide_stride, row) + panel * NR, S::add16(y, S::set16(stored_zero)));
  });
  add_product(pool, matrices[3], wide, wide_stride, rows, l.output_read, l.output_limit, b.stream, stride);
  if (l.post) norm16(pool, norms[1], hidden, rows, b.stream, stride);
}
