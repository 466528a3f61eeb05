"""Giving back memory that a process does not need: the pages of large files that it has mapped.

A runtime that packs weights for its kernels reads them from a mapped file and never again, but the mapping stays, and
with it the pages: a session then holds its weights twice. The kernel takes such pages back when memory runs short;
here it is asked to do so at once. Pages that are needed after all are read from the file again.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# From Linux's include/uapi/asm-generic/mman-common.h, since Linux 5.4. It keeps what was changed in private pages.
MADV_PAGEOUT = 21
SMALLEST_MAPPING = 32 << 20


def release_file_pages(smallest: int = SMALLEST_MAPPING) -> int:
    """Ask the kernel to take back the pages of the large files that this process has mapped.

    Args:
        smallest: Mappings of fewer bytes are left alone: libraries, which are in use.

    Returns:
        How many bytes the mappings have that the kernel was asked about; 0 where it cannot be asked (not Linux, or
        an old kernel).
    """
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    asked = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if inode == "0" or not path or "x" in permissions or end - start < smallest:
            continue
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT) == 0:
            asked += end - start
    return asked
