"""Multi-query recall: what tells second from first order, over pairs to recall and state size.

Source: the mechanism behind 2Mamba2Furious (arXiv 2602.17363): order 2 and exp recall what order 1
cannot hold. A layer of two heads of 16 has 512 numbers of state (order 1) or 4352 (order 2), one of
four heads of 8 has 256 or 1152.
Time: 13 min on 2 CPU cores with --jobs 2, 48 runs
"""

from jaxmem.reports.sweep_suite import Cell, Suite

MIXERS = ("linear", "mamba2s", "2mamba", "2mamba_e")
PAIRS = (8, 16)
HEAD_WIDTHS = (8, 16)
DIM = 32
SIZES = tuple(f"{pairs}pairs_{width}wide" for pairs in PAIRS for width in HEAD_WIDTHS)


def cell(mixer: str, pairs: int, width: int) -> Cell:
    """Return a mixer's cell: two questions a pair, in rows of six tokens a pair."""
    return Cell(
        label=f"{mixer}_{pairs}pairs_{width}wide",
        preset=f"mqar_{mixer}",
        overrides=(
            f"--task.rows.pairs {pairs} --task.rows.questions {2 * pairs} "
            f"--model.context-len {6 * pairs} --task.lengths {6 * pairs} "
            f"--model.mixer.num-heads {DIM // width} --run.eval-every 300"
        ),
    )


suite = Suite(
    cells=tuple(
        cell(mixer, pairs, width) for pairs in PAIRS for width in HEAD_WIDTHS for mixer in MIXERS
    ),
    seeds=(0, 1, 2),
    claims=tuple(
        (f"{better}_{size}", f"{worse}_{size}")
        for size in SIZES
        for better, worse in (("2mamba", "mamba2s"), ("2mamba_e", "mamba2s"), ("mamba2s", "linear"))
    ),
    metric="val_accuracy",
    direction="higher",
)
