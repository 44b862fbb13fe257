"""The benchmark: floors, the gate before the clock, the verb with its JSON, and launch tables."""

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from experiments import benchmark, cli
from jaxmem.backbones.decoder import DecoderConfig
from jaxmem.errors import ConfigError, UnknownName
from jaxmem.reports.benchmark import (
    baselines,
    cases,
    cells,
    compiled,
    mosaics,
    ops,
    result,
    timing,
    tune,
)
from jaxmem.reports.benchmark.work import Ceilings, floor_ms
from jaxmem.training.layout import ModelParts, take_apart
from pallas_kernels import _deviceless, _lock
from pallas_kernels._compat import stand_in_gpu
from pallas_kernels._launch import Entry, entries

H200 = Ceilings(copy=4.3e12, matmul=790e12)
SLOW = Ceilings(copy=1e9, matmul=1e9)


@pytest.mark.parametrize(
    ("op", "shape", "forward", "backward"),
    [
        # Microseconds by hand: elements x 2 bytes x passes / 4.3 TB/s, or FLOPs / 790 TFLOP/s.
        ("leaky_average", {"B": 8, "T": 2048, "H": 16, "K": 64}, 15.6, 23.4),
        ("gated_scan", {"B": 1, "T": 32768, "D": 1024}, 46.8, 78.0),
        # 2 x 16.8 M elements and as many weights and decays as heads: 68.2 MB; back 102.8 MB.
        ("weighted_average", {"B": 8, "T": 2048, "H": 16, "V": 64}, 15.85, 23.9),
        ("attention", {"B": 8, "T": 2048, "H": 16, "K": 64}, 87, 217),
        ("attention", {"B": 1, "T": 32768, "H": 16, "K": 64}, 2784, 6959),
        # 2 x 4096 queries x 2688 pairs x (64 + 64) x 12 heads = 33.8 GFLOP; backward 2.5 times.
        # q, k, v, y of 16.8 M elements and 0.26 M gates of 4 bytes; back 7 tensors, 2 of gates.
        ("linear_attention", {"B": 8, "T": 2048, "H": 16, "K": 64}, 31.5, 55.1),
        ("linear_attention", {"B": 1, "T": 8192, "H": 96, "K": 128}, 188, 329),
        ("squared_attention", {"B": 8, "T": 2048, "H": 16, "K": 64}, 87, 217),
        # Chunks: 2 (64 x 128 + 2 x 2080 x 64) FLOPs x 0.5 M tokens; back 2 (64 x 320 + 5 ...).
        ("squared_attention", {"B": 1, "T": 32768, "H": 16, "K": 64}, 364, 911),
        ("persistent_read", {"B": 8, "T": 512, "H": 12, "K": 64, "P": 2688, "R": 1}, 42.8, 107),
    ],
)
def test_floors_are_those_computed_by_hand(op: str, shape: Any, forward: float, backward: float):
    work = cases.find_op(op).work(shape, 2)
    assert floor_ms(work.forward, H200) * 1e3 == pytest.approx(forward, rel=5e-3)
    assert floor_ms(work.backward, H200) * 1e3 == pytest.approx(backward, rel=5e-3)
    assert work.both.bytes == work.forward.bytes + work.backward.bytes


def test_heads_that_share_keys_move_and_multiply_them_once():
    op = cases.find_op("linear_attention", "Mamba-2")
    work = op.work({"B": 1, "T": 32768, "H": 128, "G": 1, "K": 128, "V": 64}, 2)
    # v and y 1.074 GB, q and k 17 MB, gates 17 MB at 4.3 TB/s.
    assert floor_ms(work.forward, H200) * 1e3 == pytest.approx(257.5, rel=1e-3)
    # 128 (64 x 384 + 5 x 8192) + 64 x 128, times 2 x 32768, at 790 TFLOP/s.
    assert floor_ms(work.backward, H200) * 1e3 == pytest.approx(696.6, rel=1e-3)


def tiny(**changes: Any) -> cases.Case:
    shape = {"B": 1, "T": 8, "H": 2, "K": 4}
    op = dataclasses.replace(cases.find_op("leaky_average"), **changes)
    return cases.Case(op, shape, "float32", small=True)


def by_form(case: cases.Case) -> dict[str, cells.Cell]:
    found = cells.measure_case(case, SLOW, budget=0.0, rounds=1)
    return {cell["form"]: cell for cell in found}


