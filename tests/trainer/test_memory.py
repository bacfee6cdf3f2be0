"""What is freed stays with the process until it is given back."""

import subprocess
import sys

SCRIPT = """
from pathlib import Path
import torch
from trainer.passes import memory

def resident() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024

memory.keep_freed()
before = resident()
tensors = [torch.ones(2 << 20) for _ in range(16)]  # 8 MiB each
del tensors
kept = resident() - before
memory.give_back()
print(kept, resident() - before)
"""


def test_what_is_freed_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 120
    assert left < 16
