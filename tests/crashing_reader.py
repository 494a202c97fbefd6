"""A reader of windows that the file bomb.mp4 crashes, as a decoder's C code can be."""

import os
import signal
from collections.abc import Iterator

from data_pipelines import media_windows


def read_batches(path: str, *arguments: float) -> Iterator[list[media_windows.Window]]:
    """Yields one batch of bomb.mp4 and ends the process; reads other files as they are."""
    for batch in media_windows.read_batches(path, *arguments):
        yield batch
        if os.path.basename(path) == 'bomb.mp4':
            os.kill(os.getpid(), signal.SIGSEGV)
