"""Checks of the fields of a config that several configs share."""

import math
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxmem.errors import ConfigError


def check_choices(config: Any, path: str) -> None:
    """Raise ConfigError unless each field of a `Literal` type has one of its values."""
    for field, choices in _choices(type(config)).items():
        if getattr(config, field) not in choices:
            names = ", ".join(map(str, choices))
            raise ConfigError(f"{path}.{field}={getattr(config, field)!r}. Use one of {names}.")


@cache
def _choices(config: type) -> dict[str, tuple[Any, ...]]:
    """Return the values of each field of a `Literal` type."""
    kinds = get_type_hints(config).items()
    return {field: get_args(kind) for field, kind in kinds if get_origin(kind) is Literal}


def check_positive(config: Any, path: str, **usual: float) -> None:
    """Raise ConfigError unless fields are positive and finite; `usual` names a value of each."""
    for field, value in usual.items():
        found = getattr(config, field)
        if not 0.0 < found < math.inf:
            raise ConfigError(
                f"{path}.{field}={found} is not positive and finite. Use {value:g}, say."
            )


def check_at_least_one(config: Any, path: str, *fields: str) -> None:
    """Raise ConfigError unless these numbers are 1 or more."""
    for field in fields:
        if getattr(config, field) < 1:
            raise ConfigError(f"{path}.{field}={getattr(config, field)}. Use 1 or more.")