def test_what_is_wrong_is_not_timed():
    def nearly(x: jax.Array, rate: jax.Array) -> jax.Array:
        return case.op.exact(x, rate) * (1 + 3e-5)

    def wrong_gradient(x: jax.Array, rate: jax.Array) -> jax.Array:
        return case.op.exact(x, jax.lax.stop_gradient(rate))

    def nan(x: jax.Array, rate: jax.Array) -> jax.Array:
        return case.op.exact(x, rate) * jnp.nan

    wrong = {"nearly": nearly, "wrong gradient": wrong_gradient, "nan": nan}
    case = tiny(baselines=wrong)
    found = by_form(case)
    for name in wrong:
        assert found[name]["status"] == "incorrect"
        assert "ms" not in found[name]["forward"] | found[name]["forward_backward"]
        assert "not timed: error" in found[name]["reason"]
    assert found["xla"]["status"] == "ok"
    assert found["xla"]["forward"]["ms"] > 0
    assert found["wrong gradient"]["errors"]["out"] < 1e-6
    assert found["wrong gradient"]["errors"]["drate"] == 1.0


def test_what_needs_too_much_memory_is_not_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cells._MEMORY, "cpu", 0)
    case = tiny(baselines={})
    found = by_form(case)["reference"]
    assert found["status"] == "skipped"
    assert "of memory" in found["reason"]
    assert "errors" not in found


def test_what_does_not_compile_is_listed(monkeypatch: pytest.MonkeyPatch):
    def greedy(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded")

    monkeypatch.setattr(timing, "compile_program", greedy)
    found = by_form(tiny(baselines={}))["xla"]
    assert found["status"] == "skipped"
    assert found["reason"].startswith("forward does not compile: RESOURCE_EXHAUSTED")


def attention_of(length: int) -> cases.Case:
    shape = {"B": 1, "T": length, "H": 2, "K": 16}
    return cases.Case(cases.find_op("attention"), shape, "float32", small=True)


def test_a_kernel_of_others_is_a_baseline_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    assert attention_of(256).forms()[1]["jax pallas mha"] == "no GPU here"
    with stand_in_gpu():
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert "jax pallas mha" in attention_of(256).forms()[0]
        forms, refused = attention_of(200).forms()
        monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.gpu.attention", None)
        gone = attention_of(384).forms()[1]  # a length that is not traced yet
    assert "jax pallas mha" not in forms
    assert "must be a multiple of" in refused["jax pallas mha"]
    assert "import of jax.experimental.pallas.ops.gpu.attention" in gone["jax pallas mha"]


def test_a_kernel_of_others_computes_the_same():
    operands = tuple(attention_of(16).operands.values())
    kernel = functools.partial(baselines.jax_kernel_attention, interpret=True)
    found = jax.jit(kernel)(*operands)
    expected = jax.jit(cases.find_op("attention").exact)(*operands)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_kernels_are_not_timed_where_they_are_interpreted():
    forms, refused = tiny().forms()
    assert "pallas" not in forms
    assert refused["pallas"] == "no GPU here; interpreted kernels are not timed"


@pytest.mark.parametrize("op", cases.OPS, ids=lambda op: op.label)
def test_baselines_and_exact_forms_agree(op: cases.Op):
    shape = {letter: min(size, 4) for letter, size in op.small[0].items()}
    case = cases.Case(op, shape, "float32", small=True)
    forms = {**op.baselines, "xla": lambda *a: op.call(*a, implementation="xla")}

    @jax.jit
    def compute(*operands: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return op.exact(*operands), {name: form(*operands) for name, form in forms.items()}

    exact, results = compute(*case.operands.values())
    expected = np.float64(exact)
    for name, found in results.items():
        difference = np.linalg.norm(np.float64(found) - expected)
        assert difference <= 1e-6 * np.linalg.norm(expected), name


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("512:2k", [512, 1024, 2048]), ("16:100", [16, 32, 64]), ("1K", [1024])],
)
def test_lengths(text: str, lengths: list[int]):
    assert ops.parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "a", "8:4", "0:4", "1:4m", "1:2000k"])
def test_lengths_that_are_none(text: str):
    with pytest.raises(ConfigError, match="is no range of lengths"):
        ops.parse_lengths(text)


def test_an_op_is_found_by_its_use():
    assert cases.find_op("linear_attention").variant == ""
    assert cases.find_op("linear_attention", "Mamba-2").label == "linear_attention, Mamba-2"
    assert {op.variant for op in cases.variants("attention")} == {"", "2Mamba-E", "gated softmax"}
    assert len({op.label for op in cases.OPS}) == len(cases.OPS)
    names = [op.name for op in cases.main_uses()]
    assert sorted(names) == sorted({op.name for op in cases.OPS})
    with pytest.raises(UnknownName, match="variant of linear_attention"):
        cases.find_op("linear_attention", "Mamba")


