"""Try a sweep: a Memory Mosaic and a GPT so small that nothing can be concluded from them.

Source: mm_tiny and gpt_tiny, smaller still, on stories made up by a program.
Time: under 1 min on 2 CPU cores
"""

from jaxmem.reports.sweep_suite import Cell, Suite

SMALL = (
    "--data.source stories --model.context-len 16 --model.dim 16 --model.depth 1 "
    "--model.mixer.num-heads 2 --optim.warmup-steps 2 --run.steps 40 --run.log-every 5 "
    "--run.eval-every 20 --run.eval-batches 2 --run.samples 0"
)

suite = Suite(
    cells=(
        Cell(
            label="mosaic",
            preset="mm_tiny",
            overrides=f"{SMALL} --model.feed-forward.num-heads 2 "
            "--model.feed-forward.memory-size 8",
        ),
        Cell(label="gpt", preset="gpt_tiny", overrides=SMALL),
    ),
    seeds=(0, 1),
)
