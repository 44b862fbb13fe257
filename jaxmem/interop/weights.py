"""Weight files (safetensors): written and read by the names of the original checkpoints.

`load_weights(model, path)` finds by the names in the file which family it belongs to;
`save_weights(model, path)` uses the names of the family that the model belongs to, and our own
dotted paths for models of none.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxmem.errors import CheckpointMismatch, ConfigError, unknown_name
from jaxmem.interop.families import FAMILIES
from jaxmem.interop.names import Names, export_params, identity, import_params, params_of

AUTO, OWN = "auto", "jaxmem"


def save_weights(model: Any, path: str | Path, *, names: str = AUTO) -> str:
    """Write the parameters of a model, tied tensors under each of their names.

    Args:
      model: has a `config`.
      path: of the file, which is replaced if there is one.
      names: a family (see `FAMILIES`), `jaxmem` for our own names, or `auto` for the first family
        that computes what the model does, and our own names if there is none.

    Returns:
      Whose names were used.

    Raises:
      UnknownName: there is no such family.
      ConfigError: the model is not of the family.
    """
    from safetensors.numpy import save_file

    used, table = _table(model, names)
    part = Path(f"{path}.part")
    try:
        save_file(export_params(model, table), part, {"names": used})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return used


def load_weights(model: Any, path: str | Path) -> str:
    """Set every parameter of a model from a weight file, cast to its dtype.

    Args:
      model: has a `config`; it is changed in place.
      path: of a safetensors file by the names of a family, or by our own.

    Returns:
      Whose names were found.

    Raises:
      CheckpointMismatch: the file cannot be read, its names are of no known family, the model
        computes something else than that family's, or tensors are missing, unknown, misshapen, not
        floating point or not finite; the model is then unchanged.
    """
    arrays = read_tensors(path)
    found = _family_of(arrays, model)
    try:
        _, table = _table(model, found)
        import_params(model, arrays, table)
    except (CheckpointMismatch, ConfigError) as error:
        raise CheckpointMismatch(f"{path} (names of {found}): {error}") from error
    return found


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read a safetensors file.

    Raises:
      CheckpointMismatch: there is none, or it is something else or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise CheckpointMismatch(f"There is no file {path}. Give a .safetensors file.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointMismatch(
            f"{path} is no safetensors file, or damaged: {error}. A checkpoint of PyTorch must be "
            "saved as safetensors first, with safetensors.torch.save_file."
        ) from error


def _family_of(arrays: Mapping[str, np.ndarray], model: nnx.Module) -> str:
    """Find the family of a file by the names in it.

    Raises:
      CheckpointMismatch: it is none that we know.
    """
    for family, (_, mark, *_) in FAMILIES.items():
        if any(re.fullmatch(mark, name) for name in arrays):
            return family
    if not set(params_of(model)) & set(arrays):
        some = ", ".join(sorted(arrays)[:3]) or "none"
        known = "; ".join(f"{name} ({f.title})" for name, f in FAMILIES.items())
        raise CheckpointMismatch(
            f"The names of the tensors ({some}, ...) are of no known family. Known: {known}; and "
            f"our own names of a model of this kind."
        )
    return OWN


def _table(model: Any, names: str) -> tuple[str, Names]:
    """Return the table of a family that the model belongs to, with its name."""
    if names == OWN:
        return OWN, identity(model)
    if names == AUTO:
        fitting = (n for n, f in FAMILIES.items() if not f.differences(model.config))
        return _table(model, next(fitting, OWN))
    if names not in FAMILIES:
        raise unknown_name("family of weights", names, [AUTO, OWN, *FAMILIES])
    family = FAMILIES[names]
    if differences := family.differences(model.config):
        raise ConfigError(
            f"The model is not of {family.title}: {'; '.join(differences)}. Change the model, or "
            "the names."
        )
    return names, family.names(model.config)
