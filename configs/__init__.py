"""The named configs: package `configs` of a clone, `vatt_jax.configs` of an installed wheel."""
