// SPDX-License-Identifier: Apache-2.0
/* Answers of a plan: answers PLAN THREADS < numbers > numbers, all int32.
 *
 * In: the number of sequences, where they start and end, and of all tokens the ids, positions and types.
 * Out: the final stream, the results of all heads for it, and the floating-point flags. The instruction set goes to
 * standard error. */
#include "integer_engine.h"

#include <stdio.h>
#include <stdlib.h>

static void *read_numbers(size_t count) {
  int32_t *numbers = malloc(count * 4 + 4);
  if (!numbers || fread(numbers, 4, count, stdin) != count) exit(3);
  return numbers;
}

int main(int argc, char **argv) {
  static const char *heads[] = {"pooler", "classifier", "pair", "masked"};
  char error[300] = "";
  integer_engine *engine = argc == 3 ? integer_engine_load(argv[1], atoi(argv[2]), error, sizeof error) : NULL;
  if (!engine) return fprintf(stderr, "%s\n", error), 2;
  fputs(integer_engine_target(engine), stderr);
  int32_t sequences = *(int32_t *)read_numbers(1), *starts = read_numbers(sequences + 1), total = starts[sequences];
  int32_t *tokens = read_numbers(total), *positions = read_numbers(total), *types = read_numbers(total);
  size_t count = (size_t)total * integer_engine_hidden_size(engine);
  int16_t *hidden = malloc(count * 2);
  integer_engine_float_flags(1);
  if (integer_engine_encode(engine, tokens, positions, types, starts, sequences, hidden, error, sizeof error)) return 4;
  for (size_t i = 0; i < count; i++) {
    int32_t wide = hidden[i];
    fwrite(&wide, 4, 1, stdout);
  }
  for (int i = 0; i < 4; i++) {
    size_t outputs = integer_engine_outputs(engine, heads[i]);
    int32_t *results = malloc(total * outputs * 4 + 4);
    if (outputs && integer_engine_head(engine, heads[i], hidden, total, results, error, sizeof error)) return 5;
    fwrite(results, 4, total * outputs, stdout);
    free(results);
  }
  int32_t flags = (int32_t)integer_engine_float_flags(0);
  fwrite(&flags, 4, 1, stdout);
  integer_engine_free(engine);
  return 0;
}
