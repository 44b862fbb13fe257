"""The stored golden files pass, and the runner fails when it must."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from jaxmem.interop.attention_types import MAMBA
from jaxmem.mixers.mamba2 import Mamba2Config
from jaxmem.mixers.root_orders import RootOrdersConfig
from jaxmem.mixers.softmax_state import SoftmaxStateConfig
from jaxmem.mixers.two_mamba import TwoMambaConfig
from tests.golden import adapters, check
from tests.golden.adapters import memory_mosaics, memory_mosaics_library, two_mamba

DATA = Path(__file__).parent / "data"
FILES = check.find_files([DATA], "")
Edit = Callable[[dict[str, np.ndarray]], None]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_stored_file_passes(path: Path):
    """In float64; `.ci/run` compares the same files in float32."""
    result = check.check_file(path, "float64")
    assert result.verdict == "passed", result.reason


def stored(system: str) -> list[adapters.Golden]:
    return [adapters.load(path) for path in FILES if path.parent.name == system]


def test_every_kind_of_module_is_stored_once():
    modules = [golden.meta["module"] for golden in stored("memory_mosaics")]
    for pattern, _ in (*memory_mosaics.KINDS, *memory_mosaics_library.KINDS):
        assert any(re.search(pattern, module) for module in modules), pattern
    assert sum(path.stat().st_size for path in FILES) < 6_000_000


CHOICES = (
    "feature", "rope", "kernel", "decay", "denominator", "value", "key_gate", "out_gate", "norm",
)  # fmt: skip
"""Fields of the grammar of 2Mamba that choose between formulas."""
KINDS = {
    "attn", "core", "decode", "edge", "ext", "extra", "fixed", "layer", "lm", "mamba", "padmask",
    "poly",
}  # fmt: skip
"""What names of its files begin with."""


def test_every_layer_of_2mamba_and_every_choice_of_its_grammar_is_stored_once():
    files = stored("two_mamba")
    assert {golden.path.stem.partition("_")[0] for golden in files} == KINDS
    layers = [two_mamba.layer(golden)[0] for golden in files if two_mamba.recognises(golden.meta)]
    assert {type(layer) for layer in layers} == {
        TwoMambaConfig,
        Mamba2Config,
        RootOrdersConfig,
        SoftmaxStateConfig,
    }
    rows = [layer for layer in layers if isinstance(layer, TwoMambaConfig)]
    for field in CHOICES:
        choices = {*get_args(get_type_hints(TwoMambaConfig)[field])}
        # No published type gates behind its norm alone.
        assert {getattr(row, field) for row in rows} == choices - {"post"}, field
    heads = {layer.ssm_dim == layer.head_dim for layer in layers if isinstance(layer, Mamba2Config)}
    assert heads == {True, False}
    names = {golden.meta.get("attention_type") for golden in files} & set(MAMBA)
    assert {part for name in names for part in name.split("__")} == {
        part for name in MAMBA for part in name.split("__")
    }


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., check.Result]:
    """Return a function that changes a golden file, by default a small one, and checks it."""

    def run(edit: Edit, stem: str = "nano_val_bias") -> check.Result:
        with np.load(next(path for path in FILES if path.stem == stem)) as data:
            arrays = dict(data)
        edit(arrays)
        np.savez(tmp_path / "changed.npz", **arrays)
        return check.check_file(tmp_path / "changed.npz", "float64")

    return run


@pytest.mark.parametrize(
    ("stem", "meta", "words"),
    [
        ("mamba_linear__output_norm__Z_out_gate", {"use_D_res": True}, "skip=False, not True"),
        (
            "mamba_linear__output_norm__in_conv_k_4",
            {"in_conv_dim": 3, "power": "2"},
            "kernel='pow1', not 'pow2'; conv=4, not 3",
        ),
    ],
)
def test_published_name_with_other_switches_fails(edited, stem: str, meta: dict, words: str):
    def switch(arrays: dict[str, np.ndarray]) -> None:
        found = json.loads(str(arrays["meta"]))
        arrays["meta"] = np.array(json.dumps(found | {"config": found["config"] | meta}))

    result = edited(switch, stem)
    assert result.verdict == "failed"
    assert f"is not what the file's meta says: {words}" in result.reason


def test_mamba_with_another_number_of_heads_fails(edited):
    def switch(arrays: dict[str, np.ndarray]) -> None:
        meta = json.loads(str(arrays["meta"]))
        arrays["meta"] = np.array(json.dumps(meta | {"d_ssm": meta["hidden_size"]}))

    result = edited(switch, "mamba_mamba")
    assert result.verdict == "failed"
    assert "'mamba' is not what the file's meta says: ssm_dim=12, not 24" in result.reason


def test_unchanged_copy_passes_although_its_folder_names_no_system(edited):
    assert edited(lambda arrays: None).verdict == "passed"


@pytest.mark.parametrize("key", ["output/y", "grad/x", "grad/coef"])
def test_perturbed_result_fails(edited, key: str):
    def perturb(arrays: dict[str, np.ndarray]) -> None:
        arrays[key].flat[3 % arrays[key].size] += 3e-6 * np.max(np.abs(arrays[key]))

    result = edited(perturb)
    assert result.verdict == "failed"
    assert result.reason.startswith(f"{key} 3.0e-06 > 1e-06")


def test_parameter_that_is_missing_fails_with_its_name(edited):
    result = edited(lambda arrays: arrays.pop("param/W_v.weight"))
    assert result.verdict == "failed"
    assert "CheckpointMismatch" in result.reason
    assert "missing: W_v.weight" in result.reason
    assert "Traceback" in result.trace


def test_result_that_is_not_computed_fails(edited):
    result = edited(lambda arrays: arrays.update({"output/z": np.ones(3, np.float32)}))
    assert result.verdict == "failed"
    assert "output/z inf > 1e-06 (not computed)" in result.reason


def test_file_without_results_fails(edited):
    def strip(arrays: dict[str, np.ndarray]) -> None:
        for key in [k for k in arrays if k.startswith(("output/", "grad/"))]:
            del arrays[key]

    assert "no output/* or grad/*" in edited(strip).reason


def test_limit_below_the_error_fails(edited, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(check.LIMITS, "float64", check.Limits(1e-12, 1e-12))
    assert edited(lambda arrays: None).verdict == "failed"


def test_worst_implementation_counts():
    want = {"output/y": np.ones(4)}
    runs = [{"output/y": np.ones(4)}, {"output/y": np.full(4, 1.5)}]
    result = check.compare("f", want, runs, {"output/y": check.Criterion(check.largest, 1e-6)})
    assert (result.verdict, result.outputs.error) == ("failed", 0.5)


def test_decay_groups_and_optimiser_are_checked(tmp_path: Path):
    run = next(path for path in FILES if "optimizer" in adapters.load(path).meta)
    with np.load(run) as data:
        arrays = dict(data)
    meta = json.loads(str(arrays["meta"]))
    moved = meta["decayed"].pop()
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez(tmp_path / "moved.npz", **arrays)
    assert moved in check.check_file(tmp_path / "moved.npz", "float64").reason


def test_unknown_module_is_unsupported_and_not_a_success(
    edited, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    unknown = np.array(json.dumps({"module": "somebody's unheard-of memory"}))
    assert edited(lambda arrays: arrays.update(meta=unknown)).verdict == "unsupported"
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):  # main sets them
        monkeypatch.setenv(name, "")
    assert check.main([str(tmp_path), "--jobs", "1"]) == 1
    assert capsys.readouterr().out.endswith("0 passed, 0 failed, 1 unsupported\n")


def test_command_line_runs_files_in_workers(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):  # main sets them, for its workers
        monkeypatch.setenv(name, "")
    paths = sorted(sorted(FILES, key=lambda path: path.stat().st_size)[:2])
    only = f"^({'|'.join(path.stem for path in paths)})$"
    assert check.main([str(DATA), "--only", only]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 passed, 0 failed, 0 unsupported"
    named = [f"{path.parent.name}/{path.stem}" for path in paths]
    assert [line.split()[0] for line in lines[1:-1]] == named


@pytest.mark.parametrize("arguments", [["nowhere"], [str(DATA), "--only", "^nothing$"]])
def test_nothing_to_check_is_a_usage_error(arguments: list[str]):
    with pytest.raises(SystemExit) as stop:
        check.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (check.largest, 0.5 / 4),
        (check.frobenius, 0.5 / 5),
        (check.at_least_one, 0.5 / 4),
        (check.absolute, 0.5),
        (partial(check.per_entry, floor=1.0), 0.5 / 4),
    ],
    ids=["largest", "frobenius", "at_least_one", "absolute", "per_entry"],
)
def test_measures(measure: check.Measure, expected: float):
    want = np.array([3.0, -4.0])
    assert check.error(np.array([3.5, -4.0]), want, measure) == pytest.approx(expected)


def test_error_of_zeros_is_absolute():
    assert check.error(np.full(3, 1e-3), np.full(3, 1e-17), check.largest) == pytest.approx(1e-3)


def test_error_of_small_arrays_is_measured_against_one_where_a_system_says_so():
    assert check.error(np.array([0.3]), np.array([0.1]), check.at_least_one) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (np.array([np.nan]), np.array([1.0])),
        (np.array([np.inf]), np.array([np.inf])),
        (np.ones((1, 3)), np.ones(3)),
        (np.array([1, 3]), np.array([1, 2])),
    ],
    ids=["nan", "inf", "shape", "integers"],
)
def test_error_is_infinite(got: np.ndarray, want: np.ndarray):
    assert check.error(got, want, check.largest) == math.inf


def test_exemptions_need_the_kind_of_file_and_float32():
    key = "grad/leaky_beta"

    def limit(precision: check.Precision, **parts: object) -> float:
        meta = {"module": "leaky average"} | parts
        arrays = {"param/leaky_beta": np.array(meta.pop("beta"))}
        return check.criterion("memory_mosaics", key, precision, meta, arrays).limit

    assert limit("float32", beta=[0.05, 2.0]) == 1e-3
    assert limit("float32", beta=[0.0, -0.5]) == 1e-3
    assert limit("float64", beta=[0.0, 2.0]) == 1e-6
    assert limit("float32", beta=[0.05, 0.5]) == 5e-5
    assert limit("float32", beta=[0.0], module="another") == 5e-5


@pytest.mark.parametrize(("grad", "limit"), [(8e-5, 8e-4), (4e-5, 5e-5), (None, 5e-5)])
def test_files_whose_authors_are_off_are_exempt(grad: float | None, limit: float):
    meta = {"float32_upstream_rel_err": None if grad is None else {"y": 1e-4, "grad": grad}}
    found = check.criterion("two_mamba", "grad/hidden_states", "float32", meta, {})
    assert found.limit == limit
    assert check.criterion("two_mamba", "output/y", "float32", meta, {}).limit == 5e-6


def test_a_clamped_scale_is_exempt_from_the_figures_for_float32():
    def limits(scale: float, precision: check.Precision) -> tuple[float, float]:
        arrays = {"param/blocks.0.attn.kernel_beta": np.array([0.1, scale])}
        keys = ("output/y", "grad/x")
        found = (check.criterion("memory_mosaics", key, precision, {}, arrays) for key in keys)
        first, second = found
        return first.limit, second.limit

    assert limits(0.6, "float32") == (1e-3, 1e-2)
    assert limits(0.6, "float64") == (1e-6, 1e-6)
    assert limits(0.4, "float32") == (5e-6, 5e-5)


def test_a_system_may_have_several_adapters():
    module = {"module": "Library FeatureExtractor"}
    for folder in ("memory_mosaics", "elsewhere"):
        golden = adapters.Golden(Path(folder, "x.npz"), module, {})
        assert adapters.find(golden) == ("memory_mosaics", memory_mosaics_library)
    with pytest.raises(adapters.Unsupported, match="unheard-of"):
        adapters.find(adapters.Golden(Path("x.npz"), {"module": "unheard-of"}, {}))
