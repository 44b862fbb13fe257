"""Numbers that a layer remembers of its context: order 1, order 2 and a key-value cache.

    python -m benchmarks.state_memory --out docs/figures/two_mamba_state_memory

They are counted in the states that the layers themselves would allocate (only shapes are computed),
without the few integers that keep track of documents. Writes a Markdown table and a figure.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.interop.attention_types import from_name
from jaxmem.mixers.two_mamba import TwoMamba, TwoMambaConfig
from jaxmem.nn.init import uniform_init
from jaxmem.reports.tables import markdown_table

CONTEXTS = (1, 256, 512, 1024, 1058, 2048, 4096, 8192)
"""Tokens of the table's rows."""
NOTE = """Numbers (not bytes) that one layer keeps of one sequence: {heads} heads of width {width}.
Order 1 and order 2 have decay, a convolution of 2 tokens and a denominator; the cache is that of
softmax attention. Order 2 is smaller than the cache from {crossover:,.2f} tokens on; the formula
(d+1)^2/4 + 3/2 says {formula:,.2f}."""


class Size(NamedTuple):
    """Floating-point numbers in a layer's state: fixed + per_token N for a context of N tokens."""

    fixed: int
    per_token: int

    def at(self, tokens: int) -> int:
        """Return the numbers at a context."""
        return self.fixed + self.per_token * tokens


def layers(heads: int) -> dict[str, TwoMambaConfig]:
    """Return the layers that are compared, by their names in table and figure."""
    # A denominator needs weights that are not negative, hence the feature map of order 1.
    order_1 = from_name("2mamba", num_heads=heads, kernel="pow1", feature="relu")
    return {
        "order 1": order_1,
        "order 2 (2Mamba)": from_name("2mamba", num_heads=heads),
        "KV cache (softmax)": from_name("softmax", num_heads=heads),
    }


def size(config: TwoMambaConfig, dim: int) -> Size:
    """Count the numbers in a layer's state.

    Args:
      config: of the layer.
      dim: width of the model.
    """
    layer = nnx.eval_shape(lambda: TwoMamba(config, dim, init=uniform_init(), rngs=nnx.Rngs(0)))

    def count(tokens: int) -> int:
        state = jax.eval_shape(lambda: layer.init_state(1, max_len=tokens))
        leaves = jax.tree.leaves(state)
        return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))

    one, two = count(1), count(2)
    return Size(fixed=2 * one - two, per_token=two - one)


def crossover(state: Size, cache: Size) -> float:
    """Return the tokens at which a growing cache is as large as a state of fixed size."""
    return (state.fixed - cache.fixed) / (cache.per_token - state.per_token)


def formula(width: int) -> float:
    """Return (d+1)²/4 + 3/2, at which a cache of 2 N d numbers is as large as order 2's state.

    Reference: arXiv 2602.17363, state size.
    """
    return (width + 1) ** 2 / 4 + 1.5


def main() -> None:
    """Print the table, and write it beside the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--out", type=Path, required=True, help="without ending: .md and .png")
    args = parser.parse_args()
    dim = args.heads * args.width
    sizes = {name: size(config, dim) for name, config in layers(args.heads).items()}
    _, order_2, cache = sizes.values()
    meeting = crossover(order_2, cache)
    note = NOTE.format(
        heads=args.heads, width=args.width, crossover=meeting, formula=formula(args.width)
    )
    command = shlex.join(["python", "-m", "benchmarks.state_memory", *sys.argv[1:]])
    text = f"```\n{command}\n```\n\n{note}\n\n{table(sizes, CONTEXTS)}"
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    plot(sizes, meeting, args.out.with_suffix(".png"))


def table(sizes: Mapping[str, Size], contexts: Sequence[int]) -> str:
    """Return the numbers by context, and in the last row those per head and token."""
    rows = [[f"{n:,}", *(f"{s.at(n):,}" for s in sizes.values())] for n in contexts]
    growth = ["growth per token", *(f"{s.per_token:,}" for s in sizes.values())]
    return markdown_table(["context (tokens)", *sizes], [*rows, growth])


def plot(sizes: Mapping[str, Size], meeting: float, path: Path) -> None:
    """Draw memory in float32 against context, with the crossover marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(CONTEXTS)
    contexts = [2 ** (n / 8) for n in range(round(8 * math.log2(longest)) + 1)]
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for name, found in sizes.items():
        memory = [4e-6 * (found.fixed + found.per_token * n) for n in contexts]
        axes.plot(contexts, memory, label=name)
    cache = list(sizes.values())[-1]
    height = 4e-6 * (cache.fixed + cache.per_token * meeting)
    axes.plot([meeting], [height], "ko", markersize=5)
    axes.axvline(meeting, color="0.4", linestyle=":", linewidth=1)
    axes.annotate(
        f"N = {meeting:,.2f}", (meeting, height), (-8, 10), textcoords="offset points", ha="right"
    )
    axes.set(xlabel="context (tokens)", ylabel="MB per layer and sequence (float32)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
