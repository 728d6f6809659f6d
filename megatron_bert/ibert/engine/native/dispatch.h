// SPDX-License-Identifier: Apache-2.0
// The choice of an instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

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

extern const Target target_plain;
// Those that the compiler knew.
#if defined(HAVE_AVX2)
extern const Target target_avx2;
#endif
#if defined(HAVE_AVX2_SEVEN)
extern const Target target_avx2_seven;
#endif
#if defined(HAVE_AVXVNNI)
extern const Target target_avxvnni;
#endif
#if defined(HAVE_AVX512)
extern const Target target_avx512;
#endif
#if defined(HAVE_AMX)
extern const Target target_amx;
#endif
#if defined(HAVE_NEON)
extern const Target target_neon;
#endif
#if defined(HAVE_NEON_DOT)
extern const Target target_neon_dot;
#endif
#if defined(HAVE_NEON_I8MM)
extern const Target target_neon_i8mm;
#endif

namespace {

struct Choice {
  const Target* target;
  bool runs;
};

#if defined(__x86_64__)
uint64_t enabled_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// The instruction sets that processor and operating system both allow, best first.
std::vector<Choice> choices() {
  uint32_t a, b, c, d;
  bool avx2 = false, vnni = false, avx512 = false, amx = false;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1)) {
    const uint64_t states = enabled_states();
    const bool wide = (states & 0x6) == 0x6, wider = (states & 0xe6) == 0xe6, tiles = (states & 0x60000) == 0x60000;
    uint32_t a7, b7 = 0, c7 = 0, d7 = 0, a1 = 0, b1, c1, d1;
    __get_cpuid_count(7, 0, &a7, &b7, &c7, &d7);
    __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    avx2 = wide && (b7 >> 5 & 1);
    vnni = avx2 && (a1 >> 4 & 1);
    // F, DQ, BW, VL and VNNI
    avx512 = avx2 && wider && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1) && (c7 >> 11 & 1);
    amx = avx512 && tiles && (d7 >> 24 & 1) && (d7 >> 25 & 1);
#if defined(__linux__)
    // Linux gives a process the tiles' registers once it asks.
    if (amx) amx = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
#else
    amx = false;
#endif
  }
  std::vector<Choice> out;
#if defined(HAVE_AMX)
  out.push_back({&target_amx, amx});
#endif
#if defined(HAVE_AVX512)
  out.push_back({&target_avx512, avx512});
#endif
#if defined(HAVE_AVXVNNI)
  out.push_back({&target_avxvnni, vnni});
#endif
#if defined(HAVE_AVX2)
  out.push_back({&target_avx2, avx2});
#endif
  out.push_back({&target_plain, true});
  (void)avx512, (void)amx, (void)vnni;
  return out;
}
#elif defined(__aarch64__)
// Every such processor has NEON. What else it has Linux says; elsewhere all that this is compiled for have it, or none.
std::vector<Choice> choices() {
  bool dot = false, i8mm = false;
#if defined(__linux__)
  dot = getauxval(AT_HWCAP) >> 20 & 1;
  i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
#elif defined(__ARM_FEATURE_DOTPROD)
  dot = true;
#endif
  std::vector<Choice> out;
#if defined(HAVE_NEON_I8MM)
  out.push_back({&target_neon_i8mm, i8mm});
#endif
#if defined(HAVE_NEON_DOT)
  out.push_back({&target_neon_dot, dot});
#endif
#if defined(HAVE_NEON)
  out.push_back({&target_neon, true});
#endif
  out.push_back({&target_plain, true});
  (void)dot, (void)i8mm;
  return out;
}
#else
std::vector<Choice> choices() { return {{&target_plain, true}}; }
#endif

const Target* chosen_target() {
  const char* wanted = std::getenv("MEGATRON_BERT_CPU_TARGET");
  std::string names;
  for (const Choice& choice : choices()) {
    if (!choice.runs) continue;
    if (!wanted || !*wanted || std::string(wanted) == choice.target->name) return choice.target;
    names += (names.empty() ? "" : ", ") + std::string(choice.target->name);
  }
  throw std::runtime_error("MEGATRON_BERT_CPU_TARGET is '" + std::string(wanted) + "', but this processor runs " + names);
}

}  // namespace
}  // namespace ibert
