"""Checks of the fields of a config that several configs share."""

import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxmem.errors import ConfigError


def check_choices(config: Any, path: str) -> None:
    """Raise ConfigError unless each field of a `Literal` type has one of its values."""
    for field, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, field) not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise ConfigError(f"{path}.{field}={getattr(config, field)!r}. Use one of {choices}.")


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
