"""The suite of linear and squared attention, and the peers beside it, with substitutes for both."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from experiments import benchmark, cli
from jaxmem.reports.benchmark import cases, cells, ops, peers, result, timing, two_mamba
from jaxmem.reports.benchmark.work import Ceilings

SLOW = Ceilings(copy=1e9, matmul=1e9)


def timed(form: str, width: int, length: int, ms: float) -> cells.Cell:
    shape = {"B": 1, "T": length, "H": 1, "K": width}
    cell: cells.Cell = {"form": form, "shape": shape, "status": "ok"}
    return cell | {field: {"ms": ms} for field in two_mamba.FIELDS}


@pytest.mark.parametrize(
    ("ratios", "length"),
    [
        ({128: 0.5, 256: 2.0}, 181),  # halfway between the logarithms
        ({128: 0.5, 256: 0.25}, None),
        ({128: 1.5, 256: 3.0}, 128),
        ({128: 1.1, 256: 0.9, 512: 3.0}, 272),  # the last crossing counts, not noise before it
        ({}, None),
    ],
)
def test_break_even_is_between_the_lengths_around_it(ratios: dict[int, float], length: int | None):
    found = [timed(two_mamba.PAIRS, 16, t, ratio) for t, ratio in ratios.items()]
    found += [timed("chunks of 32", 16, t, 1.0) for t in ratios]
    found += [timed("chunks of 32", 32, 64, 1.0)]  # of another width
    found += [timed(two_mamba.PAIRS, 16, 4096, 1.0)]  # without the other form
    row = two_mamba.summary(found, 16, 32)
    assert row["predicted"] == 2 * (32 + 16 * 17 // 2)
    assert row["forward"]["length"] == row["forward_backward"]["length"] == length
    assert set(row["forward"]["gains"]) == set(ratios)


def test_the_suite_measures_all_rows_and_both_forms_alone(capsys, tmp_path, monkeypatch):
    seen: list[cases.Case] = []

    def measured(case: cases.Case, *_: Any, **__: Any) -> list[cells.Cell]:
        seen.append(case)
        about = {"op": case.op.name, "variant": case.op.variant, "shape": case.shape}
        about |= {"dtype": case.dtype, "small": case.small, "status": "ok", "errors": {"out": 1e-7}}
        forms = case.forms()[0]
        numbers = {"compile_s": 1.0, "temp_bytes": 1, "spread": 0.0, "of_floor": 0.5}
        return [
            about | {"form": f} | {field: numbers | {"ms": 1.0 + n} for field in two_mamba.FIELDS}
            for n, f in enumerate(forms)
        ]

    monkeypatch.setattr(ops, "measure_case", measured)
    monkeypatch.setattr(two_mamba, "measure_case", measured)
    monkeypatch.setattr(timing, "measure_ceilings", lambda _: SLOW)
    monkeypatch.setitem(two_mamba.LENGTHS, "cpu", (16, 32))
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit) as stopped:
        cli.run(benchmark.main, ["--suite", "two_mamba", "--out", str(path)])
    out, _ = capsys.readouterr()
    assert stopped.value.code == 0
    found = json.loads(path.read_text())
    assert out.strip() == result.table(found).strip()
    names = {case.op.label for case in seen}
    assert {"linear_attention, Mamba-2", "squared_attention", "attention, 2Mamba-E"} <= names
    assert {cell["form"] for cell in found["crossover"]["cells"]} == {
        two_mamba.PAIRS,
        *("chunks of 32", "chunks of 64"),
    }
    assert "| 16 | " in out
    assert "below 16" not in out  # pairs took 1 ms and chunks 2 or 3: chunks never win
    assert "| 16 | 32 | forward | 336 | none | 0.50 | 0.50 |" in out
    assert "| 32 | 64 | forward+backward | 1184 | none | 0.33 | 0.33 |" in out
    assert "attention, gated softmax | B2 T256 H4 K32" in out


def test_a_form_of_the_square_that_was_not_timed_says_why():
    cell = timed(two_mamba.PAIRS, 16, 64, 1.0)
    cell |= {"status": "skipped", "reason": "forward needs 3.0 GiB of memory"}
    row = result._form_row([cell], cell["shape"], [two_mamba.PAIRS])
    assert row == ["B1 T64 H1 K16", "forward needs 3.0 GiB of memory", ""]


def result_of(case: cases.Case) -> dict[str, Any]:
    cell = {"op": case.op.name, "variant": case.op.variant, "shape": case.shape}
    cell |= {"dtype": case.dtype, "small": case.small, "form": "xla"}
    return {"ceilings": SLOW._asdict(), "cells": [cell, dict(cell, form="reference")]}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let peers be measured by a substitute, which keeps the command and the inputs."""
    kept: dict[str, Any] = {"commands": []}

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        kept["commands"].append(command)
        kept["inputs"] = dict(np.load(command[command.index("--inputs") + 1]))
        line = {"status": "ok", "errors": {"out": 0.0}}
        line |= {field: {"ms": 2.0, "spread": 0.0} for field in two_mamba.FIELDS}
        return SimpleNamespace(returncode=0, stdout="chatter\n" + json.dumps(line), stderr="")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(peers.subprocess, "run", run)
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "mlstm_kernels" else name)
    return kept


