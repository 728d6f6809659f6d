// SPDX-License-Identifier: Apache-2.0
/* Classifies one sequence of token ids: example PLAN ID ID ..
 *
 *   library=$(python -m megatron_bert.ibert.engine.native_library)
 *   cc example.c "$library" -Wl,-rpath,"$(dirname "$library")" -o example
 *   ./example integer_plan.safetensors 2 45 17 3
 */
#include "integer_engine.h"

#include <stdio.h>
#include <stdlib.h>

static void fail(const char *sentence) {
  fprintf(stderr, "example: %s\n", sentence);
  exit(2);
}

/* Memory for count elements. */
static void *room(size_t count, size_t size) {
  void *memory = calloc(count, size);
  if (!memory) fail("there is not enough memory");
  return memory;
}

int main(int argc, char **argv) {
  char error[512] = "";
  if (argc < 3) fail("give a plan and token ids");

  integer_engine *engine = integer_engine_load(argv[1], 1, error, sizeof error);
  if (!engine) fail(error);
  int hidden_size = integer_engine_hidden_size(engine);
  int outputs = integer_engine_outputs(engine, "classifier");
  if (!outputs) fail("the plan has no classifier");

  int length = argc - 2;
  int32_t *tokens = room(length, sizeof *tokens);
  for (int i = 0; i < length; i++) {
    char *end;
    long id = strtol(argv[i + 2], &end, 10);
    if (!argv[i + 2][0] || *end || id != (int32_t)id) fail("a token id is not a number of 32 bits");
    tokens[i] = (int32_t)id;
  }
  int32_t starts[2] = {0, length};

  int16_t *hidden = room((size_t)length * hidden_size, sizeof *hidden);
  if (integer_engine_encode(engine, tokens, NULL, NULL, starts, 1, hidden, error, sizeof error)) fail(error);

  /* A classifier of sequences reads what the pooler makes of the first token. */
  if (integer_engine_outputs(engine, "pooler")) {
    int32_t *pooled = room(hidden_size, sizeof *pooled);
    if (integer_engine_head(engine, "pooler", hidden, 1, pooled, error, sizeof error)) fail(error);
    for (int i = 0; i < hidden_size; i++) hidden[i] = (int16_t)pooled[i];
    free(pooled);
  }
  int32_t *logits = room(outputs, sizeof *logits);
  if (integer_engine_head(engine, "classifier", hidden, 1, logits, error, sizeof error)) fail(error);
  for (int i = 0; i < outputs; i++) printf("%d\n", (int)logits[i]); /* in steps of 2^-12 */

  free(logits);
  free(hidden);
  free(tokens);
  integer_engine_free(engine);
  return 0;
}
