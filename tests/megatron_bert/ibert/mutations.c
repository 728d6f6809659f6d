// SPDX-License-Identifier: Apache-2.0
/* Runs plans and mutations of them: mutations COUNT PLAN .. */
#include "integer_engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned long long state = 1;
static unsigned random_below(unsigned limit) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (unsigned)(state >> 33) % limit;
}

/* Whether the plan was used. */
static int used(const char *bytes, size_t size) {
  static const char *heads[] = {"pooler", "classifier", "pair", "masked"};
  char error[300] = "";
  integer_engine *engine = integer_engine_load_memory(bytes, size, 2, error, sizeof error);
  if (!engine) {
    if (strstr(error, "but this processor runs")) puts(error), exit(0);
    if (!error[0]) abort();
    return 0;
  }
  int32_t starts[4] = {0, 3, 4, 40}, tokens[40];
  for (int i = 0; i < 40; i++) tokens[i] = (int32_t)random_below(100);
  int hidden_size = integer_engine_hidden_size(engine);
  int16_t *hidden = calloc(40 * (size_t)hidden_size, 2);
  int done = integer_engine_encode(engine, tokens, NULL, NULL, starts, 3, hidden, error, sizeof error) == 0;
  for (int i = 0; i < 4 && done; i++) {
    int outputs = integer_engine_outputs(engine, heads[i]);
    if (!outputs) continue;
    int32_t *logits = malloc(40 * (size_t)outputs * 4);
    if (integer_engine_head(engine, heads[i], hidden, 40, logits, error, sizeof error)) abort();
    free(logits);
  }
  free(hidden);
  integer_engine_free(engine);
  return done;
}

int main(int argc, char **argv) {
  int runs = 0, refused = 0;
  for (int plan = 2; plan < argc; plan++) {
    static char bytes[1 << 22], changed[1 << 22];
    FILE *file = fopen(argv[plan], "rb");
    if (!file) return 3;
    size_t size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    size_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | (unsigned char)bytes[i];
    for (int i = 0; i <= atoi(argv[1]); i++) {
      memcpy(changed, bytes, size);
      size_t length = size;
      for (int change = 0; i && change < 1 + i % 3; change++) {
        /* Of the header, where most harm is done, as often as of the tensors; digits mostly become digits. */
        size_t at = random_below(2) ? 8 + random_below((unsigned)header) : random_below((unsigned)size);
        int digit = changed[at] >= '0' && changed[at] <= '9' && at < header;
        changed[at] = digit ? (char)('0' + random_below(10)) : (char)random_below(256);
        if (random_below(20) == 0) length = random_below((unsigned)size);
      }
      char *exact = malloc(length ? length : 1); /* so that reading beyond it is seen */
      memcpy(exact, changed, length);
      if (used(exact, length)) runs++; else refused++;
      free(exact);
    }
  }
  printf("{\"runs\": %d, \"refused\": %d}\n", runs, refused);
  return 0;
}
