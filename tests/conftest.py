"""Eight simulated CPU devices and a compilation cache for every test."""
import os
import pathlib

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
_cache = pathlib.Path(__file__).parent.parent / '.jax_cache'
jax.config.update('jax_compilation_cache_dir', str(_cache))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
