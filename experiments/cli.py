"""The command line that all verbs share: presets, typed overrides, exit codes.

Exit codes: 0 done, 1 crash, 2 a mistake of the user (one message, no traceback unless --debug),
75 preempted (start the same command again).
"""

import dataclasses
import difflib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from jaxmem.errors import ConfigError, JaxmemError

if TYPE_CHECKING:
    from jaxmem.training.config import RunConfig

USER_ERROR = 2
PREEMPTED = 75

# Errors of the machine that the user can mend; anything else from the system is a crash.
_FREE, _OPEN = "Free some space", "Make it readable and writable"
_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EACCES: _OPEN,
    errno.EPERM: _OPEN,
    errno.EROFS: _OPEN,
    errno.ENOTDIR: "Remove the file that is in the way",
}

_COMMON = {
    "--config": "a preset's name, a .py file that defines `config`, or a saved config.json",
    "--mixer": "replace the mixer family; fields of the same name are carried over",
    "--feed-forward": "replace the family of the feed-forward layers likewise",
    "--list": "the presets and mixers, and stop",
    "--print-config": "the resolved configuration as JSON, its difference to the preset, and stop",
    "--help": "every field of the chosen preset, and stop",
    "--debug": "show the traceback of a user error",
}

_SLOTS = {"--mixer": "mixer", "--feed-forward": "feed_forward"}
"""Flags that replace the family in a slot of every block."""

T = TypeVar("T")


class Parsed(NamedTuple):
    """A configuration from the command line, and the preset that it started from."""

    config: "RunConfig"
    preset: "RunConfig"


def run(verb: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit with its code; turn user errors into one message and code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = pop_flag(args, "--debug")
    try:
        if pop_flag(args, "--list"):
            from experiments.listing import listing

            print(listing())
            sys.exit(0)
        sys.exit(verb(args))
    except JaxmemError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if debug or error.errno not in _REMEDIES:
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = f"{_REMEDIES[error.errno]}, or choose another folder (of a new run: --run.dir)."
        print(f"error: {os.strerror(error.errno)}{where}. {remedy}", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(USER_ERROR)


def pop_flag(args: list[str], name: str) -> bool:
    """Take ``name`` out of ``args``; say whether it was there."""
    found = name in args
    args[:] = [a for a in args if a != name]
    return found


def pop_value(args: list[str], name: str) -> str | None:
    """Take ``name VALUE`` or ``name=VALUE`` out of ``args``; None if it is not there.

    Raises:
      ConfigError: the value is missing, or the flag is given twice.
    """
    found = []
    rest = []
    pending = iter(args)
    for arg in pending:
        if arg == name:
            value = next(pending, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name} needs a value: {_COMMON[name]}.")
            found.append(value)
        elif arg.startswith(f"{name}="):
            found.append(arg.removeprefix(f"{name}="))
        else:
            rest.append(arg)
    if len(found) > 1:
        raise ConfigError(f"{name} is given {len(found)} times: {', '.join(found)}. Give one.")
    args[:] = rest
    return found[0] if found else None


def parse_run(args: list[str], prog: str) -> Parsed:
    """Parse ``--config``, families and the dotted overrides; stop here for --help and the like.

    Raises:
      ConfigError: no preset is named, an argument cannot be parsed, or values do not fit together.
      UnknownName: there is no such preset or mixer.
      SystemExit: after --help and --print-config.
    """
    name = pop_value(args, "--config")
    if name is None:
        if "--help" in args or "-h" in args:
            print(usage(prog))
            sys.exit(0)
        raise ConfigError(_no_config(args))
    families = {slot: pop_value(args, flag) for flag, slot in _SLOTS.items()}
    print_config = pop_flag(args, "--print-config")
    import configs

    preset = configs.load(name)
    default = preset
    for slot, family in families.items():
        if family is not None:
            default = with_family(default, slot, family)
            _say_replaced(slot, preset, default)
    config = parse(
        type(preset),
        args,
        prog=f"{prog} --config {shlex.quote(name)}",
        default=default,
        description=_flags(),
    )
    if print_config:
        from jaxmem.training.config import diff, to_json

        print(to_json(config), end="")
        changes = [f"  {path}: {old!r} -> {new!r}" for path, old, new in diff(preset, config)]
        title = f"difference to {name}:" if changes else f"no difference to {name}"
        print("\n".join([title, *changes]), file=sys.stderr)
        sys.exit(0)
    return Parsed(config, preset)


def parse(
    kind: type[T],
    args: list[str],
    *,
    prog: str,
    default: T | None = None,
    description: str | None,
) -> T:
    """Parse ``args`` into the dataclass ``kind``; see `experiments.parsing`."""
    from experiments import parsing  # imports tyro, which --list does without

    return parsing.parse(kind, args, prog=prog, default=default, description=description)


def with_family(preset: "RunConfig", slot: str, name: str) -> "RunConfig":
    """Replace what every block has in ``slot`` by the family ``name`` with its defaults.

    Fields that both families have (the number of heads, the dropout) keep the preset's values.

    Raises:
      UnknownName: there is no such family.
      ConfigError: the preset's model has nothing in the slot.
    """
    from jaxmem.mixers.base import config_class

    old, new = getattr(preset.model, slot, None), config_class(name)
    if old is None:
        raise ConfigError(
            f"{name}: the model of {preset.run.name or 'this config'} has no {slot} to replace. "
            "Choose a preset with a decoder."
        )
    shared = {f.name for f in dataclasses.fields(old)} & {f.name for f in dataclasses.fields(new)}
    model: Any = preset.model
    family = new(**{field: getattr(old, field) for field in shared})
    return dataclasses.replace(preset, model=dataclasses.replace(model, **{slot: family}))


def _say_replaced(slot: str, preset: "RunConfig", config: "RunConfig") -> None:
    """Name what was replaced: a mixer that sees no other token leaves a model that cannot."""
    from jaxmem.mixers.base import config_name

    old, new = (config_name(type(getattr(run.model, slot))) for run in (preset, config))
    print(f"note: model.{slot}: {old} -> {new}", file=sys.stderr)


def usage(prog: str) -> str:
    """Return how the verb is called, for --help without a preset."""
    return f"usage: {prog} --config NAME [--field.name VALUE ...]\n\n{_flags()}"


def _flags() -> str:
    width = max(map(len, _COMMON))
    return "\n".join(f"{flag.ljust(width)}  {text}" for flag, text in _COMMON.items())


def _no_config(args: Sequence[str]) -> str:
    message = "No preset is named. Give --config NAME; --list shows the presets."
    flags = [a.partition("=")[0] for a in args if a.startswith("--")]
    close = [(f, m[0]) for f in flags if (m := difflib.get_close_matches(f, _COMMON, n=1))]
    return message + "".join(f" Did you mean {known} by {flag}?" for flag, known in close)
