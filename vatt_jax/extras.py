"""Optional packages: the extras of pyproject.toml, and the sentence where one is missing.

The library is on no package index, so the sentence names the packages of an extra themselves: that
command works in a clone as in an environment with a wheel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import sys
from collections.abc import Iterator

from vatt_jax.config import ConfigError

_IS_LINUX_X86 = sys.platform == 'linux' and platform.machine() == 'x86_64'
_TENSORFLOW = 'tensorflow-cpu>=2.21' if _IS_LINUX_X86 else 'tensorflow>=2.21'

# Extra -> its requirements, as pyproject.toml has them (on this machine).
REQUIREMENTS = {
    'data': (_TENSORFLOW, 'tensorflow-datasets>=4.9.10', 'array-record>=0.8'),
    'workers': ('grain>=0.2.18',),
    'video': ('av>=17', 'soxr>=1.0'),
    'flow': ('opencv-python-headless>=4.10',),
    'detection': ('pycocotools>=2.0.8',),
    'regions': ('lmdb>=1.6',),
    'text': ('tokenizers>=0.21', 'sentencepiece>=0.2'),
    'exchange': ('safetensors>=0.5',),
    'search': ('flask>=3.1', 'usearch>=2.26'),
    'hub': ('huggingface_hub>=1.0',),
    'beam': ('apache-beam>=2.70', 'mlcroissant>=1.0'),
    's3': ('s3fs>=2026.1',),
    'gcs': ('gcsfs>=2026.1',),
    'cuda': ('jax[cuda13]>=0.10,<0.13',),
    'tpu': ('jax[tpu]>=0.10,<0.13',),
}
# Module -> the extra that brings it.
EXTRA_OF = {
    'tensorflow': 'data',
    'tensorflow_datasets': 'data',
    'array_record': 'data',
    'grain': 'workers',
    'av': 'video',
    'soxr': 'video',
    'cv2': 'flow',
    'pycocotools': 'detection',
    'lmdb': 'regions',
    'tokenizers': 'text',
    'sentencepiece': 'text',
    'safetensors': 'exchange',
    'flask': 'search',
    'usearch': 'search',
    'huggingface_hub': 'hub',
    'apache_beam': 'beam',
    'mlcroissant': 'beam',
    's3fs': 's3',
    'gcsfs': 'gcs',
}


class MissingExtra(ConfigError, ImportError):
    """An optional package is missing; the message has the command that installs it."""


def install_command(*extras: str) -> str:
    """The command that adds extras to the environment.

    Args:
        *extras: keys of REQUIREMENTS.
    """
    quoted = []
    for extra in extras:
        quoted += [f'"{requirement}"' for requirement in REQUIREMENTS[extra]]
    return f'pip install {" ".join(quoted)}'


@contextlib.contextmanager
def needed(extra: str, purpose: str) -> Iterator[None]:
    """Within it, a failed import is a MissingExtra.

    Args:
        extra: a key of REQUIREMENTS.
        purpose: what the packages are imported for; the sentence begins with it.

    Raises:
        MissingExtra: an import within it failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtra(
            f'{purpose} needs the extra {extra!r} ({error}): {install_command(extra)}'
        ) from error


def check(purpose: str, *modules: str) -> None:
    """Raise if one of these modules is not installed. They are looked for, not imported.

    Args:
        purpose: what they are needed for; the sentence begins with it.
        *modules: keys of EXTRA_OF.

    Raises:
        MissingExtra: the message names all that are missing, and one command for them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        # Each once, in the order of the modules.
        extras = dict.fromkeys(EXTRA_OF[name] for name in missing)
        raise MissingExtra(
            f'{purpose} needs packages that are not installed ({", ".join(missing)}): '
            f'{install_command(*extras)}'
        )
