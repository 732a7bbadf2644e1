"""scripts/hide_avx512.c, which lets programs run as on a processor without AVX-512."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.training.toys import ROOT

CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text().split() if CPUINFO.exists() else []
PROGRAM = """
#include <signal.h>
#include <stdio.h>
int main(int count, char **arguments) {
  __builtin_cpu_init();
  printf("%d %d", !!__builtin_cpu_supports("avx512f"), !!__builtin_cpu_supports("avx2"));
  fflush(stdout);
  if (count == 2) raise(SIGSEGV);
  return count > 2 ? *(volatile int *)0 : 0;
}
"""


# A processor without AVX-512 has nothing to hide, and many cannot let CPUID fail.
@pytest.mark.skipif(
    not {"cpuid_fault", "avx512f"} <= set(FLAGS) or shutil.which("cc") is None,
    reason="needs AVX-512, a processor that can let CPUID fail, and a C compiler",
)
def test_a_program_sees_no_avx512_and_ends_by_its_own_faults(tmp_path):
    library, program = str(tmp_path / "hide_avx512.so"), str(tmp_path / "program")
    source = str(ROOT / "scripts/hide_avx512.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    subprocess.run(["cc", "-x", "c", "-o", program, "-"], input=PROGRAM, text=True, check=True)

    def run(*arguments, **environment):
        done = subprocess.run([program, *arguments], env=os.environ | environment, capture_output=True, text=True)
        return done.stdout, done.returncode

    assert run() == ("1 1", 0)
    assert run(LD_PRELOAD=library) == ("0 1", 0)
    for fault in (["sent"], ["an", "instruction's"]):
        assert run(*fault, LD_PRELOAD=library) == ("0 1", -signal.SIGSEGV)
