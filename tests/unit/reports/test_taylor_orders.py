"""The curve of Taylor orders: what it measures, and the small runs beside it."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import taylor_orders
from benchmarks.taylor_orders import (
    TERMS,
    error,
    error_table,
    loss_table,
    plot,
    run_of,
    taylor,
    trained,
)
from jaxmem.interop.attention_types import from_name

MIXER = from_name("softmax_taylor_80terms", "attention", fixed=True, num_heads=4, terms=3)


def test_more_terms_are_closer_to_softmax():
    np.testing.assert_allclose(taylor(3)[:4], [1, 1, 1 / 2, 0])
    assert len(taylor(1)) == max(TERMS)
    small = [float(error(taylor(n), 0.5, 0)) for n in TERMS]
    assert all(b < a / 2 for a, b in itertools.pairwise(small[2:8]))
    assert small[-1] < 1e-6
    # One term is the plain mean of the values.
    assert 0.3 < small[0] < 1
    # Sums with an even highest power are positive, and so are never far off.
    large = [float(error(taylor(n), 3.0, 0)) for n in TERMS[::2]]
    assert all(b < a < 1 for a, b in itertools.pairwise(large))


def test_runs_differ_in_the_mixer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = run_of(MIXER, tmp_path)
    assert config.model.mixer == MIXER
    assert config.model.positions == "none"
    assert config.run.folder == tmp_path
    seen = []

    def stand_in(config):
        seen.append(config)
        rows = [{"step": 0, "val_loss": 3.0}, {"step": 200, "val_loss": 1.5}]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (config.run.folder / "metrics.jsonl").write_text(text)

    monkeypatch.setattr(taylor_orders, "train", stand_in)
    assert trained(MIXER, tmp_path) == 1.5
    assert seen == [config]


def test_tables_and_figure(tmp_path: Path):
    errors = {"a": {n: 1 / math.factorial(n) for n in TERMS}}
    assert "| 3 | 1.67e-01 |" in error_table(errors)
    assert "| softmax | 1.200 |" in loss_table({1: 2.0, 3: 1.5}, 1.2)
    for learnt in (None, ({1: 2.0, 3: 1.5}, 1.2)):
        path = tmp_path / f"{learnt is None}.png"
        plot(errors, learnt, path)
        assert path.read_bytes().startswith(b"\x89PNG")
