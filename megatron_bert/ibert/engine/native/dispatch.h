// SPDX-License-Identifier: Apache-2.0
// The choice of an instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "model.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ibert {

// TARGETS is X(name) for each that the compiler knew, best first.
#define X(name)               \
  namespace name {            \
  extern const Target table;  \
  }
TARGETS
#undef X

namespace {

// The instruction sets that processor and operating system both allow.
struct Has {
  bool plain = true, avx2 = false, avxvnni = false, avx512 = false, amx = false;
  bool neon = false, neon_dot = false, neon_i8mm = false;
};

#if defined(__x86_64__)
uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

Has found() {
  Has has;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return has;
  const uint64_t states = enabled_states();
  const bool wide = (states & 0x6) == 0x6, wider = (states & 0xe6) == 0xe6, tiles = (states & 0x60000) == 0x60000;
  uint32_t a7, b7 = 0, c7 = 0, d7 = 0, a1 = 0, b1, c1, d1;
  __get_cpuid_count(7, 0, &a7, &b7, &c7, &d7);
  __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
  has.avx2 = wide && (b7 >> 5 & 1);
  has.avxvnni = has.avx2 && (a1 >> 4 & 1);
  // F, DQ, BW, VL and VNNI
  has.avx512 = has.avx2 && wider && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1) && (c7 >> 11 & 1);
#if defined(__linux__)
  // Linux gives a process the tiles' registers once it asks.
  has.amx = has.avx512 && tiles && (d7 >> 24 & 1) && (d7 >> 25 & 1) &&
            syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
#endif
  return has;
}
#else
Has found() {
  Has has;
#if defined(__aarch64__)
  // Every such processor has NEON. What else it has Linux says; elsewhere all that this is compiled for have it, or none.
  has.neon = true;
#if defined(__linux__)
  has.neon_dot = getauxval(AT_HWCAP) >> 20 & 1;
  has.neon_i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
#elif defined(__ARM_FEATURE_DOTPROD)
  has.neon_dot = true;
#endif
#endif
  return has;
}
#endif

const Target* chosen_target() {
  const char* wanted = std::getenv("MEGATRON_BERT_CPU_TARGET");
  const Has has = found();
  std::string names;
#define X(name)                                                                       \
  if (has.name) {                                                                     \
    if (!wanted || !*wanted || std::string(wanted) == #name) return &name::table;      \
    names += names.empty() ? #name : ", " #name;                                       \
  }
  TARGETS
#undef X
  throw std::runtime_error("MEGATRON_BERT_CPU_TARGET is '" + std::string(wanted) + "', but this processor runs " + names);
}

}  // namespace
}  // namespace ibert