def test_gates_stay_float32():
    op = cases.find_op("linear_attention")
    case = cases.Case(op, {"B": 1, "T": 4, "H": 2, "K": 4}, "bfloat16", small=True)
    dtypes = {name: x.dtype.name for name, x in case.operands.items()}
    half = dict.fromkeys(("q", "k", "v"), "bfloat16")
    assert dtypes == half | {"log_decay": "float32"}


def test_every_variant_of_an_op_is_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(timing, "measure_ceilings", lambda _: SLOW)
    monkeypatch.setattr(ops, "measure_case", lambda case, *_, **__: measured.append(case) or [])
    ops.run_op("linear_attention", [32, 64], "float32", budget=0.0, rounds=1)
    found = {(case.op.variant, case.shape["T"]) for case in measured}
    assert found == {
        (variant, length)
        for variant in ("", "no decay", "retention", "Mamba-2")
        for length in (32, 64)
    }


def test_chained_calls_are_not_optimised_away():
    sets = [(np.ones((8, 3), np.float32),), (np.zeros((8, 3), np.float32),)]
    both = lambda x: (jnp.sort(x, axis=0), jnp.sort(x, axis=1))  # noqa: E731
    compiled = jax.jit(timing.chained(both, 5)).lower(sets).compile()
    text = compiled.as_text()
    assert text.count(" sort(") == 4
    # Inside the loop, not before it.
    assert " sort(" not in text[text.index("ENTRY") :]
    assert float(compiled(sets)) == 10.0


def stopped_clock(calls: Any, **_: Any) -> dict[str, timing.Timing]:
    return dict.fromkeys(calls, timing.Timing(3.0, 0.1))


def run_verb(capsys: Any, *args: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.run(benchmark.main, args)
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_the_verb_writes_what_it_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "measure_ceilings", lambda _: SLOW)
    monkeypatch.setattr(timing, "BUDGET", 0.0)
    # `test_what_is_wrong_is_not_timed` times for real.
    monkeypatch.setattr(timing, "time_calls", stopped_clock)
    monkeypatch.setattr(cases, "OPS", (tiny(baselines={}).op,))
    path = tmp_path / "new" / "result.json"
    args = ("--op", "leaky_average", "--lengths", "8", "--rounds", "1", "--peers")
    code, out, err = run_verb(capsys, *args, "--out", str(path))
    assert code == 0
    assert "peers are measured on a GPU only" in err
    found = json.loads(path.read_text())
    assert out.strip() == result.table(found).strip()
    assert found["schema"] == result.SCHEMA
    assert set(found) == {
        *("schema", "date", "command", "device", "versions", "kind", "ceilings", "cells")
    }
    assert found["device"]["platform"] == "cpu"
    assert found["versions"]["jax"] == jax.__version__
    timed = [cell for cell in found["cells"] if cell["status"] == "ok"]
    assert {cell["form"] for cell in timed} == {"xla", "reference"}
    for cell in timed:
        assert set(cell["errors"]) == {"out", "dx", "drate"}
        assert cell["shape"]["T"] == 8
        for field in ("forward", "forward_backward"):
            assert set(cell[field]) == {
                *("compile_s", "temp_bytes", "ms", "call_ms", "spread", "floor_ms", "of_floor")
            }
    skipped = [cell for cell in found["cells"] if cell["status"] == "skipped"]
    assert all(cell["reason"] in out for cell in skipped)
    assert "Small shapes on a CPU" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--suite NAME, --compile-report, --compile-lock WHICH and --tune"),
        (("--op", "attention", "--suite", "kernels"), "one of --op NAME"),
        (("--suite", "kernels", "--lengths", "8"), "--lengths is for --op NAME"),
        (("--op", "atention"), "Did you mean attention"),
        (("--op", "attention", "--lengths", "8:4"), "is no range of lengths"),
        (("--op", "attention", "--rounds", "0"), "--rounds 0 measures nothing"),
        (("--op", "attention", "--peer-checkout", "x"), "--peer-checkout is for --peers"),
        (("--tune",), "--tune measures kernels on a GPU; this is cpu"),
        (("--tune", "--op", "atention"), "Did you mean attention"),
        (("--compile-lock", "changed", "--tune"), "Choose what to measure"),
        (("--compile-lock", "all", "--lengths", "8"), "--lengths is for --op NAME"),
    ],
)
def test_mistakes_of_the_user(capsys, args: tuple[str, ...], message: str):
    code, out, err = run_verb(capsys, *args)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("flags", [("--compile-report",), ("--compile-lock", "changed")])
