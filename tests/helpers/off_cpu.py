"""Run what ops run off the CPU, on the CPU."""

from types import ModuleType
from typing import Any, NoReturn

import pytest


def trees_only(monkeypatch: pytest.MonkeyPatch, *ops: ModuleType) -> None:
    """Let these ops scan in trees as on a GPU; a step per token, as on a CPU, fails the test."""
    for op in ops:
        monkeypatch.setattr(op, "on_cpu", lambda: False)
        for name in (name for name in vars(op) if name.startswith("_steps")):
            monkeypatch.setattr(op, name, _refuse)


def _refuse(*_: Any) -> NoReturn:
    pytest.fail("a step per token ran where a tree should")
