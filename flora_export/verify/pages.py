"""Memory pages: give every arm of the benchmark memory of the same kind.

Free memory is in pieces, and what is loaded first gets the smallest. An artifact that was loaded several times into one process ran up to
16 % slower in its first session than in its last, with nothing else between them; gathered into huge pages, the same sessions differed
by 1 to 3 %.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

HUGE = 2 << 20  # bytes of a huge page on x86-64, and on arm64 with pages of 4 KB
MADV_COLLAPSE = 25  # Linux 6.1 and newer; Python's mmap module does not name it


def gather() -> bool:
    """Gather this process's memory into huge pages. False where the system cannot: then nothing has changed."""
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.is_file():
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    done = False
    for line in maps.read_text().splitlines():
        span, mode, _, _, inode, *name = line.split()
        if not mode.startswith("rw-p") or inode != "0" or name not in ([], ["[heap]"]):
            continue
        start, stop = (int(address, 16) for address in span.split("-"))
        start, stop = -(-start // HUGE) * HUGE, stop // HUGE * HUGE
        if start < stop:
            done |= madvise(start, stop - start, MADV_COLLAPSE) == 0
    return done
