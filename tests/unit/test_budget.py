"""The plugin that counts what folders of tests cost fails a run when it must."""

import types
from pathlib import Path

import jax
import pytest

from tests.helpers import budget
from tests.helpers.budget import Cost, Meter

ALLOWED = {"laws": Cost(100.0, 200), "unit/nn": Cost(10.0, 20)}


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BUDGET", tmp_path / "budget.json")
    budget.write(ALLOWED)


def session(option: str | None, **worker: dict) -> types.SimpleNamespace:
    config = types.SimpleNamespace(getoption=lambda name: option, **worker)
    return types.SimpleNamespace(config=config, exitstatus=pytest.ExitCode.OK)


def meter(**costs: Cost) -> Meter:
    found = Meter()
    found.add(costs)
    return found


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (Cost(150.0, 300), []),
        (Cost(151.0, 20), ["laws: 151 seconds, budget 100"]),
        (Cost(1.0, 301), ["laws: 301 programs, budget 200"]),
        (Cost(151.0, 301), ["seconds", "programs"]),
    ],
)
def test_half_more_than_the_budget_is_allowed(cost: Cost, words: list[str]):
    lines = budget.excesses({"laws": cost}, ALLOWED)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_a_slow_machine_is_no_excess_and_hides_none():
    allowed = {f"folder {n}": Cost(10.0, 5) for n in range(budget.SEVERAL)}
    slow = {folder: Cost(30.0, 5) for folder in allowed}
    assert budget.excesses(slow, allowed) == []
    [line] = budget.excesses(slow | {"folder 1": Cost(46.0, 5)}, allowed)
    assert line.startswith("folder 1: 15 seconds, budget 10")
    few = dict(list(slow.items())[1:])
    assert len(budget.excesses(few, allowed)) == len(few)  # too few to tell


def test_a_folder_without_a_budget_exceeds_it():
    assert budget.excesses({"new": Cost()}, ALLOWED) == ["new has no budget."]


@pytest.mark.parametrize(
    ("option", "programs", "status"), [("check", 301, 1), ("check", 300, 0), (None, 301, 0)]
)
def test_only_a_run_that_checks_fails(option: str | None, programs: int, status: int):
    run = session(option)
    meter(laws=Cost(1.0, programs)).pytest_sessionfinish(run)
    assert run.exitstatus == status


def test_costs_of_workers_add_up():
    whole = Meter()
    for seconds, programs in ((1.0, 2), (3.0, 4)):
        worker = session(None, workeroutput={})
        meter(laws=Cost(seconds, programs)).pytest_sessionfinish(worker)
        whole.pytest_testnodedown(types.SimpleNamespace(workeroutput=worker.config.workeroutput))
    whole.pytest_testnodedown(types.SimpleNamespace())  # crashed
    assert whole.costs == {"laws": Cost(4.0, 6)}


def test_write_keeps_what_did_not_run_and_no_budget_is_next_to_nothing():
    meter(laws=Cost(50.2, 7)).pytest_sessionfinish(session("write"))
    assert budget.read() == {"laws": Cost(51, 7), "unit/nn": Cost(10.0, 20)}
    budget.write({"unit/nn": Cost(0.1, 0)})
    assert budget.read()["unit/nn"] == Cost(budget.LEAST_SECONDS, 0)


def test_a_test_is_measured_with_its_programs(tmp_path: Path):
    found = Meter()
    found.listen()
    item = types.SimpleNamespace(path=tmp_path / "laws" / "test_x.py")
    measuring = found.pytest_runtest_protocol(item)
    next(measuring)
    jax.jit(lambda x: x * 3.0 + 1.0)(2.0)
    with pytest.raises(StopIteration):
        next(measuring)
    assert found.costs["laws"].programs >= 1
    assert found.costs["laws"].seconds > 0


def test_the_dearest_folders_come_first(tmp_path: Path):
    items = [
        types.SimpleNamespace(path=tmp_path / folder / "test_x.py")
        for folder in ("new", "unit/nn", "laws", "unit/nn")
    ]
    budget.pytest_collection_modifyitems(items)
    assert [budget.folder_of(item) for item in items] == ["laws", "unit/nn", "unit/nn", "new"]


def test_the_table_ends_with_the_sum():
    lines = budget.table({"unit/nn": Cost(1.0, 2), "laws": Cost(3.0, 4)}, ALLOWED)
    assert [line.split()[0] for line in lines] == ["folder", "laws", "unit/nn", "all"]
    assert lines[1].split() == ["laws", "3.0", "100.0", "4", "200"]
    assert lines[-1].split() == ["all", "4.0", "6"]
