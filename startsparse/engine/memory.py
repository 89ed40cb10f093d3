"""Memory of maps, kept for the next step.

What goes back to the system comes again page by page, each filled with zeros first, and at low
densities that takes as long as what is computed there. So buffers are kept, in huge pages where
the system has any.
"""

import itertools
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes from which memory is kept; malloc keeps what is smaller
_HUGE = 1 << 21  # bytes of a huge page
_PAGE, _LINE = 4096, 64  # bytes of a page, and of a line of the cache

_free: list[mmap.mmap] = []
_lock = threading.Lock()
# Tensors that all began with a page would lie on the same lines of the cache.
_start = itertools.cycle(17 * i % 64 * _LINE for i in range(64))


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose numbers are not set."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    buffer = _take(size + _PAGE)
    lease = memoryview(buffer)[next(_start) :]  # which the tensor's storage holds while it lives
    weakref.finalize(lease, _free.append, buffer).atexit = False
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def release() -> None:
    """Give back to the system what no tensor uses."""
    with _lock:
        _free.clear()


def _take(size: int) -> mmap.mmap:
    """The smallest free buffer of ``size`` bytes or somewhat more, or a new one."""
    with _lock:  # what becomes free meanwhile is added at the end
        fits = [(len(b), i) for i, b in enumerate(_free) if size <= len(b) <= 2 * size + _HUGE]
        if fits:
            return _free.pop(min(fits)[1])
    huge_pages = -(-size // _HUGE)
    buffer = mmap.mmap(-1, huge_pages * _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
