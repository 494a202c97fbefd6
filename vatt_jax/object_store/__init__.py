"""Files on object stores (s3://, gs:// and what else fsspec opens), and local copies of them.

urls            which paths are on a store, and how they are put together
settings        timeouts, tries and how much is read at once: config.object_store
store           one folder of a store: list, read ranges, download, upload, delete
local_copies    files of a store in the cache folder of this machine
run_mirror      a run folder on a store: a local folder that is kept equal to it
"""

from vatt_jax.object_store.settings import StoreError, StoreSettings
from vatt_jax.object_store.store import Store, StoredFile
from vatt_jax.object_store.urls import check_local, is_url, join, last_name

__all__ = [
    'Store',
    'StoreError',
    'StoreSettings',
    'StoredFile',
    'check_local',
    'is_url',
    'join',
    'last_name',
]
