// SPDX-License-Identifier: Apache-2.0
/* Preloaded into a process (LD_PRELOAD), hides newer instruction sets from all its libraries, so that each takes what it
 * has for an older processor: HIDDEN_INSTRUCTIONS=avx512 hides AMX, =avx2 also AVX-512 and AVX-VNNI.
 *
 * Linux lets a process have its CPUID instructions fail where the processor can; the signal's handler answers them. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_CPUID = 0x1012 };
static int without_avx512;

static uint32_t bits(const int *numbers, int count) {
  uint32_t all = 0;
  for (int i = 0; i < count; i++) all |= UINT32_C(1) << numbers[i];
  return all;
}
#define BITS(...) bits((const int[]){__VA_ARGS__}, sizeof((const int[]){__VA_ARGS__}) / sizeof(int))

static void answer(int number, siginfo_t *info, void *context) {
  (void)info;
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *at = (const uint8_t *)registers[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) { /* a fault of another kind: let it end the process */
    signal(number, SIG_DFL);
    return;
  }
  const uint32_t leaf = (uint32_t)registers[REG_RAX], part = (uint32_t)registers[REG_RCX];
  uint32_t a = leaf, b, c = part, d;
  syscall(SYS_arch_prctl, ARCH_CPUID, 1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  syscall(SYS_arch_prctl, ARCH_CPUID, 0);
  if (leaf == 7 && part == 0) {
    d &= ~BITS(22, 24, 25); /* AMX: BF16, TILE, INT8 */
    if (without_avx512) {
      b &= ~BITS(16, 17, 21, 28, 30, 31); /* F, DQ, IFMA, CD, BW, VL */
      c &= ~BITS(1, 6, 11, 12, 14);       /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
      d &= ~BITS(8, 23);                  /* VP2INTERSECT, FP16 */
    }
  } else if (leaf == 7 && part == 1) {
    a &= ~BITS(21); /* AMX-FP16 */
    if (without_avx512) {
      a &= ~BITS(4, 5, 23);      /* AVX-VNNI, AVX512-BF16, AVX-IFMA */
      d &= ~BITS(4, 5, 10, 19);  /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10 */
    }
  } else if (leaf == 0x1d || leaf == 0x1e) { /* tiles */
    a = b = c = d = 0;
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  const char *wanted = getenv("HIDDEN_INSTRUCTIONS");
  if (!wanted) return;
  without_avx512 = strcmp(wanted, "avx512") != 0;
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  if (sigaction(SIGSEGV, &action, NULL) || syscall(SYS_arch_prctl, ARCH_CPUID, 0)) {
    fprintf(stderr, "this machine cannot hide instruction sets: its processor or kernel has no CPUID faulting\n");
    _exit(2);
  }
}
