"""A pytest plugin that counts what each folder of tests costs, and holds it to a budget.

The cost of a test is the processor time of its process and of the children that it waited for,
and the number of programs that XLA compiled in its process. `tests/budget.json` holds both for
each folder. A table of them ends every run; `--budget check` fails where a folder exceeds its
budget by half, and `--budget write` makes the run that ends the new budget.
"""

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BUDGET = Path(__file__).parents[1] / "budget.json"
MARGIN = 1.5
"""How often a folder may cost its budget. Programs that two files share are compiled once or twice,
as their workers have it; processors differ more."""
LEAST_SECONDS = 4
"""What any folder may cost: the first one to need a package pays for its import."""
SEVERAL = 5
"""Of how many folders at least a run says how fast its machine is."""
COMPILATION = "/jax/core/compile/backend_compile_duration"


class Cost(NamedTuple):
    """What a folder of tests costs."""

    seconds: float = 0.0
    """Processor time, of children too."""
    programs: int = 0
    """Compiled by XLA in the process of the tests."""

    def plus(self, other: "Cost") -> "Cost":
        """Return the sum of two costs."""
        return Cost(self.seconds + other.seconds, self.programs + other.programs)


Costs = dict[str, Cost]
"""By folder, as in `unit/data`."""


def folder_of(item: pytest.Item) -> str:
    """Return the folder of a test below `tests`."""
    return item.path.parent.relative_to(BUDGET.parent).as_posix()


def slowness(costs: Mapping[str, Cost], budget: Mapping[str, Cost]) -> float:
    """Return how many times as long half of the folders take as in their budget; at least 1.

    A machine that is slower, or busy, is so for all folders.
    """
    ratios = [
        costs[folder].seconds / budget[folder].seconds for folder in costs if folder in budget
    ]
    return max(1.0, statistics.median(ratios)) if len(ratios) >= SEVERAL else 1.0


def excesses(costs: Mapping[str, Cost], budget: Mapping[str, Cost]) -> list[str]:
    """Return a line for each folder that exceeds its budget by half or has none.

    Seconds are those of the machine of the budget.
    """
    lines, slower = [], slowness(costs, budget)
    costs = {folder: cost._replace(seconds=cost.seconds / slower) for folder, cost in costs.items()}
    for folder, cost in sorted(costs.items()):
        if folder not in budget:
            lines.append(f"{folder} has no budget.")
            continue
        for name, found, allowed in zip(Cost._fields, cost, budget[folder], strict=True):
            if found > MARGIN * allowed:
                lines.append(
                    f"{folder}: {found:.0f} {name}, budget {allowed:.0f}, half more is allowed."
                )
    return lines


def table(costs: Mapping[str, Cost], budget: Mapping[str, Cost]) -> list[str]:
    """Return the lines of a table of costs beside budgets, the dearest folder first."""
    total = Cost()
    for cost in costs.values():
        total = total.plus(cost)
    lines = [f"{'folder':24} {'seconds':>8} {'budget':>7} {'programs':>9} {'budget':>7}"]
    for folder, cost in [*sorted(costs.items(), key=lambda item: -item[1].seconds), ("all", total)]:
        allowed = [f"{part}" for part in budget[folder]] if folder in budget else ["", ""]
        lines.append(
            f"{folder:24} {cost.seconds:8.1f} {allowed[0]:>7} {cost.programs:9d} {allowed[1]:>7}"
        )
    return lines


def read() -> Costs:
    """Return the budget of every folder; none if there is no file yet."""
    if not BUDGET.exists():
        return {}
    return {folder: Cost(**cost) for folder, cost in json.loads(BUDGET.read_text()).items()}


def write(costs: Mapping[str, Cost]) -> None:
    """Make these costs the budget; folders that did not run keep theirs."""
    measured = {
        folder: Cost(max(LEAST_SECONDS, math.ceil(cost.seconds)), cost.programs)
        for folder, cost in costs.items()
    }
    whole = {folder: cost._asdict() for folder, cost in sorted((read() | measured).items())}
    rows = [f"  {json.dumps(folder)}: {json.dumps(cost)}" for folder, cost in whole.items()]
    BUDGET.write_text("{\n" + ",\n".join(rows) + "\n}\n")


class Meter:
    """Adds up what the tests of one process cost, or of all workers in the process above them."""

    def __init__(self) -> None:
        self.costs: Costs = defaultdict(Cost)
        self.programs = 0

    def listen(self) -> None:
        """Count the programs that this process compiles from now on."""
        import jax

        def count(event: str, duration: float, **_: Any) -> None:
            self.programs += event == COMPILATION

        jax.monitoring.register_event_duration_secs_listener(count)

    def add(self, costs: Mapping[str, Cost | tuple[float, int]]) -> None:
        """Add costs that were measured here or in a worker."""
        for folder, cost in costs.items():
            self.costs[folder] = self.costs[folder].plus(Cost(*cost))

    def now(self) -> Cost:
        """Return what the process has cost so far."""
        times = os.times()
        own, children = times.user + times.system, times.children_user + times.children_system
        return Cost(own + children, self.programs)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure a test with its fixtures."""
        start = self.now()
        result = yield
        end = self.now()
        cost = Cost(end.seconds - start.seconds, end.programs - start.programs)
        self.add({folder_of(item): cost})
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker has measured; one that crashed has nothing to say."""
        self.add(getattr(node, "workeroutput", {}).get("costs", {}))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand the costs to the process above, or judge them."""
        if hasattr(session.config, "workeroutput"):
            plain = {folder: tuple(cost) for folder, cost in self.costs.items()}
            session.config.workeroutput["costs"] = plain
        elif session.config.getoption("--budget") == "write":
            write(self.costs)
        elif session.config.getoption("--budget") == "check" and excesses(self.costs, read()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        """Print the table, and what exceeds its budget."""
        budget = read()
        terminalreporter.section("processor time and compiled programs")
        for line in table(self.costs, budget):
            terminalreporter.line(line)
        if config.getoption("--budget") == "check":
            for line in excesses(self.costs, budget):
                terminalreporter.line(line, red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--budget`."""
    parser.addoption(
        "--budget",
        choices=["check", "write"],
        help="fail where a folder of tests exceeds tests/budget.json by half, or renew that file",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the dearest folders first, so that all workers end at about the same time."""
    budget = read()
    items.sort(key=lambda item: -budget.get(folder_of(item), Cost()).seconds)


def pytest_configure(config: pytest.Config) -> None:
    """Begin to measure, in every process that runs tests."""
    meter = Meter()
    config.pluginmanager.register(meter, "meter")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        meter.listen()
