"""What a benchmark leaves: one JSON with device, versions, date and command, and its tables."""

import datetime
import json
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

SCHEMA = 1
Result = dict[str, Any]


def environment() -> Result:
    """Describe the machine and the software."""
    devices = jax.devices()
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
        "device": {
            "kind": devices[0].device_kind,
            "platform": jax.default_backend(),
            "count": len(devices),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        },
    }


def write(result: Result, path: Path) -> None:
    """Write a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(result: Result) -> str:
    """Return the Markdown tables of a result, as read from its JSON."""
    makers = {
        "ops": _ops,
        "two_mamba": _two_mamba,
        "memory_mosaics": _mosaics,
        "compile_report": _compiled,
        "tune": _tuned,
    }
    device, versions = result["device"], result["versions"]
    head = f"{device['kind']}, jax {versions['jax']}, {result['date'][:10]}: `{result['command']}`"
    return f"{head}\n\n{makers[result['kind']](result)}"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ops(result: Result) -> str:
    ceilings = result["ceilings"]
    notes = [
        f"Ceilings of this run: copy {ceilings['copy'] / 1e9:.0f} GB/s, "
        f"{ceilings['dtype']} product {ceilings['matmul'] / 1e12:.3g} TFLOP/s. "
        "Floor: the longer of least bytes and least FLOPs at these.",
        "An error is the largest of the result's and the gradients', relative, to float64; "
        "± is the spread of the medians of the rounds.",
    ]
    if any(cell["small"] for cell in result["cells"]):
        notes.insert(0, "Small shapes on a CPU, in processor time of all threads: not for a GPU.")
    columns = ["op", "shape", "dtype", "form", "forward ms", "of floor", "forward+backward ms"]
    columns += ["of floor", "compile s", "temp MB", "error"]
    rows = [_op_row(cell) for cell in result["cells"]]
    return "\n".join([markdown(columns, rows), "", *notes])


def _sizes(shape: Result) -> str:
    return " ".join(f"{letter}{size}" for letter, size in shape.items())


def _op_row(cell: Result) -> list[str]:
    shape = _sizes(cell["shape"])
    op = f"{cell['op']}, {cell['variant']}" if cell.get("variant") else cell["op"]
    row = [op, shape, cell["dtype"], cell["form"]]
    if cell["status"] != "ok":
        return [*row, cell["reason"], *[""] * 6]
    both = cell["forward_backward"]
    for timed in (cell["forward"], both):
        row += [f"{timed['ms']:.3g} ± {timed['spread']:.0%}", f"{timed['of_floor']:.0%}"]
    worst = max(cell["errors"].values())
    return [*row, f"{both['compile_s']:.1f}", f"{both['temp_bytes'] / 2**20:.1f}", f"{worst:.0e}"]


def _two_mamba(result: Result) -> str:
    """Lay out the rows of ops, the two forms of the square, and where they cross."""
    crossover = result["crossover"]
    lengths = sorted({cell["shape"]["T"] for cell in crossover["cells"]})
    columns = ["K", "C", "pass", "predicted T", "measured T", *(f"T{t}" for t in lengths)]
    rows = [
        _crossover_row(row, field, title, lengths)
        for row in crossover["rows"]
        for field, title in (("forward", "forward"), ("forward_backward", "forward+backward"))
    ]
    forms = dict.fromkeys(cell["form"] for cell in crossover["cells"])
    notes = "Chunks of C tokens against all pairs, order 2: time of all pairs / time of chunks."
    times = markdown(
        ["shape", *(f"{form} {unit}" for form in forms for unit in ("ms", "error"))],
        [_form_row(crossover["cells"], shape, list(forms)) for shape in _shapes(crossover)],
    )
    text = markdown(columns, rows)
    return "\n".join([_ops(result), "", notes, "", text, "", "Forward+backward:", "", times])


def _shapes(crossover: Result) -> list[Result]:
    shapes = []
    for cell in crossover["cells"]:
        if cell["shape"] not in shapes:
            shapes.append(cell["shape"])
    return shapes


def _form_row(cells: list[Result], shape: Result, forms: list[str]) -> list[str]:
    row = [_sizes(shape)]
    by_form = {cell["form"]: cell for cell in cells if cell["shape"] == shape}
    for form in forms:
        cell = by_form[form]
        if cell["status"] == "ok":
            both = cell["forward_backward"]
            row += [f"{both['ms']:.3g} ± {both['spread']:.0%}"]
            row += [f"{max(cell['errors'].values()):.0e}"]
        else:
            row += [cell["reason"], ""]
    return row


def _crossover_row(about: Result, field: str, title: str, lengths: list[int]) -> list[str]:
    found = about[field]
    # JSON turns the numbers that are keys into text.
    gains = {int(t): gain for t, gain in found["gains"].items()}
    measured = "none" if found["length"] is None else str(found["length"])
    if found["length"] is not None and found["length"] == min(gains):
        measured = f"below {measured}"
    row = [str(about["width"]), str(about["chunk_size"]), title, str(about["predicted"]), measured]
    return row + [f"{gains[t]:.2f}" if t in gains else "" for t in lengths]


def _mosaics(result: Result) -> str:
    columns = ["model", "parameters", "values", "block", "batch", "leaky average", "precision"]
    columns += ["ms/step", "peak GB"]
    columns += [f"published at full size: {name}" for name in ("block", "ms", "GB")]
    parts = []
    for title in dict.fromkeys(cell["table"] for cell in result["cells"]):
        rows = [_mosaics_row(cell) for cell in result["cells"] if cell["table"] == title]
        parts += [f"{title}:", "", markdown(columns, rows), ""]
    return "\n".join([*parts, *result["notes"]])


def _mosaics_row(cell: Result) -> list[str]:
    ms = "not run" if cell["ms"] is None else f"{cell['ms']:.4g} ± {cell['spread']:.0%}"
    return [
        cell["model"],
        f"{cell['parameters'] / 1e6:.1f} M",
        cell["values"],
        str(cell["block"]),
        str(cell["batch"]),
        cell["form"],
        cell["precision"],
        ms,
        f"{cell['peak_bytes'] / 1e9:.2f}",
        *(f"{cell['published'][key]:g}" for key in ("block", "ms", "gb")),
    ]


def _compiled(result: Result) -> str:
    columns = ["device", "kernel", "dtype", "width", "length", "rows", "registers", "spilled bytes"]
    columns += ["shared memory", "threads"]
    rows = [
        [
            cell["device"],
            name,
            cell["dtype"],
            *(str(cell[key]) for key in ("width", "length", "rows")),
            *(f"{use[key]:,}" for key in ("registers", "spill_bytes", "shared_bytes", "threads")),
        ]
        for cell in result["cells"]
        for name, use in cell["kernels"].items()
    ]
    parts = [markdown(columns, rows)]
    if result["steps"]:
        columns = ["device", "model", "block", "batch", "leaky average", "peak GB"]
        rows = [
            [
                cell["device"],
                cell["model"],
                str(cell["block"]),
                str(cell["batch"]),
                cell["form"],
                f"{cell['peak_bytes'] / 1e9:.2f}",
            ]
            for cell in result["steps"]
        ]
        parts += ["", "Memory of a training step:", "", markdown(columns, rows)]
    return "\n".join(parts)


def _tuned(result: Result) -> str:
    columns = ["kernel", "dtype", "width", "length", "rows", "ms before", "ms after", "config"]
    rows = [
        [
            cell["kernel"],
            cell["dtype"],
            *(str(cell[key]) for key in ("width", "length", "rows")),
            f"{cell['before_ms']:.3g}",
            f"{cell['after_ms']:.3g}",
            " ".join(f"{k}={v}" for k, v in cell["config"].items()),
        ]
        for cell in result["cells"]
    ]
    return markdown(columns, rows)
