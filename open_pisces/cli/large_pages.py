"""Large pages for trainings on a CPU.

A step takes and frees gigabytes. In pages of 4 kB most of its time can go into page faults and into looking addresses
up, above all in a virtual machine. glibc asks for large pages, and keeps what is freed, if its tunables say so when a
process starts: the command starts itself again with them (``pisces bench large_pages``).
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

NAME = "GLIBC_TUNABLES"
"""Whoever has set it, to nothing if need be, is left alone."""
TUNABLES = {"hugetlb": 1, "arena_max": 1, "trim_threshold": 1 << 34, "mmap_threshold": 1 << 30}
"""``glibc.malloc``'s (glibc's manual, "Memory Allocation Tunables"): transparent large pages; one heap for all threads,
of which the backward pass has its own; freed memory stays."""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DRIVERS = Path("/dev/nvidiactl"), Path("/dev/kfd")
"""There where an accelerator does the work: memory is not what its host waits for."""


def restart_with_large_pages() -> None:
    """Replace this process by the same command with glibc's tunables set; nothing where that cannot help.

    It has to come before anything is written or locked. Children inherit the setting.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or NAME in os.environ:
        return
    if any(driver.exists() for driver in DRIVERS):
        return
    if not SWITCH.is_file() or "[never]" in SWITCH.read_text():
        return
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, NAME: tunables})
