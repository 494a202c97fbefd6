"""One folder of an object store, through fsspec.

Every request has a time limit and is sent again when it fails for a reason that may pass. What does
not pass (no such bucket, no credentials, the time limit after all tries) is a StoreError.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import tenacity

from vatt_jax import extras
from vatt_jax.object_store import urls
from vatt_jax.object_store.settings import StoreError, StoreSettings

# A request may take as many more seconds as its bytes take at this rate [bytes/s].
_SLOWEST = 1e6
# Longest wait between two tries, in seconds.
_LONGEST_WAIT = 20.0
# Bytes of one request of a download. Small enough to be sent again without much loss.
_PART = 1 << 24
# Files, or parts of one, that are moved at once.
_MOVED_AT_ONCE = 8
# Connections that one file system keeps open.
_CONNECTIONS = 128

# Protocol -> the extra with its package. fsspec itself knows many more.
_EXTRAS = {'s3': 's3', 's3a': 's3', 'gs': 'gcs', 'gcs': 'gcs'}
# Errors that the same request meets again.
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
# Libraries whose own errors, which have no common class, are about the network.
_NETWORK_LIBRARIES = ('aiobotocore', 'aiohttp', 'botocore', 'gcsfs', 'google', 's3fs', 'urllib3')
# In the names of their errors that are not, such as NoCredentialsError.
_ABOUT_CREDENTIALS = re.compile('Credential|Profile|Token|RefreshError|ParamValidation')

Range = tuple[int, int]
Result = TypeVar('Result')


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """What a listing says of a file.

    Attributes:
        size: in bytes.
        version: another one whenever the file is written anew; an ETag where the store has them.
    """

    size: int
    version: str


class Store:
    """One folder of an object store. Safe from several threads.

    Attributes:
        url: of the folder.
        settings: timeouts and tries.
    """

    def __init__(self, url: str, settings: StoreSettings | None = None):
        """Nothing is requested yet.

        Args:
            url: such as s3://bucket/folder.
            settings: timeouts and tries; None: the defaults.

        Raises:
            StoreError: fsspec knows no such protocol.
            MissingExtra: the package for this protocol is not installed.
        """
        self.url = url.rstrip('/')
        self.settings = settings or StoreSettings()
        self._file_system()

    def _file_system(self) -> Any:
        # Asked for at every request: a process that was forked needs connections of its own.
        return _file_system(urls.protocol(self.url), self.settings.timeout, os.getpid())

    def _path(self, name: str) -> str:
        return urls.join(self.url, name) if name else self.url

    # ---- What is there.

    def files(self) -> dict[str, StoredFile]:
        """List the files of the folder, at all depths.

        Returns:
            {path below the folder: what is known of it}, in order of the paths; {} of a folder that
            does not exist.

        Raises:
            StoreError: the bucket does not exist or cannot be read.
        """
        try:
            found = self._request('listing', self._path(''), 0, 'find', self.url, detail=True)
        except FileNotFoundError:
            found = {}
        if not found:
            self._check_bucket()
        root = self._file_system()._strip_protocol(self.url)
        files = {}
        for path, info in sorted(found.items()):
            # Some tools put an empty object where a folder is.
            if info.get('type') == 'file' and path != root:
                files[path.removeprefix(f'{root}/')] = _stored_file(info)
        return files

    def _check_bucket(self) -> None:
        """Raise StoreError where an empty listing means that the bucket is not there."""
        protocol = urls.protocol(self.url)
        if protocol not in _EXTRAS:
            return  # others need not have buckets
        bucket = self._file_system()._strip_protocol(self.url).partition('/')[0]
        where = f'{protocol}://{bucket}'
        if not self._request('looking for', where, 0, 'exists', where):
            raise StoreError(
                f'{where} does not exist, or these credentials may not see it; check the name of '
                'the bucket and the region'
            )

    def info(self, name: str) -> StoredFile | None:
        """What is known of one file; None where it does not exist.

        Args:
            name: path below the folder.
        """
        path = self._path(name)
        try:
            found = self._request('looking for', path, 0, 'info', path)
        except FileNotFoundError:
            return None
        return _stored_file(found) if found['type'] == 'file' else None

    # ---- Reading.

    def read(self, name: str) -> bytes:
        """Read a small file whole.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be read.
        """
        return self._request('reading', self._path(name), 0, 'cat_file', self._path(name))

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[bytes]:
        """Read parts of one file, all at once.

        Args:
            name: path below the folder.
            ranges: (offset, bytes) of each part.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: a part cannot be read.
        """
        path = self._path(name)
        contents: list[bytes | None] = [None] * len(ranges)

        def read_missing() -> None:
            missing = [k for k, content in enumerate(contents) if content is None]
            starts = [ranges[k][0] for k in missing]
            ends = [ranges[k][0] + ranges[k][1] for k in missing]
            found = self._call(
                sum(ends) - sum(starts),
                'cat_ranges',
                [path] * len(missing),
                starts,
                ends,
                on_error='return',
            )
            # What did arrive is kept, so that only the others are requested again.
            failure: BaseException | None = None
            for k, content in zip(missing, found):
                if isinstance(content, BaseException):
                    failure = failure or content
                elif len(content) != ranges[k][1]:
                    # A connection that was cut may look like the end of the file.
                    failure = failure or ConnectionError(
                        f'{len(content)} of {ranges[k][1]} bytes arrived'
                    )
                else:
                    contents[k] = content
            if failure:
                raise failure

        self._try('reading', path, read_missing)
        return [content for content in contents if content is not None]

    def download(self, name: str, target: pathlib.Path, file: StoredFile) -> None:
        """Copy a file to this machine. It appears whole or not at all.

        Args:
            name: path below the folder.
            target: where it goes; its folder is made.
            file: what `files` said of it.

        Raises:
            StoreError: it cannot be read, or was written anew in the meantime.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f'{target.name}.{os.getpid()}.part')
        begins = range(0, file.size, _PART)
        try:
            with open(temporary, 'wb') as output:
                # As many parts at a time as `read_ranges` gets side by side.
                for first in range(0, len(begins), _MOVED_AT_ONCE):
                    group = begins[first : first + _MOVED_AT_ONCE]
                    parts = [(begin, min(_PART, file.size - begin)) for begin in group]
                    output.writelines(self.read_ranges(name, parts))
            if self.info(name) != file:
                raise StoreError(
                    f'{self._path(name)} was written anew while it was copied; start again'
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    # ---- Writing.

    def write(self, name: str, content: bytes) -> None:
        """Write a small file.

        Raises:
            StoreError: it cannot be written.
        """
        path = self._path(name)
        self._request('writing', path, len(content), 'pipe_file', path, content)

    def upload(self, source: pathlib.Path, name: str) -> None:
        """Copy a file of this machine to the store.

        Raises:
            StoreError: it cannot be written.
        """
        path = self._path(name)
        size = source.stat().st_size
        self._request('writing', path, size, 'put_file', str(source), path)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that do not exist are left out.

        Raises:
            StoreError: one cannot be deleted.
        """
        for name in names:
            path = self._path(name)
            try:
                self._request('deleting', path, 0, 'rm_file', path)
            except FileNotFoundError:
                pass

    # ---- Requests.

    def _request(
        self, doing: str, path: str, num_bytes: int, method: str, *args: Any, **kwargs: Any
    ) -> Any:
        """One request, tried as often as the settings say. FileNotFoundError passes through.

        Args:
            doing: what it does, for errors: 'reading'.
            path: URL that it is about, for errors.
            num_bytes: that it moves.
            method: of fsspec's file systems.
            *args: of the method.
            **kwargs: of the method.
        """
        return self._try(doing, path, lambda: self._call(num_bytes, method, *args, **kwargs))

    def _call(self, num_bytes: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """One request, once, within its time limit."""
        from fsspec import asyn

        file_system = self._file_system()
        if not isinstance(file_system, asyn.AsyncFileSystem):
            # A file system that waits for nothing, such as that in memory.
            return getattr(file_system, method)(*args, **kwargs)
        limit = self.settings.timeout + num_bytes / _SLOWEST
        coroutine = getattr(file_system, f'_{method}')
        return asyn.sync(file_system.loop, coroutine, *args, timeout=limit, **kwargs)

    def _try(self, doing: str, path: str, function: Callable[[], Result]) -> Result:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.settings.tries),
            # With an element of chance, or all hosts would come back at the same moment.
            wait=tenacity.wait_exponential_jitter(
                initial=self.settings.backoff, max=_LONGEST_WAIT, jitter=self.settings.backoff
            ),
            retry=tenacity.retry_if_exception(may_pass),
            reraise=True,
        )
        try:
            return retrying(function)
        except FileNotFoundError:
            raise
        except Exception as error:
            sentence = self._sentence(doing, path, error)
            if sentence is None:
                raise
            raise StoreError(sentence) from error

    def _sentence(self, doing: str, path: str, error: Exception) -> str | None:
        """What to say of an error; None where it is not about the store."""
        reason = _first_line(error)
        if isinstance(error, PermissionError) or _is_about_credentials(error):
            return (
                f'{doing} {path} was refused ({reason}); set up credentials that may do so '
                '(docs/object_stores.md)'
            )
        if isinstance(error, TimeoutError | asyncio.TimeoutError):
            reason = f'no answer within {self.settings.timeout:g} seconds'
        if may_pass(error):
            return (
                f'{doing} {path} failed, the last of {self.settings.tries} tries with: {reason}; '
                'start the same command again when the store answers, or raise '
                'config.object_store.timeout or .tries'
            )
        if isinstance(error, _LASTING):
            return f'{doing} {path} failed ({reason})'
        return None


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed the next time."""
    if isinstance(error, _LASTING) or _is_about_credentials(error):
        return False
    # asyncio's TimeoutError is an OSError too.
    return isinstance(error, OSError | EOFError) or _is_of_network(error)


def _is_of_network(error: BaseException) -> bool:
    return type(error).__module__.partition('.')[0] in _NETWORK_LIBRARIES


def _is_about_credentials(error: BaseException) -> bool:
    return _is_of_network(error) and bool(_ABOUT_CREDENTIALS.search(type(error).__name__))


def _first_line(error: BaseException) -> str:
    """The first line of a library's message, which may be pages long; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _stored_file(info: dict[str, Any]) -> StoredFile:
    """Of one entry of a listing, whose names of fields depend on the file system."""
    version = ''
    for field in ('ETag', 'etag', 'md5Hash', 'mtime', 'created', 'LastModified'):
        if info.get(field):
            version = str(info[field])
            break
    return StoredFile(int(info['size']), version)


@functools.lru_cache(maxsize=32)
def _file_system(protocol: str, timeout: float, process: int) -> Any:
    """The file system of a protocol, its connections shared by all stores of this process."""
    import fsspec

    # Listings are never remembered: other processes write to the same folders.
    options: dict[str, Any] = {'use_listings_cache': False}
    if protocol in ('s3', 's3a'):
        options['config_kwargs'] = {
            'connect_timeout': timeout,
            'read_timeout': timeout,
            'max_pool_connections': _CONNECTIONS,
            # `Store` tries again by itself: tries within tries would multiply.
            'retries': {'total_max_attempts': 1},
        }
    extra = _EXTRAS.get(protocol)
    try:
        if extra is None:
            return fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        with extras.needed(extra, f'reading and writing {protocol}://'):
            file_system = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except extras.MissingExtra:
        raise
    except ValueError as error:
        raise StoreError(
            f'{protocol}:// cannot be opened ({_first_line(error)}); expected a local path, s3:// '
            'or gs://, or another protocol that fsspec knows'
        ) from error
    except ImportError as error:
        raise StoreError(
            f'{protocol}:// needs a package that is not installed ({_first_line(error)})'
        ) from error
    if extra == 's3':
        # Of s3fs itself, for the same reason.
        file_system.retries = 1
    return file_system


def move_side_by_side(function: Callable[[str], object], names: Iterable[str]) -> None:
    """Call `function` with each name, several at once; the first error ends it.

    Args:
        function: downloads or uploads one file.
        names: of the files.
    """
    with concurrent.futures.ThreadPoolExecutor(_MOVED_AT_ONCE) as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
