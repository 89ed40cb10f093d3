"""`functools.cache` for functions of classes."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
V = TypeVar("V")


def cached(function: Callable[P, V]) -> Callable[P, V]:
    """`functools.cache` with the type of ``function``; the type of `cache` allows no class."""
    return cast(Callable[P, V], functools.cache(function))
