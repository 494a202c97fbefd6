"""The packages of a wheel; everything else stands in pyproject.toml.

The named configs are the folder configs/ of a clone. In a wheel they are vatt_jax.configs: a
package called `configs` would take that name from every other program of the environment.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['vatt_jax*', 'data_pipelines*']), 'vatt_jax.configs'],
    package_dir={'vatt_jax.configs': 'configs'},
)
