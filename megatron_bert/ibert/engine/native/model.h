// SPDX-License-Identifier: Apache-2.0
// What a loaded plan holds, and what targets (instruction sets) offer for it. Plain structs: each target is compiled
// with its own flags, so nothing here may be a function whose one compiled copy another target could be given.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ibert {

// As the plan has them, all in natural order.
struct Rescale {
  const int8_t* shift;        // [n], -15 to 30
  const int16_t* multiplier;  // [n], 0 to 32767
};
struct Matrix {
  int rows, depth;
  const int8_t* weight;  // [rows, depth]
  const int32_t* bias;   // [rows]
};
struct Norm {
  int read;
  const int16_t* gain;    // [columns]
  const int32_t* offset;  // [columns]
  int shift;
  int64_t epsilon;
  int limit, read_limit;
};
struct Read8 {
  int shift, multiplier, limit;
};
struct Gelu {
  int exponent, multiplier, zero_point, top;
};
struct Layer {
  bool post;
  Read8 read_attention, read_mlp;
  Norm attention_norm, mlp_norm;
  Matrix query_key_value, attention_output, intermediate, output;
  Rescale query_key_value_rescale, attention_output_rescale, intermediate_rescale, output_rescale;
  int heads, query_limit;
  int score_shift, score_multiplier, context_multiplier, context_exponent, context_limit;
  int attention_read, attention_limit, output_read, output_limit;
  Gelu gelu;
};

// Packed by a target.
struct Packed;
struct PackedNorm;

// Runs part(argument, thread) on every thread of a pool and waits for all.
struct Pool {
  int threads;
  void (*run)(Pool*, void (*part)(void* argument, int thread), void* argument);
};

struct Sizes {
  int tokens, sequences, longest, hidden;
};

// Memory of one forward pass, each 64-byte aligned; `rows` are tokens rounded up with room for whole tiles.
struct Buffers {
  int16_t* stream;  // [rows, hidden_stride]
  void* narrow;     // activations [rows, hidden_stride]
  int8_t* qkv;      // [rows, qkv_stride]
  void* wide;       // activations [rows, intermediate_stride]
  uint8_t* scratch;
  size_t scratch_stride;  // bytes a thread
};

struct Target {
  const char* name;
  size_t activation_bytes;  // of an activation, with what its row has room for beside
  size_t (*scratch_bytes)(int head_dimension, int longest);  // a thread's, for attention
  // Sizes of packed matrices, norms; and packing. zero_of_input is what has been added to the input's integers.
  size_t (*packed_bytes)(const Matrix&);
  void (*pack)(const Matrix&, const Rescale*, int zero_of_input, uint8_t* memory);
  size_t (*packed_norm_bytes)(int columns);
  void (*pack_norm)(const Norm&, int columns, uint8_t* memory);
  int zero;  // added to symmetric activations
  int less;  // subtracted from activations without sign

  void (*layer)(Pool*, const Layer&, const Packed* const matrices[4], const PackedNorm* const norms[2], const Sizes&,
                const int32_t* starts, const Buffers&);
  // Layer norm of rows of the stream to 16 bits, in place.
  void (*norm)(Pool*, const PackedNorm*, int columns, int rows, int16_t* stream, size_t stride);
  // Rows of the stream to activations.
  void (*read8)(Pool*, const Read8&, int columns, int rows, const int16_t* stream, size_t stride, void* out,
                size_t out_stride);
  void (*norm8)(Pool*, const PackedNorm*, int columns, int rows, const int16_t* stream, size_t stride, void* out,
                size_t out_stride);
  // 32-bit sums with the bias, natural order, and 16-bit results of a rescaled product, which may change what it reads.
  void (*sums)(Pool*, const Packed*, void* in, size_t in_stride, int rows, int32_t* out, size_t out_stride);
  void (*rescaled)(Pool*, const Packed*, void* in, size_t in_stride, int rows, int16_t* out, size_t out_stride);
  // y of GELU, in place.
  void (*gelu16)(const Gelu&, int16_t* values, size_t count);
  void (*embed_row)(const int8_t* word, int shift, int multiplier, int limit, int columns, int16_t* out);
};

static inline size_t rounded_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace ibert