def small_case(name: str, variant: str = "") -> cases.Case:
    shape = {"B": 1, "T": 4, "H": 2, "G": 1, "K": 4, "V": 4}
    op = cases.find_op(name, variant)
    return cases.Case(op, {k: shape[k] for k in op.small[0]}, "bfloat16", small=False)


def test_a_peer_gets_our_inputs_and_what_they_should_give(capsys, on_gpu: dict[str, Any]):
    case = small_case("linear_attention", "Mamba-2")
    found = peers.with_peers(result_of(case), budget=0.0, rounds=1)
    (command,) = on_gpu["commands"]  # once per shape, not per form of ours
    assert command[2:5] == ["benchmarks.peers.linear_attentions", "--peer", "fla chunk_simple_gla"]
    inputs = on_gpu["inputs"]
    assert inputs["float32"].tolist() == ["log_decay"]
    assert inputs["q"].shape == (1, 4, 1, 4)
    np.testing.assert_array_equal(inputs["v"], np.asarray(case.operands["v"], np.float32))
    assert [inputs[f"expected_{n}"].shape[2] for n in range(5)] == [2, 1, 1, 2, 2]
    cell = found["cells"][-1]
    assert (cell["form"], cell["variant"], cell["status"]) == (
        *("fla chunk_simple_gla", "Mamba-2"),
        "ok",
    )
    assert cell["forward"]["of_floor"] == cell["forward"]["floor_ms"] / 2.0


def test_peers_that_are_not_here_are_named(capsys, on_gpu: dict[str, Any]):
    found = peers.with_peers(result_of(small_case("linear_attention")), budget=0.0, rounds=1)
    assert [cell["form"] for cell in found["cells"][2:]] == ["fla chunk_simple_gla"]
    assert "peer mlstm_kernels is not installed: skipped" in capsys.readouterr().err


def test_the_authors_kernels_need_their_checkout(capsys, on_gpu: dict[str, Any]):
    case = small_case("squared_attention")
    found = peers.with_peers(result_of(case), budget=0.0, rounds=1)
    assert len(found["cells"]) == 2
    assert "peer 2Mamba needs --peer-checkout: skipped" in capsys.readouterr().err
    found = peers.with_peers(result_of(case), checkout=Path("theirs"), budget=0.0, rounds=1)
    (command,) = on_gpu["commands"]
    assert command[command.index("--checkout") + 1] == "theirs"
    assert found["cells"][-1]["form"] == "2Mamba"


def test_a_peer_that_fails_says_its_last_words(monkeypatch, on_gpu: dict[str, Any]):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nOSError: no CUDA\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: failed)
    found = peers.with_peers(
        result_of(small_case("linear_attention", "no decay")), budget=0.0, rounds=1
    )
    assert found["cells"][-1]["reason"] == "its process failed: OSError: no CUDA"


def test_every_peer_has_its_script():
    folder = Path(__file__).parents[3] / "benchmarks" / "peers"
    for use, those in peers.PEERS.items():
        assert cases.find_op(*use)
        for peer in those:
            assert f'"{peer.name}"' in (folder / f"{peer.script}.py").read_text("utf-8")
