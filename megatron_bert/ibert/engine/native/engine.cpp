// SPDX-License-Identifier: Apache-2.0
// The C interface.
#include "engine.h"

#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>

#include "integer_engine.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

struct integer_engine {
  ibert::Engine engine;
};

namespace {

int checked(int threads) {
  if (threads < 0 || threads > 1024) throw std::runtime_error("threads is " + std::to_string(threads) + ", not 1 to 1024");
  return threads ? threads : 1;
}

// Runs `work`, and turns what it throws into a sentence.
template <class F>
int guarded(char* error, size_t error_size, F work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    if (error && error_size) std::snprintf(error, error_size, "there is not enough memory");
  } catch (const std::exception& e) {
    if (error && error_size) std::snprintf(error, error_size, "%s", e.what());
  }
  return -1;
}

}  // namespace

extern "C" {

struct integer_engine* integer_engine_load_memory(const void* plan, size_t size, int threads, char* error, size_t error_size) {
  struct integer_engine* out = nullptr;
  guarded(error, error_size,
          [&] { out = new integer_engine{{static_cast<const uint8_t*>(plan), size, checked(threads)}}; });
  return out;
}

struct integer_engine* integer_engine_load(const char* path, int threads, char* error, size_t error_size) {
  struct integer_engine* out = nullptr;
  guarded(error, error_size, [&] {
    std::unique_ptr<ibert::File> file(new ibert::File(path));
    try {
      out = new integer_engine{{std::move(file), checked(threads)}};
    } catch (const std::runtime_error& e) {
      throw std::runtime_error("cannot use " + std::string(path) + ": " + e.what());
    }
  });
  return out;
}

void integer_engine_free(struct integer_engine* engine) { delete engine; }
const char* integer_engine_target(const struct integer_engine* engine) { return engine->engine.target().name; }
int integer_engine_hidden_size(const struct integer_engine* engine) { return engine->engine.plan().hidden; }
int integer_engine_longest(const struct integer_engine* engine) {
  return engine->engine.plan().embeddings.longest();
}
int integer_engine_hidden_exponent(const struct integer_engine* engine) { return engine->engine.plan().hidden_exponent; }
int integer_engine_first_position(const struct integer_engine* engine) {
  return engine->engine.plan().embeddings.first_position;
}
int integer_engine_outputs(const struct integer_engine* engine, const char* head) { return engine->engine.outputs(head); }

int integer_engine_encode(struct integer_engine* engine, const int32_t* tokens, const int32_t* positions, const int32_t* types,
                          const int32_t* starts, int sequences, int16_t* hidden, char* error, size_t error_size) {
  return guarded(error, error_size,
                 [&] { engine->engine.encode(tokens, positions, types, starts, sequences, hidden); });
}

int integer_engine_head(struct integer_engine* engine, const char* head, const int16_t* hidden, int rows, int32_t* logits,
                        char* error, size_t error_size) {
  return guarded(error, error_size, [&] { engine->engine.head(head, hidden, rows, logits); });
}

unsigned integer_engine_float_flags(int clear) {
#if defined(__x86_64__)
  const unsigned flags = _mm_getcsr() & 63;
  if (clear) _mm_setcsr(_mm_getcsr() & ~63u);
  return flags;
#elif defined(__aarch64__)
  uint64_t status;
  __asm__ volatile("mrs %0, fpsr" : "=r"(status));
  if (clear) __asm__ volatile("msr fpsr, %0" : : "r"(status & ~uint64_t(0x9f)));
  return unsigned(status & 0x9f);
#else
  (void)clear;
  return 0;
#endif
}

}  // extern "C"
