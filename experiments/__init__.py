"""The experiments of the paper, and beyond it, on top of `dns_jax`."""
