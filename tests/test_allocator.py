"""What a step frees is kept for the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from litdistill.utils.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    a = [torch.ones(200_000) for _ in range(8)]                     # 800 kB each, as activations of a small network are
    b = torch.ones(10_000_000)                                      # 40 MB, as a batch of photographs is
step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    environment |= {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_step_asks_the_system_for_no_memory_that_the_one_before_had() -> None:
    # Left alone it depends on how the heap happens to lie whether all 20 steps of 8 tensors of 195 pages of 4 kB fault.
    left = faults("left", MALLOC_MMAP_THRESHOLD_="131072")
    assert left > 20_000
    # The heap may still grow once for the 40 MB, 9,766 pages, where its free memory lies in pieces.
    assert faults("kept") < 20_000 < left


def test_an_environment_that_sets_the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from litdistill.utils.allocator import keep_freed_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
