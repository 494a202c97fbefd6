"""python -m vatt_jax: the same as the command vatt-jax."""

from vatt_jax import cli

if __name__ == '__main__':
    cli.entry()