def test_without_the_compiler_nothing_is_compiled(capsys, monkeypatch, flags: tuple[str, ...]):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(_deviceless, "missing", lambda: "nothing is installed")
    code, _, err = run_verb(capsys, *flags)
    assert code == 2
    assert "by a plugin. nothing is installed." in err


@pytest.fixture
def one_locked_kernel(monkeypatch: pytest.MonkeyPatch):
    """A compiler that is there, one table, and a row that is new in it."""
    use = {"registers": 90, "spill_bytes": 1200, "shared_bytes": 3000, "threads": 256}
    row = _lock.Row("NVIDIA A100", "float32", 64, 2048, 8, "case", "0", "13.0.88", {"forward": use})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(_deviceless, "missing", lambda: None)
    monkeypatch.setattr(_lock, "tables", lambda: [("attention", "default")])
    monkeypatch.setattr(_lock, "read", lambda *_: _lock.Lock({}, {row.key: row}))
    return row


LINE = "| NVIDIA A100 | forward | float32 | 64 | 2048 | 8 | 90 | 1,200 | 3,000 | 256 |"


def test_compile_report_tells_what_the_lock_files_say(
    capsys, monkeypatch: pytest.MonkeyPatch, one_locked_kernel: _lock.Row
):
    monkeypatch.setattr(compiled, "predict", lambda _: ([], ""))
    code, out, _ = run_verb(capsys, "--compile-report")
    assert code == 0
    assert LINE in out.splitlines()


def test_compile_lock_tells_new_rows_and_what_does_not_compile(
    capsys, monkeypatch: pytest.MonkeyPatch, one_locked_kernel: _lock.Row
):
    found: list[Any] = [one_locked_kernel]
    asked = []

    def renew(kernel: str, folder: str, submit: Any, which: str) -> list[Any]:
        asked.append((kernel, folder, which))
        return found

    monkeypatch.setattr(compiled, "renew", renew)
    code, out, _ = run_verb(capsys, "--compile-lock", "all")
    assert (code, asked) == (0, [("attention", "default", "all")])
    assert LINE in out.splitlines()
    run_verb(capsys, "--compile-lock", "changed", "--op", "gated_scan")
    assert len(asked) == 1
    found.append("attention, case: Shared memory size limit exceeded")
    code, out, err = run_verb(capsys, "--compile-lock", "changed", "--op", "attention")
    assert (code, out) == (2, "")
    assert found[1] in err


MODELS = {name: configs.load(name).model for name in mosaics.PRESETS}


def test_full_size_models_have_the_published_parameters():
    """Those of the larger models are compared where their presets are, in `test_configs`."""
    assert mosaics.full_step(mosaics.ROWS[0], MODELS).parameters == 130_666_080


@functools.cache
def parts_of(config: DecoderConfig) -> ModelParts:
    return take_apart(functools.partial(config.build, compute_dtype=jnp.float32))


