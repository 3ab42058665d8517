"""The pruners that surgery is compared with: by rules of their own, or by regrowing."""

from dns_jax.pruners.by_rules import ac_dc, gradual, han, iterative, one_shot, straight_through
from dns_jax.pruners.regrowing import regrow

__all__ = ['ac_dc', 'gradual', 'han', 'iterative', 'one_shot', 'regrow', 'straight_through']
