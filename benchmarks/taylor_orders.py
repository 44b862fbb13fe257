"""How softmax attention is approached order by order: Taylor sums of exp with 1 to 12 terms.

    python -m benchmarks.taylor_orders --train --out docs/figures/taylor_orders

Attention with the weights κ_N(s) / Σ κ_N(s), κ_N(s) = Σ_{n<N} s^n / n!, is compared with softmax
on random operands: products of queries and keys of unit variance, and sharper ones as in trained
layers. With --train a small decoder is trained on characters with each number of terms. Writes a
Markdown table and a figure.

Reference: "On the Expressiveness of Softmax Attention" (arXiv 2507.23632), sec. 3.
"""

import argparse
import dataclasses
import math
import shlex
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

import configs
from benchmarks.compare import curve
from jaxmem.data.config import DataConfig
from jaxmem.interop.attention_types import from_name
from jaxmem.mixers.two_mamba import TwoMambaConfig
from jaxmem.ops.attention import attention
from jaxmem.ops.polynomial_attention import polynomial_attention
from jaxmem.reports.tables import markdown_table
from jaxmem.training.config import RunConfig
from jaxmem.training.run import train

TERMS = tuple(range(1, 13))
TRAINED_TERMS = (1, 2, 3, 5, 7)
SPREADS = {"random products (σ = 1)": 1.0, "trained-like products (σ = 3)": 3.0}
"""Standard deviations of the scaled products."""
SHAPE = (1, 256, 4, 64)
SEEDS = (0, 1, 2)
STEPS = 200
NOTE = """Relative error |y - softmax| / |softmax|, root mean square over all outputs and the median
of three draws, of attention whose weights are Taylor's sum of N terms over their total, in float32:
{tokens} tokens, heads of width {width}. With an even N the highest power is odd, and far below 0
the sum is negative: totals may then vanish, and the error be larger than that of fewer terms."""
TRAINING_NOTE = """Validation loss (nats per character) of `gpt_tiny` without learned positions, on
made-up stories, its attention replaced by Taylor's sum of N terms (rotary positions, one seed,
{steps} updates)."""
Curve = dict[int, float]
"""A number by terms."""


@jax.jit
def error(coefficients: jax.Array, spread: float, seed: int) -> jax.Array:
    """Return |y - softmax| / |softmax| of attention with normalised weights Σ_n c_n s^n.

    Args:
      coefficients: c.
      spread: standard deviation of the scaled products s.
      seed: of queries, keys and values, which are normal.
    """
    q, k, v = (jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(seed), 3))
    q, scale = spread * q, 1.0 / math.sqrt(SHAPE[-1])
    exact = attention(q, k, v, scale=scale)
    read = polynomial_attention(q, k, v, coefficients=coefficients, scale=scale)
    y = read.y / read.total[..., None]
    return jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)


def taylor(terms: int) -> jax.Array:
    """Return the coefficients of κ_N, with zeros behind them so that all are compiled once."""
    found = [1.0 / math.factorial(n) if n < terms else 0.0 for n in range(max(TERMS))]
    return jnp.asarray(found)


def errors(spread: float) -> Curve:
    """Return the median error over the seeds."""
    return {
        n: statistics.median(float(error(taylor(n), spread, seed)) for seed in SEEDS) for n in TERMS
    }


def run_of(mixer: TwoMambaConfig, folder: Path) -> RunConfig:
    """Return the run that trains a small decoder with a mixer."""
    preset = configs.load("gpt_tiny")
    model = dataclasses.replace(preset.model, mixer=mixer, positions="none")
    options = {"dir": str(folder), "steps": STEPS, "samples": 0, "eval_every": STEPS}
    return dataclasses.replace(
        preset,
        model=model,
        data=DataConfig(source="stories", batch_size=preset.data.batch_size),
        run=dataclasses.replace(preset.run, **options),
    )


def trained(mixer: TwoMambaConfig, folder: Path) -> float:
    """Train, unless that is done; return the last validation loss."""
    train(run_of(mixer, folder))
    losses = curve(folder, "val_loss")
    return losses[max(losses)]


def losses(runs: Path) -> tuple[Curve, float]:
    """Return the losses by terms, and that of softmax."""
    exact = from_name("softmax", "attention", num_heads=4)
    taylor = from_name("softmax_taylor_80terms", "attention", fixed=True, num_heads=4)
    found = {
        n: trained(dataclasses.replace(taylor, terms=n), runs / f"taylor_{n}")
        for n in TRAINED_TERMS
    }
    return found, trained(exact, runs / "softmax")


def main() -> None:
    """Print the tables, and write them beside the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="train decoders, too")
    parser.add_argument("--runs", type=Path, default=Path("runs/taylor_orders"))
    parser.add_argument("--out", type=Path, required=True, help="without ending: .md and .png")
    args = parser.parse_args()
    found = {name: errors(spread) for name, spread in SPREADS.items()}
    command = shlex.join(["python", "-m", "benchmarks.taylor_orders", *sys.argv[1:]])
    note = NOTE.format(tokens=SHAPE[1], width=SHAPE[-1])
    parts = [f"```\n{command}\n```", note, error_table(found)]
    learnt = losses(args.runs) if args.train else None
    if learnt is not None:
        parts += [TRAINING_NOTE.format(steps=STEPS), loss_table(*learnt)]
    text = "\n\n".join(parts)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    plot(found, learnt, args.out.with_suffix(".png"))


def error_table(found: Mapping[str, Curve]) -> str:
    """Return the errors by terms."""
    rows = [[n, *(f"{c[n]:.2e}" for c in found.values())] for n in TERMS]
    return markdown_table(["terms", *found], rows)


def loss_table(found: Curve, softmax: float) -> str:
    """Return the losses by terms."""
    rows = [[str(n), f"{loss:.3f}"] for n, loss in found.items()]
    return markdown_table(["terms", "validation loss"], [*rows, ["softmax", f"{softmax:.3f}"]])


def plot(found: Mapping[str, Curve], learnt: tuple[Curve, float] | None, path: Path) -> None:
    """Draw the errors, and beside them the losses if there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 if learnt is None else 2
    figure = Figure(figsize=(1 + 5 * columns, 4.0), dpi=130, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for number, (name, values) in enumerate(found.items()):
        for odd, style in ((1, "o-"), (0, "o:")):
            terms = [n for n in values if n % 2 == odd]
            panels[0].plot(
                terms,
                [values[n] for n in terms],
                style,
                markersize=4,
                color=f"C{number}",
                markerfacecolor=f"C{number}" if odd else "none",
                label=f"{name}, {'odd' if odd else 'even'} N",
            )
    panels[0].set(xlabel="terms N", ylabel="relative error against softmax", yscale="log")
    if learnt is not None:
        values, softmax = learnt
        panels[1].plot(list(values), list(values.values()), "o-", markersize=4, label="Taylor")
        panels[1].axhline(softmax, color="0.3", linestyle="--", linewidth=1, label="softmax")
        panels[1].set(xlabel="terms N", ylabel="validation loss (nats per character)")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend()
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
