"""Run what ops run off the CPU, on the CPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import pytest


def elsewhere_only(monkeypatch: pytest.MonkeyPatch, *ops: ModuleType) -> None:
    """Let these ops take the trees or chunks of a GPU; a step per token fails the test."""

    def second(cpu: Callable[..., Any], elsewhere: Callable[..., Any], *operands: Any) -> Any:
        del cpu
        return elsewhere(*operands)

    for op in ops:
        monkeypatch.setattr(op, "on_cpu_or_elsewhere", second)
        monkeypatch.setattr(op, "_steps", _refuse)


def _refuse(*_: Any) -> NoReturn:
    pytest.fail("a step per token ran where a tree or chunks should")