def test_both_leaky_averages_make_one_training_step_and_one_holds_a_matrix(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(mosaics, "take_apart", lambda make: parts_of(make.__self__.config))
    ends, texts, state = [], [], None
    for row in mosaics.ROWS[:2]:
        full = mosaics.small_step(row._replace(block=148, batch=2), MODELS)
        config = dataclasses.replace(full.config, vocab_size=16, dim=8, depth=1)
        step = mosaics.Step(config, full.batch, full.precision, full.form)
        state = state or jax.jit(step.make_state)()
        lowered = jax.jit(step).lower(state, step.tokens())
        texts.append(lowered.as_text())
        (params, _), loss = lowered.compile()(state, step.tokens())
        ends.append((loss, params))
    assert [row.form for row in mosaics.ROWS[:2]] == ["recurrence", "T x T matrix"]
    chex.assert_trees_all_close(*ends, rtol=0, atol=1e-4)
    assert ["tensor<4x37x37xf32>" in text for text in texts] == [False, True]


def test_memory_counts_donated_arrays_once():
    memory = SimpleNamespace(
        argument_size_in_bytes=10,
        output_size_in_bytes=9,
        alias_size_in_bytes=8,
        temp_size_in_bytes=5,
    )
    assert mosaics.peak_bytes(memory) == 16


def once_for_all_lengths(make: Any) -> ModelParts:
    """Take a small model apart, which has the same parameters whatever the length of its rows."""
    return parts_of(dataclasses.replace(make.__self__.config, context_len=8))


def test_tables_of_training_steps_keep_the_published_numbers(monkeypatch: pytest.MonkeyPatch):
    """Two tables as in the document, on a CPU that cannot compile for a GPU either."""
    monkeypatch.setattr(_deviceless, "missing", lambda: "nothing is installed")

    def measured(row: mosaics.Row, step: mosaics.Step, **options: Any) -> dict[str, Any]:
        cell = mosaics._cell(row, step, 2 * 10**9, small=options["small"])
        return cell | {"ms": 3.0, "spread": 0.1}

    monkeypatch.setattr(mosaics, "_measured", measured)
    monkeypatch.setattr(mosaics, "take_apart", once_for_all_lengths)
    _, first, second = result.table(mosaics.run_mosaics(MODELS, rounds=1)).split(":\n\n")
    shared = "conv | 128 | 8 | recurrence | float32 | 3 ± 10% | 2.00 | 512 | 189 | 7.7 |"
    assert f"| mm_babistories (reduced) | 0.1 M | {shared}" in first
    assert "published at full size: ms" in first
    assert [line.count("mm_babistories (reduced)") for line in first.splitlines()].count(1) == 4
    assert "T x T matrix | float32 | 3 ± 10% | 2.00 | 2048 | 301 | 17.4 |" in first
    assert first.endswith("\n\nLarger models")
    assert second.count("| mix |") == 3
    for published in ("1024 | 254 | 9.1", "1024 | 439 | 16.2", "2048 | 415 | 12.9"):
        assert f"| 1 | recurrence | float32 | 3 ± 10% | 2.00 | {published} |" in second
    assert "not predicted: nothing is installed" in second


def test_a_step_that_is_only_compiled_was_not_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaics, "take_apart", once_for_all_lengths)
    row = mosaics.ROWS[0]
    full = mosaics._cell(row, mosaics.small_step(row, MODELS), 10**9, small=False)
    text = result.table(
        result.environment() | {"kind": "memory_mosaics", "cells": [full], "notes": []}
    )
    assert "| not run | 1.00 | 512 | 189 | 7.7 |" in text


ENTRY = Entry("bfloat16", 64, 2048, 16, {"block": 64, "num_warps": 4, "num_stages": 3})


def test_tuning_walks_to_the_fastest_and_past_what_fails():
    asked = []

    def seconds(entry: Entry, start: Entry) -> float | None:
        assert start == ENTRY
        asked.append(tuple(entry.config.values()))
        if entry.config["num_stages"] == 4:
            return None
        return 1.0 + abs(entry.config["block"] - 256) / 256 + abs(entry.config["num_warps"] - 8) / 8

    cell = tune.tune_entry("attention", ENTRY, seconds)
    assert cell["config"] == {"block": 256, "num_warps": 8, "num_stages": 3}
    assert (cell["before_ms"], cell["after_ms"]) == (2250.0, 1000.0)
    assert len(asked) == len(set(asked)) == cell["tried"]
    with pytest.raises(ConfigError, match="does not run with its default entry"):
        tune.tune_entry("attention", ENTRY, lambda *_: None)


def test_a_gain_within_noise_changes_nothing():
    cell = tune.tune_entry("attention", ENTRY, lambda e, s: 1.0 if e == s else 0.98)
    assert cell["config"] == ENTRY.config


def test_tuned_tables_are_read_back(tmp_path, monkeypatch):
    from pallas_kernels import _launch

    path = tune.write_table("NVIDIA H200", "attention", [ENTRY, ENTRY], root=tmp_path)
    assert path == tmp_path / "nvidia_h200" / "attention.json"
    monkeypatch.setattr(_launch, "TABLES", tmp_path)
    assert entries("attention", "NVIDIA H200") == [ENTRY, ENTRY]


def test_results_that_differ_do_not_agree():
    x = {"a": np.arange(1.0, 5.0), "b": np.ones(2)}
    assert tune.agree(x, jax.tree.map(lambda a: a * 1.01, x))
    assert not tune.agree(x, x | {"b": np.array([1.0, 0.0])})
    assert not tune.agree(x, x | {"b": np.array([1.0, np.nan])})


def test_operands_for_tuning():
    shapes = (
        jax.ShapeDtypeStruct((64,), jnp.float32),
        (jax.ShapeDtypeStruct((4, 8), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.uint32)),
    )
    rate, (x, seed) = tune.draw(shapes)
    gates = np.asarray(tune.draw(jax.ShapeDtypeStruct((2, 512, 4), jnp.float32)))
    decayed = np.exp(np.sum(gates[:, :64], axis=1))
    assert np.max(gates) < 0
    assert np.min(decayed) > 1e-3
    assert np.min(rate) > 0
    assert x.dtype == jnp.bfloat16
    assert np.min(np.float32(x)) < 0
    assert seed.tolist() == [0, 0]
