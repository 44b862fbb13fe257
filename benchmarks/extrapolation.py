"""Train recall presets and compare how far beyond their training length they still answer.

    python -m benchmarks.extrapolation --out docs/figures/mm_v2_extrapolation

Flags after `--` go to every run. Runs that are finished are not repeated.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.compare import deviation, train
from jaxmem.reports.tables import markdown_table

CONFIGS = ("mm_v2_recall", "mm_v2_recall_fixed", "gpt_recall_nope", "gpt_recall")
NOTE = """Right answers in rows of other lengths than the 128 tokens of training. A row has 8 facts
and 8 questions at any length. Guessing one of its own values is right in 12 % of the answers.
Presets differ in how long they are trained: `mm_v2_*` on 3,200 rows, `gpt_*` on 128,000."""
Accuracy = Mapping[str, float | None]
"""By length; None where the model cannot read so many tokens."""


def main() -> None:
    """Run what is missing, then write the table beside the figure and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", default=CONFIGS, help="presets to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, required=True, help="without ending: .md and .png")
    where = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:where]), sys.argv[where + 1 :]
    found = {
        config: [measured(train(config, seed, args.runs, flags)) for seed in args.seeds]
        for config in args.configs
    }
    command = shlex.join(["python", "-m", "benchmarks.extrapolation", *sys.argv[1:]])
    text = f"```\n{command}\n```\n\n{NOTE}\n\n{table(found)}"
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    plot(found, args.out.with_suffix(".png"))


def measured(folder: Path) -> Accuracy:
    """Read what the run measured when it ended."""
    return json.loads((folder / "extrapolation.json").read_text("utf-8"))["accuracy"]


def table(found: Mapping[str, Sequence[Accuracy]]) -> str:
    """Return accuracy in percent by length: mean ± standard deviation over the seeds."""
    rows = []
    for length in next(iter(found.values()))[0]:
        values = [[run[length] for run in runs] for runs in found.values()]
        rows.append([length, *(cell(v) for v in values)])
    return markdown_table(["length", *found], rows)


def cell(values: Sequence[float | None]) -> str:
    """Format the accuracies of all seeds."""
    known = [100 * v for v in values if v is not None]
    return f"{statistics.mean(known):.1f}{deviation(known)} %" if known else "cannot read it"


def plot(found: Mapping[str, Sequence[Accuracy]], path: Path) -> None:
    """Draw the mean accuracy of each preset by length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=130)
    for config, runs in found.items():
        means = {}
        for length in runs[0]:
            known = [100 * v for run in runs if (v := run[length]) is not None]
            if known:
                means[int(length)] = statistics.mean(known)
        axes.plot(list(means), list(means.values()), "o-", markersize=4, label=config)
    axes.set(xlabel="tokens in the row", ylabel="right answers (%)", ylim=(0, 103))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
