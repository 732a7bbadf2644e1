// Runs a program as on a processor without AVX-512 and AMX, to measure and test there; for Linux on x86-64:
//
//     cc -O1 -shared -fPIC -o hide_avx512.so scripts/hide_avx512.c -ldl
//     LD_PRELOAD=$PWD/hide_avx512.so python scripts/benchmark_train.py
//
// Libraries ask the processor what it can do by the instruction CPUID. This one lets CPUID fail (arch_prctl(2),
// ARCH_SET_CPUID), and a handler of SIGSEGV answers in its place, without what is to be hidden. The C library has chosen its own
// functions, such as memcpy, before. A program must set its handler of SIGSEGV by sigaction, and no thread may block the signal.

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

enum { EAX, EBX, ECX, EDX };
static struct sigaction of_program;  // for faults that are not CPUID's
static int (*set_action)(int, const struct sigaction *, struct sigaction *);

// Of the calling thread.
static long let_cpuid_fail(int fails) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, !fails); }

static void ask(uint32_t leaf, uint32_t subleaf, uint32_t *answer) {
  let_cpuid_fail(0);
  __asm__ volatile("cpuid"
                   : "=a"(answer[EAX]), "=b"(answer[EBX]), "=c"(answer[ECX]), "=d"(answer[EDX])
                   : "a"(leaf), "c"(subleaf));
  let_cpuid_fail(1);
}

// Intel's manual, volume 2, CPUID: the bits of AVX-512, AVX10 and AMX.
static void hide(uint32_t leaf, uint32_t subleaf, uint32_t *answer) {
  if (leaf == 7 && subleaf == 0) {
    answer[EBX] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
    answer[ECX] &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
    answer[EDX] &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  } else if (leaf == 7 && subleaf == 1) {
    answer[EAX] &= ~(1u << 5 | 1u << 21);
    answer[EDX] &= ~(1u << 8 | 1u << 19);
  } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
    answer[EAX] = answer[EBX] = answer[ECX] = answer[EDX] = 0;
  }
}

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *code = (const uint8_t *)registers[REG_RIP];
  const int is_sent = info->si_code <= 0;  // by a process, not caused by an instruction
  if (info->si_code == SI_KERNEL && code[0] == 0x0f && code[1] == 0xa2) {
    uint32_t answer[4];
    ask(registers[REG_RAX], registers[REG_RCX], answer);
    hide(registers[REG_RAX], registers[REG_RCX], answer);
    registers[REG_RAX] = answer[EAX];
    registers[REG_RBX] = answer[EBX];
    registers[REG_RCX] = answer[ECX];
    registers[REG_RDX] = answer[EDX];
    registers[REG_RIP] += 2;
  } else if (of_program.sa_flags & SA_SIGINFO) {
    of_program.sa_sigaction(number, info, context);
  } else if (of_program.sa_handler != SIG_DFL && of_program.sa_handler != SIG_IGN) {
    of_program.sa_handler(number);
  } else if (of_program.sa_handler == SIG_DFL || !is_sent) {
    set_action(SIGSEGV, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
    if (is_sent) raise(SIGSEGV);  // else the instruction is repeated, which ends the process
  }
}

// A handler that the program sets for SIGSEGV comes after this library's.
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
  if (!set_action) set_action = dlsym(RTLD_NEXT, "sigaction");
  if (number != SIGSEGV) return set_action(number, action, old);
  if (old) *old = of_program;
  if (action) of_program = *action;
  return 0;
}

__attribute__((constructor)) static void begin(void) {
  sigaction(SIGSEGV, NULL, NULL);  // finds set_action
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  set_action(SIGSEGV, &action, NULL);
  if (let_cpuid_fail(1)) {
    perror("hide_avx512: this processor or kernel cannot let CPUID fail");
    exit(1);
  }
}
