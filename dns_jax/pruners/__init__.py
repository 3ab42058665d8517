"""The pruners that surgery is compared with: by rules of their own, or by regrowing."""

from dns_jax.pruners.by_rules import gradual, han, iterative, one_shot
from dns_jax.pruners.regrowing import regrow

__all__ = ['gradual', 'han', 'iterative', 'one_shot', 'regrow']
