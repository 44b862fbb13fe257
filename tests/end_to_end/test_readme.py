"""The Python of the README runs as it is printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "mm_small.safetensors").exists()
    parts = jnp.concatenate([names["first"].y, names["rest"].y], axis=1)
    np.testing.assert_allclose(parts, names["whole"], rtol=1e-5, atol=1e-6)
    sizes = {names["layer"].state_bytes(1, tokens) for tokens in (10, 1000)}
    assert len(sizes) == 1
    # An average of ones, taken on every device of the test run.
    assert len(names["y"].sharding.device_set) == jax.device_count() > 1
    np.testing.assert_allclose(names["y"], 1.0, rtol=1e-6)
