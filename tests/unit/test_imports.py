"""What an import loads, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("orbax", "grain", "tensorflow_datasets", "matplotlib", "tensorboardX", "wandb", "torch")


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages loaded after a statement."""
    report = (
        "import json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{statement}\n{report}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "there", "absent"),
    [
        ("import jaxmem", "jaxmem", ("jax", "flax", "numpy")),
        ("import jaxmem.errors", "jaxmem", ("jax", "flax", "numpy")),
        ("import pallas_kernels", "pallas_kernels", ("flax", "jaxmem")),
        ("import pallas_kernels._compat", "jax", ("flax", "jaxmem")),
        ("import jaxmem.ops.leaky_average, jaxmem.ops.attention", "jax", ("flax", *HEAVY)),
        ("import jaxmem.mixers.mosaic", "flax", HEAVY),
        ("from jaxmem.mixers.base import names; names()", "flax", HEAVY),
        ("import jaxmem.backbones.decoder", "flax", HEAVY),
    ],
    ids=lambda value: value if isinstance(value, str) and "import" in value else None,
)
def test_import_loads_no_more_than_it_needs(statement: str, there: str, absent: tuple[str, ...]):
    loaded = loaded_by(statement)
    assert there in loaded
    assert not loaded & set(absent)


def test_public_names_are_there_and_come_late():
    import jaxmem

    assert jaxmem.__all__ == sorted(jaxmem.__all__)
    assert all(callable(getattr(jaxmem, name)) for name in jaxmem.__all__)
    assert set(jaxmem.__all__) <= set(dir(jaxmem))
    assert "jax" not in loaded_by("import jaxmem")
    assert "jaxmem" in loaded_by("import jaxmem; jaxmem.explain('attention')")
    with pytest.raises(AttributeError, match="no attribute 'attentionn'"):
        _ = jaxmem.attentionn
