"""Has the kernel forget a library that its page cache holds in large folios, before the library is loaded.

Linux 6.18 maps the whole folio in which a touched page of a file lies, and ext4 and XFS make folios of up to 2 MiB of
what was written in one go, as by an installation, or read from one end to the other, as by a copy. `import torch`
touches pages all over its libraries: a lean start then took 71 MiB where it takes 61. Nobody can split a mapping while
the dynamic linker makes it; but the kernel can forget what it has cached, and faults read it again in small folios.

Also imported by the budgeted process: the standard library only.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from tightfit.runtime.engine.device.resident import memory

SMALL = 1 << 20
"""bytes of a library up to which it is left alone"""
TOUCHED = 16
"""pages of a library that are touched to see how much is mapped with each"""
MOST_AROUND = 256 << 10
"""bytes that the kernel maps with a page, on average, above which folios are large; with small ones it maps 64 KiB
(`tightfit.runtime.engine.start.process.split_file_mappings`)
"""


def forget_large_folios(library: Path) -> bool:
    """Have the kernel drop the library from its page cache if it lies there in large folios, and return whether it did.
    Pages that other processes have mapped stay. Call it before the library is loaded; False too for a file that cannot
    be read.
    """
    try:
        with library.open("rb") as file:
            if not mapped_around(file.fileno()) > MOST_AROUND:
                return False
            os.fsync(file.fileno())  # pages that are not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False
    return True


def forget_libraries(folder: Path) -> None:
    """`forget_large_folios` for all libraries in a folder of packages that are large enough to matter."""
    for library in folder.rglob("*.so*"):
        if library.stat().st_size > SMALL:
            forget_large_folios(library)


def mapped_around(descriptor: int) -> int:
    """Bytes of a file that the kernel maps with a page that is touched, on average over the file."""
    with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
        before = memory().file
        for at in range(0, len(mapping), len(mapping) // TOUCHED + 1):
            mapping[at]
        return (memory().file - before) // TOUCHED
