"""The configuration of a run: what is trained, on what, how, and where it is written.

The JSON form is one object per dataclass; the task, the model and the two slots of a block carry a
`kind`, their registered name. Unknown keys are errors.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxmem.backbones.base import ModelConfig, model_class, model_name
from jaxmem.data.config import DataConfig
from jaxmem.errors import ConfigError, JaxmemError
from jaxmem.mixers.base import MixerConfig, config_class, config_name
from jaxmem.parallel.mesh import ParallelConfig
from jaxmem.tasks.base import TaskConfig, task_class, task_name
from jaxmem.tasks.language_modeling import LanguageModelingConfig
from jaxmem.training.optim import OptimConfig

EXEMPT = frozenset(
    {
        "run.dir",
        "run.name",
        "run.steps",
        "run.log_every",
        "run.keep",
        "run.samples",
        "run.sample_tokens",
        "run.wandb",
        "run.allow_config_change",
        "parallel.mesh",
    }
)
"""Fields that may differ between the parts of one run: they do not change what is learnt per update
(the mesh only within rounding, which the log then says)."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long a run is, what it reports, and where it is kept."""

    name: str = ""
    """Name of the run, by default that of the preset; its folder is `runs/<name>`."""
    dir: str | None = None
    """Folder of the run, if not `runs/<name>`."""
    steps: int = 2000
    """Updates in total; more than a finished run has done makes it go on."""
    seed: int = 1337
    """The one seed; streams for init, data, dropout and evaluation are derived from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of activations; parameters, optimiser and losses are float32 always."""
    log_every: int = 10
    """Updates between rows of metrics."""
    eval_every: int = 250
    """Updates between evaluations; there is one before the first and one after the last update."""
    eval_batches: int = 20
    """Random batches per split and evaluation, the same ones every time."""
    checkpoint_every: int = 0
    """Updates between checkpoints; 0 means `run.eval_every`."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the one with the best validation loss."""
    samples: int = 3
    """Texts sampled at the end of the run."""
    sample_tokens: int = 200
    """Tokens per sampled text."""
    wandb: bool = False
    """Also report to Weights & Biases (extra `wandb`)."""
    allow_config_change: bool = False
    """Resume although fields that matter differ from the run folder's config."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "eval_batches", "keep"):
            if getattr(self, name) < 1:
                raise _refused(name, getattr(self, name), "1 or more")
        for name in ("checkpoint_every", "samples", "sample_tokens", "seed"):
            if getattr(self, name) < 0:
                raise _refused(name, getattr(self, name), "0 or more")

    @property
    def folder(self) -> Path:
        """Folder of the run.

        Raises:
          ConfigError: neither `run.dir` nor `run.name` is given.
        """
        if not self.name and not self.dir:
            raise ConfigError("`run.name` and `run.dir` are both empty. Give one of them.")
        return Path(self.dir) if self.dir else Path("runs") / self.name

    @property
    def checkpoint_interval(self) -> int:
        """Updates between checkpoints."""
        return self.checkpoint_every or self.eval_every


def _refused(name: str, value: int, expected: str) -> ConfigError:
    flag = name.replace("_", "-")
    return ConfigError(f"`run.{name}={value}` must be {expected}. Give another `--run.{flag}`.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run."""

    model: ModelConfig
    """The model."""
    task: TaskConfig = field(default_factory=LanguageModelingConfig)
    """What is learnt and measured."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is optimised."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is spread over devices."""
    run: RunOptions = field(default_factory=RunOptions)
    """How long, how reported, where kept."""

    def __post_init__(self) -> None:
        warmup, decay = self.optim.warmup_steps, self.optim.decay_steps
        if self.optim.schedule in ("cosine", "linear") and 0 < decay < warmup:
            raise ConfigError(
                f"`optim.decay_steps={decay}`, at which the {self.optim.schedule} ends, comes "
                f"before the end of the warm-up, `optim.warmup_steps={warmup}`. Use fewer warm-up "
                "steps, or "
                "`--optim.decay-steps 0` for `run.steps`."
            )
        shards = self.parallel.batch_shards
        parts = shards * self.optim.accumulate
        if self.data.batch_size % parts:
            raise ConfigError(
                f"`data.batch_size={self.data.batch_size}` does not split into "
                f"`optim.accumulate={self.optim.accumulate}` micro-batches on {shards} "
                f"device{'s' * (shards != 1)} "
                f"(`parallel.mesh={self.parallel.mesh!r}`). Use a multiple of {parts}."
            )
        self.task.check(self.model, self.data)


class _Family(NamedTuple):
    """Config classes that stand in for one another, told apart by their `kind`."""

    base: type
    config_class: Callable[[str], type]
    name: Callable[[type], str]
    default: str | None
    """What a config without `kind` is: version 0.1 knew one kind of model."""


_FAMILIES = {
    "mixer": _Family(MixerConfig, config_class, config_name, None),
    "model": _Family(ModelConfig, model_class, model_name, "decoder"),
    "task": _Family(TaskConfig, task_class, task_name, None),
}


@cache
def _converter() -> Any:
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True)
    for what, family in _FAMILIES.items():
        _tag(converter, what, family)
    return converter


def _tag(converter: Any, what: str, family: _Family) -> None:
    """Let the converter write and read the `kind` of a family's configs."""
    from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

    def belongs(cls: Any) -> bool:
        return isinstance(cls, type) and issubclass(cls, family.base)

    def unstructure(value: Any) -> dict[str, Any]:
        plain = make_dict_unstructure_fn(type(value), converter)
        return {"kind": family.name(type(value)), **plain(value)}

    def structure(tree: Mapping[str, Any], _: type) -> Any:
        fields = dict(tree)
        kind = fields.pop("kind", family.default)
        if kind is None:
            raise ConfigError(f"a {what} has no `kind`")
        cls = family.config_class(kind)
        return make_dict_structure_fn(cls, converter)(fields, cls)

    converter.register_unstructure_hook_func(belongs, unstructure)
    converter.register_structure_hook_func(belongs, structure)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested dicts of JSON values."""
    return _converter().unstructure(config)


def to_json(config: RunConfig) -> str:
    """Return the configuration as indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str, *, name: str = "The configuration") -> RunConfig:
    """Read a configuration from JSON.

    Args:
      text: the JSON.
      name: what to call it in messages, such as the path it was read from.

    Raises:
      ConfigError: it is no JSON, or a key is unknown, missing, or holds a value of another type.
    """
    from cattrs import transform_error
    from cattrs.v import format_exception

    def words(error: BaseException, kind: type | None) -> str:
        return str(error) if isinstance(error, JaxmemError) else format_exception(error, kind)

    try:
        return _converter().structure(json.loads(text), RunConfig)
    except json.JSONDecodeError as err:
        raise ConfigError(f"{name} is not valid JSON: {err}.") from err
    except Exception as err:  # cattrs raises groups of whatever went wrong in each field
        problems = "; ".join(transform_error(err, path="config", format_exception=words))
        raise ConfigError(f"{name} does not fit this version of jaxmem: {problems}.") from err


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


def diff(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """List the fields that differ as (dotted path, value in a, value in b); None where absent."""
    left, right = flatten(to_dict(a)), flatten(to_dict(b))
    paths = list(left) + [path for path in right if path not in left]
    return [
        (path, left.get(path), right.get(path))
        for path in paths
        if left.get(path) != right.get(path)
    ]
