"""Parse arguments with tyro, and say what is wrong with them in one plain message.

tyro draws its messages in boxes that break paths and commands; here they become a `ConfigError`,
which is printed like all others.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxmem.errors import ConfigError, JaxmemError

_REFUSED = 2
_NUMBERS = {int: ("INT", "a whole number"), float: ("FLOAT", "a number")}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

T = TypeVar("T")


def parse(
    kind: type[T],
    args: list[str],
    *,
    prog: str,
    default: T | None = None,
    description: str | None,
) -> T:
    """Parse ``args`` into the dataclass ``kind``.

    Raises:
      ConfigError: a flag is unknown, lacks its value, or has one that is not allowed.
      JaxmemError: as raised by the dataclass that found the values not to fit.
      SystemExit: after --help.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    helps = "--help" in args or "-h" in args
    shown = io.StringIO()
    try:
        with (
            _numbers(),
            contextlib.nullcontext() if helps else _unbroken_lines(),
            contextlib.redirect_stderr(shown),
        ):
            config = tyro.cli(
                tyro.conf.AvoidSubcommands[kind],
                args=args,
                prog=prog,
                description=description,
                **given,
            )
    except SystemExit as stop:
        if stop.code != _REFUSED:
            raise
        ours = _ours(stop)
        if ours is not None:
            raise ours from None
        raise ConfigError(_plain(shown.getvalue(), prog)) from stop
    sys.stderr.write(shown.getvalue())
    return config


def _ours(error: BaseException) -> JaxmemError | None:
    """Return the error of a dataclass that tyro turned into a box, if it was one."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, JaxmemError):
        seen = seen.__context__
    return seen


def _plain(box: str, prog: str) -> str:
    """Turn a box into a message: what is wrong, the nearest flags, where all flags are shown."""
    lines = _COLOURS.sub("", box).strip("\n").splitlines()
    # Below the title, drawn into the border, or underlined where the output is not UTF-8.
    lines = lines[1 if lines[0].startswith("╭") else 2 :]
    rows = [line.strip(" │") for line in lines if not line.startswith("╰")]
    what, *more = re.split(r"\n[─-]+\n", "\n".join(rows))
    what = re.sub(r"^(Error parsing |Missing from [^:]*(?=:))", "", " ".join(what.split()))
    what = f"Missing{what}" if what.startswith(":") else what
    near = [
        row.split()[0]
        for section in more
        if section.startswith("Perhaps you meant")
        for row in section.splitlines()
        if row.startswith("--")
    ]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{what.rstrip('.')}.{hint} `{prog} --help` shows every flag."


@contextlib.contextmanager
def _unbroken_lines() -> Iterator[None]:
    """Let tyro believe in a terminal so wide that no value is broken over two lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _numbers() -> ConstructorRegistry:
    """Return rules that explain in words what is no number."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        kind: Any = info.type
        if kind not in _NUMBERS:
            return None
        metavar, words = _NUMBERS[kind]

        def convert(found: list[str]) -> int | float:
            try:
                return kind(found[0])
            except ValueError:
                raise ValueError(f"found {found[0]!r}, expected {words}") from None

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=convert,
            is_instance=lambda value: isinstance(value, (int, kind)),
            str_from_instance=lambda value: [str(value)],
        )

    return registry
