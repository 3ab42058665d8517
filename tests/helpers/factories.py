"""Finds what optax makes gradient transformations with, and tells its kinds by their signatures."""

import functools
import inspect

import optax


def signature_of(factory):
    return inspect.signature(factory).parameters


def required(factory):
    """The parameters without a default."""
    return {
        name: parameter
        for name, parameter in signature_of(factory).items()
        if parameter.default is parameter.empty
    }


def makes_transformation(factory):
    """Whether something is a function that returns a gradient transformation."""
    if not (inspect.isroutine(factory) or isinstance(factory, functools.partial)):
        return False
    returns = inspect.signature(factory).return_annotation
    # Some, as dog, have no annotation, but a docstring.
    says = factory.__doc__ or '' if returns is inspect.Signature.empty else str(returns)
    return 'gradienttransformation' in says.lower().replace(' ', '')


def find():
    return {
        name: factory
        for module in (optax, optax.contrib)
        for name, factory in sorted(vars(module).items())
        if not name.startswith('_') and makes_transformation(factory)
    }


def kind(name, factory):
    if any('GradientTransformation' in str(p.annotation) for p in required(factory).values()):
        return 'wrapper'
    has_rate = any(parameter.endswith('learning_rate') for parameter in signature_of(factory))
    return 'optimizer' if has_rate and not name.startswith('scale_by_') else 'block'


FACTORIES = find()
OPTIMIZERS, WRAPPERS, BLOCKS = (
    [name for name, factory in FACTORIES.items() if kind(name, factory) == wanted]
    for wanted in ('optimizer', 'wrapper', 'block')
)
