"""Config classes by name: what makes a configuration readable again from its JSON form."""

import importlib
import pkgutil
from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, TypeVar

from jaxmem.errors import ConfigError, unknown_name

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """The config classes of one kind, each registered in its own file of one package."""

    def __init__(self, kind: str, package: str):
        """Begin without entries.

        Args:
          kind: what is registered, for messages.
          package: whose modules are imported before the first look-up.
        """
        self._kind = kind
        self._package = package
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Register the decorated config class under a unique name."""

        def decorate(config: C) -> C:
            if name in self._entries:
                raise ConfigError(
                    f"Two {self._kind}s are called {name!r}: {self._entries[name].__module__} and "
                    f"{config.__module__}. Give one of them another name."
                )
            self._entries[name] = config
            return config

        return decorate

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._found)

    def config_class(self, name: str) -> type[T]:
        """Return the class of a name; UnknownName with close matches if there is none."""
        if name not in self._found:
            raise unknown_name(self._kind, name, self._found)
        return self._found[name]

    def name_of(self, config: type[T]) -> str:
        """Return the name of a class.

        Raises:
          ConfigError: the class was never registered, so nothing could read it back.
        """
        for name, entry in self._found.items():
            if entry is config:
                return name
        raise ConfigError(
            f"{config.__name__} is no registered {self._kind}. Decorate it with its registration."
        )

    @cached_property
    def _found(self) -> dict[str, type[T]]:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return self._entries
