// Runs a program as on a processor without AVX-512 and AMX, to measure and test there; for Linux on x86-64:
//
//     cc -O1 -shared -fPIC -o /tmp/hide_avx512.so scripts/hide_avx512.c -ldl
//     LD_PRELOAD=/tmp/hide_avx512.so python scripts/benchmark_train.py
//
// Libraries ask the processor what it can do by the instruction CPUID. This one lets CPUID fail (arch_prctl(2),
// ARCH_SET_CPUID) and answers in its place, in a handler of SIGSEGV, without what is to be hidden.

#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { LEAVES = 64, SUBLEAVES = 32, EAX = 0, EBX, ECX, EDX };
static const uint32_t EXTENDED = 0x80000000;
static uint32_t basic[LEAVES][SUBLEAVES][4], extended[LEAVES][4];
static struct sigaction of_program;  // for faults that are not CPUID's
static int (*set_action)(int, const struct sigaction *, struct sigaction *);

static void ask(uint32_t leaf, uint32_t subleaf, uint32_t *answer) {
  __asm__ volatile("cpuid"
                   : "=a"(answer[EAX]), "=b"(answer[EBX]), "=c"(answer[ECX]), "=d"(answer[EDX])
                   : "a"(leaf), "c"(subleaf));
}

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *code = (const uint8_t *)registers[REG_RIP];
  if (info->si_code == SI_KERNEL && code[0] == 0x0f && code[1] == 0xa2) {
    static const uint32_t nothing[4];
    const uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], *answer = nothing;
    if (leaf < LEAVES)
      answer = basic[leaf][subleaf < SUBLEAVES ? subleaf : SUBLEAVES - 1];
    else if (leaf >= EXTENDED && leaf < EXTENDED + LEAVES)
      answer = extended[leaf - EXTENDED];
    registers[REG_RAX] = answer[EAX];
    registers[REG_RBX] = answer[EBX];
    registers[REG_RCX] = answer[ECX];
    registers[REG_RDX] = answer[EDX];
    registers[REG_RIP] += 2;
  } else if (of_program.sa_flags & SA_SIGINFO) {
    of_program.sa_sigaction(number, info, context);
  } else if (of_program.sa_handler != SIG_DFL && of_program.sa_handler != SIG_IGN) {
    of_program.sa_handler(number);
  } else {
    set_action(SIGSEGV, &of_program, NULL);  // which ends the process when the instruction is repeated
  }
}

// A handler that the program sets for SIGSEGV comes after this library's.
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
  if (number != SIGSEGV) return ((typeof(set_action))dlsym(RTLD_NEXT, "sigaction"))(number, action, old);
  if (old) *old = of_program;
  if (action) of_program = *action;
  return 0;
}

__attribute__((constructor)) static void begin(void) {
  for (uint32_t leaf = 0; leaf < LEAVES; ++leaf) {
    for (uint32_t subleaf = 0; subleaf < SUBLEAVES; ++subleaf) ask(leaf, subleaf, basic[leaf][subleaf]);
    ask(EXTENDED + leaf, 0, extended[leaf]);
  }
  // Intel's manual, volume 2, CPUID, leaf 7: bits of AVX-512, AMX and what needs either.
  basic[7][0][EBX] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
  basic[7][0][ECX] &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
  basic[7][0][EDX] &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  for (int i = EAX; i <= EDX; ++i) basic[7][1][i] = 0;

  set_action = dlsym(RTLD_NEXT, "sigaction");
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  set_action(SIGSEGV, &action, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
    perror("hide_avx512: this processor or kernel cannot let CPUID fail");
    exit(1);
  }
}
