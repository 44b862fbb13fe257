"""CPU time of a training step of a preset, beside the authors' code where it is at hand."""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
BLOCKS = 5
VOCABULARY = 65
"""Characters of tiny Shakespeare."""


def main() -> int:
    """Check correctness, measure in alternation, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", default=["mm_small", "gpt_small"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", help="a Python that has PyTorch")
    parser.add_argument("--peer-checkout", help="the nanoMosaics folder of the authors' code")
    parser.add_argument("--ours", metavar="CONFIG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(measure(args.ours)))
        return 0
    golden = [sys.executable, "-m", "tests.golden.check", "tests/golden/data"]
    if subprocess.run(golden, stdout=subprocess.DEVNULL, check=False).returncode:
        print("The golden files do not pass: nothing is timed.", file=sys.stderr)
        return 1
    rows = [compare(config, args) for config in args.configs]
    print(table(rows))
    path = save(rows)
    print(f"written to {path}")
    return 0


def measure(name: str) -> dict[str, Any]:
    """Time steps of a preset in this process: the trainer's own jitted update."""
    import time

    import jax
    import numpy as np

    import configs
    from jaxmem.backbones.base import with_vocabulary
    from jaxmem.parallel.mesh import build_mesh
    from jaxmem.tasks.language_modeling import language_model_loss
    from jaxmem.training.model import PRECISIONS, Model
    from jaxmem.training.optim import adamw, decays, learning_rate
    from jaxmem.training.state import StateInit
    from jaxmem.training.step import Steps

    config = configs.load(name)
    complete = with_vocabulary(config.model, VOCABULARY, owner="benchmark")
    model = Model(complete, PRECISIONS[config.run.precision])
    mesh = build_mesh(config.parallel)
    shape = (config.data.batch_size, config.model.context_len + 1)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=shape, dtype=np.int32)
    batch = jax.device_put({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    steps = Steps(model.parts, language_model_loss, mesh)
    schedule = learning_rate(config.optim, config.run.steps)
    optimizer = adamw(config.optim, schedule, model.parts.layout.map_shapes(decays))
    init = StateInit(model.make, model.parts, optimizer, steps.aux_names(batch), mesh)
    update = jax.jit(steps.update(optimizer, config.optim.clip_norm), donate_argnums=0)
    state = init(config.run.seed)

    def block() -> float:
        nonlocal state
        start = time.process_time()
        for _ in range(10):
            state, _ = update(state, batch)
        jax.block_until_ready(state)
        return (time.process_time() - start) / 10

    block()
    return {"seconds": [block() for _ in range(BLOCKS)], "jax": jax.__version__}


def compare(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a preset and, if there is one, its peer, in alternation."""
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours += pinned([sys.executable, "-m", "benchmarks.step_time", "--ours", config])
        if args.peer_python and args.peer_checkout:
            theirs += pinned(peer_command(config, args))
    row = {"config": config, "ours": summary(ours)}
    return row | ({"peer": summary(theirs)} if theirs else {})


def peer_command(config: str, args: argparse.Namespace) -> list[str]:
    """Build the command that times the authors' model of the same sizes."""
    import configs

    loaded = configs.load(config)
    mosaic = hasattr(loaded.model.feed_forward, "memory_size")
    sizes = {
        "vocab_size": VOCABULARY,
        "batch_size": loaded.data.batch_size,
        "context_len": loaded.model.context_len,
        "dim": loaded.model.dim,
        "depth": loaded.model.depth,
        "num_heads": loaded.model.mixer.num_heads,
        "memory_size": getattr(loaded.model.feed_forward, "memory_size", None),
    }
    script = [args.peer_python, str(ROOT / "peers" / "nano_mosaics.py")]
    model = ["--model", "mosaic" if mosaic else "gpt", "--sizes", json.dumps(sizes)]
    return [*script, "--checkout", args.peer_checkout, *model, "--blocks", str(BLOCKS)]


def pinned(command: list[str]) -> list[float]:
    """Run a command on one core and one thread; return its seconds per step."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env = os.environ | {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        command,
        env=env,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def summary(seconds: list[float]) -> dict[str, float]:
    """Return the smallest and the median block, in CPU seconds per step."""
    return {"min_s": round(min(seconds), 4), "median_s": round(statistics.median(seconds), 4)}


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    lines = [
        "| config | ours, min / median CPU s | authors' code | ratio of minima |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, peer = row["ours"], row.get("peer")
        cells = [row["config"], f"{ours['min_s']} / {ours['median_s']}"]
        if peer:
            cells += [f"{peer['min_s']} / {peer['median_s']}"]
            cells += [f"{ours['min_s'] / peer['min_s']:.2f}"]
        else:
            cells += ["not run", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(rows: list[dict[str, Any]]) -> Path:
    """Write the result with versions, date and command."""
    from importlib.metadata import version

    today = datetime.date.today().isoformat()
    path = ROOT / "results" / f"step_time_cpu_{today}_jax{version('jax')}.json"
    record = {
        "date": today,
        "command": shlex.join(["python", "-m", "benchmarks.step_time", *hidden(sys.argv[1:])]),
        "device": f"{platform.machine()} CPU, one core, one thread, shared machine",
        "versions": {name: version(name) for name in ("jax", "flax", "numpy", "optax")}
        | {"python": platform.python_version()},
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def hidden(args: list[str]) -> list[str]:
    """Replace the paths of this machine by what they are."""
    names = {"--peer-python": "PYTHON", "--peer-checkout": "CHECKOUT"}
    return [names.get(before, arg) for before, arg in zip(["", *args], args, strict=False)]


if __name__ == "__main__":
    sys.exit(main())
