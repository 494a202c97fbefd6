"""Self-supervised pretraining of video, audio and text encoders.

vatt_jax.load(checkpoint).embed(video=…, audio=…, text=…)
"""

from __future__ import annotations

from typing import Any

__version__ = '0.1.0'
__all__ = ['load']


def load(path: Any, which: str = 'student', base: Any = '') -> Any:
    """A trained model (vatt_jax.api.Model) from a run or checkpoint folder or hf://owner/name.

    which: student, or teacher: its momentum copy, where the run keeps one.
    base: where the frozen model is now that the run was trained beside (config.base), if it moved.
    """
    from vatt_jax import api  # late: importing the package must not start JAX

    return api.load(path, which, base)
