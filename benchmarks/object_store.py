"""Reading records of an object store: clips a second by latency, one at a time and side by side.

    python -m benchmarks.object_store --latencies=0,20,50,100

A local S3 server stands for the store; a proxy before it delays each answer. The records are noise
of the size of clips: no decoding takes part.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time

from data_pipelines.loading.requests_in_flight import RequestsInFlight
from data_pipelines.storage.record_files import LocalFiles, RecordFiles, StoreFiles
from tests import object_store
from vatt_jax.object_store import Store, StoreSettings

# Bytes of one clip: 32 JPEGs of about 9 kB, and sound.
CLIP = 300_000
NUM_CLIPS = 64


def read_all(files: RecordFiles, pool: RequestsInFlight | None) -> float:
    """Read every clip of a file once; returns clips a second.

    Args:
        files: one file of NUM_CLIPS clips.
        pool: reads side by side; None: one after another.
    """

    def read(number: int) -> int:
        (content,) = files.read(0, [(number * CLIP, CLIP)])
        return len(content)

    begin = time.monotonic()
    if pool is None:
        for number in range(NUM_CLIPS):
            read(number)
    else:
        pool.map(read, range(NUM_CLIPS), lambda size: size)
    return NUM_CLIPS / (time.monotonic() - begin)


def main() -> None:
    """Print one line for each latency."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--latencies', default='0,20,50,100', help='milliseconds, with commas')
    latencies = [int(text) for text in parser.parse_args().latencies.split(',')]
    with tempfile.TemporaryDirectory() as folder, object_store.serve() as (url, faults):
        os.environ.update(object_store.CREDENTIALS, AWS_ENDPOINT_URL=url)
        path = pathlib.Path(folder) / 'records'
        path.write_bytes(os.urandom(NUM_CLIPS * CLIP))
        settings = StoreSettings()
        store = Store(f's3://{object_store.BUCKET}/data', settings)
        store.upload(path, 'records')
        print(f'local file: {read_all(LocalFiles([path]), None):.0f} clips/s')
        for latency in latencies:
            faults.latency = latency / 1000
            files = StoreFiles(store, store.files())
            alone = read_all(files, None)
            pool = RequestsInFlight(settings)
            # The second pass: the number of requests has grown to what the line takes.
            read_all(files, pool)
            together = read_all(files, pool)
            print(
                f'{latency} ms: one at a time {alone:.1f} clips/s, side by side {together:.1f} '
                f'({pool.estimate.number()} under way)'
            )


if __name__ == '__main__':
    main()
