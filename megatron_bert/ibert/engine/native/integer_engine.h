// SPDX-License-Identifier: Apache-2.0
/* Runs plans of quantized BERT encoders, in integers only. Functions that can fail return NULL or -1 and write one
 * sentence to `error`, which may be NULL. An engine may be used by one thread at a time; several engines are independent. */
#ifndef INTEGER_ENGINE_H
#define INTEGER_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef struct integer_engine integer_engine;

/* The plan of a file, whose digest is checked, for so many threads (0: one). The table of words is read from the file as
 * long as the engine lives: it may be replaced or removed meanwhile, but must not be changed in place. The instruction set
 * is the best there is, or that of the environment variable MEGATRON_BERT_CPU_TARGET (plain, avx2, avxvnni, avx512, amx;
 * neon, neon_dot, neon_i8mm). */
integer_engine *integer_engine_load(const char *path, int threads, char *error, size_t error_size);
/* The same of a plan in memory, which is not needed afterwards; its digest is not looked at. */
integer_engine *integer_engine_load_memory(const void *plan, size_t size, int threads, char *error, size_t error_size);
void integer_engine_free(integer_engine *engine);

const char *integer_engine_target(const integer_engine *engine);
int integer_engine_hidden_size(const integer_engine *engine);
/* Tokens that a sequence may have. */
int integer_engine_longest(const integer_engine *engine);
/* The final stream holds multiples of 2^-exponent. */
int integer_engine_hidden_exponent(const integer_engine *engine);
/* The position of a sequence's first token. */
int integer_engine_first_position(const integer_engine *engine);
/* How many numbers a row of a head has: "pooler", "classifier", "pair" or "masked"; 0 where the plan has none. */
int integer_engine_outputs(const integer_engine *engine, const char *head);

/* Sequences end to end: sequence i has the tokens starts[i] to starts[i + 1] - 1. positions and types may be NULL (in
 * turn, and 0). hidden: [starts[sequences], hidden size]. Returns 0 or -1. */
int integer_engine_encode(integer_engine *engine, const int32_t *tokens, const int32_t *positions, const int32_t *types,
                          const int32_t *starts, int sequences, int16_t *hidden, char *error, size_t error_size);
/* Logits, multiples of 2^-12, of `rows` rows of the final stream (a classifier after a pooler: of the pooler's result):
 * [rows, outputs]. The pooler gives multiples of 2^-15. Returns 0 or -1. */
int integer_engine_head(integer_engine *engine, const char *head, const int16_t *hidden, int rows, int32_t *logits,
                        char *error, size_t error_size);

/* The floating-point status flags of this thread (MXCSR on x86, FPSR on ARM), and clearing them: for tests. */
unsigned integer_engine_float_flags(int clear);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
