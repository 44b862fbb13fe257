"""Launch tables, the lookup, preflight, and kernels traced without a GPU."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    _compat,
    _launch,
    attention,
    gated_scan,
    leaky_average,
    persistent_read,
)
from pallas_kernels._compat import (
    Precision,
    Target,
    default_platform,
    launch,
    load,
    lower_for_cuda,
    mm,
    only_cpu,
    pl,
    stand_in_gpu,
    store,
    target,
)
from pallas_kernels._interpret import interpreted, on_cpu
from pallas_kernels._launch import entries, lookup, power_of_two, too_much_shared, unmet
from tests.helpers.lowering import kernel_names


@dataclasses.dataclass(frozen=True)
class Config:
    chunk: int
    num_warps: int = 4


def gram_rows(x_ref, o_ref, *, chunk: int, length: int, precision: Precision, interpret: bool):
    """Write (x xᵀ) x for every chunk of rows; the last chunk overhangs the array."""

    def body(n: jax.Array, _: None) -> None:
        mask = (n * chunk + jnp.arange(chunk) < length)[:, None]
        rows = pl.ds(n * chunk, chunk)
        x = load(x_ref.at[rows, :], mask)
        y = mm(x, x, tb=True, precision=precision, interpret=interpret).astype(x.dtype)
        store(o_ref.at[rows, :], mm(y, x, precision=precision, interpret=interpret), mask)

    jax.lax.fori_loop(0, -(-length // chunk), body, None)


def gram(x: jax.Array, precision: Precision = "highest") -> jax.Array:
    batch, length, heads, width = x.shape
    interpret = interpreted()
    kernel = functools.partial(
        gram_rows, chunk=16, length=length, precision=precision, interpret=interpret
    )
    spec = pl.BlockSpec((None, length, None, width), lambda b, h: (b, 0, h, 0))
    return launch(
        kernel,
        name="gram",
        grid=(batch, heads),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
    )(x)


def test_a_ragged_kernel_is_interpreted_on_a_cpu():
    x = jax.random.normal(jax.random.key(0), (2, 37, 2, 16))
    parts = [np.asarray(x, np.float64)[:, start : start + 16] for start in (0, 16, 32)]
    want = np.concatenate([np.einsum("bthk,bshk,bshj->bthj", p, p, p) for p in parts], axis=1)
    np.testing.assert_allclose(jax.jit(gram)(x), want, rtol=0, atol=1e-5 * np.max(np.abs(want)))


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
@pytest.mark.parametrize("kind", ["NVIDIA A100", "NVIDIA H200"])
def test_the_same_kernel_is_lowered_for_a_gpu_that_is_not_there(kind: str, precision: Precision):
    shape = jax.ShapeDtypeStruct((2, 37, 2, 16), jnp.float32)
    lowered = lower_for_cuda(functools.partial(gram, precision=precision), shape, kind=kind)
    assert kernel_names(lowered) == ["gram"]
    assert target() is None
    assert interpreted()


def test_the_stand_in_is_the_target_only_inside():
    with stand_in_gpu("NVIDIA A100"):
        assert target() == ("NVIDIA A100", (8, 0))
        assert not interpreted()
        assert interpreted(interpret=True)
    with pytest.raises(KeyError, match="NVIDIA Nothing"), stand_in_gpu("NVIDIA Nothing"):
        pass


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_launch, "TABLES", tmp_path)
    _launch._lookup.cache_clear()
    yield tmp_path
    _launch._lookup.cache_clear()


def entry(chunk: int, dtype: str = "float32", width: int = 64, length: int = 2048, rows: int = 64):
    config = {"chunk": chunk}
    return {"dtype": dtype, "width": width, "length": length, "rows": rows, "config": config}


def write(folder: Path, device: str, *rows: dict) -> None:
    (folder / device).mkdir()
    (folder / device / "toy.json").write_text(json.dumps(rows))


def test_lookup_takes_the_nearest_entry_of_the_device_and_else_the_default(tables: Path):
    write(
        tables,
        "default",
        entry(1),
        entry(2, width=128),
        entry(3, length=32768),
        entry(4, "bfloat16"),
    )
    write(tables, "nvidia_h200", entry(5), entry(6, rows=4096))
    find = functools.partial(lookup, "toy", Config, "float32")
    assert find(64, 2048, 64) == Config(1)
    assert find(40, 1000, 1) == Config(1)  # a narrower head takes the next width
    assert find(65, 2048, 64) == Config(2)
    assert find(64, 20000, 64) == Config(3)
    with stand_in_gpu("NVIDIA H200"):
        assert find(64, 2048, 64) == Config(5)
        assert find(64, 2048, 3000) == Config(6)
        assert find(128, 2048, 64) == Config(2)  # not in the table of the device
    with stand_in_gpu("NVIDIA A100"):
        assert find(64, 2048, 64) == Config(1)
    with pytest.raises(
        LookupError, match=r"toy has no launch configuration for float32 of width 256"
    ):
        find(256, 2048, 64)


def test_a_damaged_table_is_named(tables: Path):
    (tables / "default").mkdir()
    (tables / "default" / "toy.json").write_text('[{"dtype": "float32"}]')
    with pytest.raises(ValueError, match=r"toy\.json of default is damaged"):
        entries("toy")


def test_preflight_says_what_is_not_met():
    assert unmet(jnp.bfloat16, 64, 256) is None
    assert unmet(jnp.float64, 64) == "kernels take bfloat16, float16, float32, not float64"
    assert unmet(jnp.float32, 64, 320) == "kernels take head widths to 256, not 320"
    assert too_much_shared("toy", 232448) is None
    with stand_in_gpu("NVIDIA A100"):
        assert too_much_shared("toy", 200000) == (
            "toy would use 200000 bytes of shared memory of the 166912 there are"
        )


def test_preflight_looks_at_the_dtype_of_every_operand():
    said = "kernels take bfloat16, float16, float32, not float64"
    for dtypes in ((jnp.float32, jnp.float64), (jnp.float64, jnp.float32)):
        assert attention.unmet(*dtypes, 64, 64, length=128, rows=4) == said
        assert persistent_read.unmet(*dtypes, 64, 64, rows=128, tables=4) == said
        operands = [jax.ShapeDtypeStruct((2, 128, 64), dtype) for dtype in dtypes]
        assert gated_scan.unmet(*operands) == said


def of_attention(**sizes: int) -> str | None:
    call = {"length": 128, "rows": 4}
    config = attention.find_config(jnp.float32, 64, 64, **call)
    config = dataclasses.replace(config, **sizes)
    return attention.unmet(jnp.float32, jnp.float32, 64, 64, **call, config=config)


def of_persistent_read(**sizes: int) -> str | None:
    call = {"rows": 128, "tables": 4}
    config = persistent_read.find_config(jnp.float32, 64, 64, **call)
    config = dataclasses.replace(config, **sizes)
    return persistent_read.unmet(jnp.float32, jnp.float32, 64, 64, **call, config=config)


def of_leaky_average(**sizes: int) -> str | None:
    x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.float32)
    return leaky_average.unmet(x, None, config=leaky_average.LeakyAverageConfig(**sizes))


def of_gated_scan(**sizes: int) -> str | None:
    x = jax.ShapeDtypeStruct((2, 128, 64), jnp.float32)
    return gated_scan.unmet(x, x, config=gated_scan.GatedScanConfig(**sizes))


@pytest.mark.parametrize(
    ("unmet_with", "field"),
    [
        *((of_attention, f) for f in ("block_q", "block_k", "backward_q", "backward_k")),
        *((of_persistent_read, f) for f in ("block_rows", "block_pairs")),
        *((of_persistent_read, f) for f in ("backward_rows", "backward_pairs")),
        *((of_leaky_average, f) for f in ("chunk", "block")),
        (of_gated_scan, "block"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("size", [8, 48])
def test_preflight_refuses_tiles_that_are_no_power_of_two(
    unmet_with: Callable[..., str | None], field: str, size: int
):
    said = f"its configuration has {field}={size}, which is no power of two from 16"
    assert unmet_with(**{field: size}) == said
    assert unmet_with(**{field: 32}) is None


@pytest.mark.parametrize(
    ("unmet_with", "field"),
    [
        *((of_attention, f) for f in ("num_warps", "backward_warps")),
        *((of_persistent_read, f) for f in ("num_warps", "backward_warps")),
        (of_leaky_average, "num_warps"),
        (of_gated_scan, "num_warps"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_preflight_refuses_warps_that_are_no_power_of_two(
    unmet_with: Callable[..., str | None], field: str
):
    said = f"its configuration has {field}=3, which is no power of two from 1"
    assert unmet_with(**{field: 3}) == said
    assert unmet_with(**{field: 2}) is None


def test_rows_of_the_gated_scan_are_an_unrolled_loop_and_no_tile():
    assert of_gated_scan(rows=3) is None
    assert of_gated_scan(rows=0) == "its configuration has rows=0 and programs=1056, below 1"


def test_an_old_gpu_and_a_missing_backend_are_told(monkeypatch: pytest.MonkeyPatch):
    old = Target("NVIDIA V100", (7, 0))
    monkeypatch.setattr(_launch, "target", lambda: old)
    assert "8.0 or more; NVIDIA V100 has 7.0" in (unmet(jnp.float32, 64) or "")
    monkeypatch.setattr(_launch, "backend_missing", lambda: "gone")
    assert unmet(jnp.float32, 64) == "gone"


class Device(NamedTuple):
    """A device that is not here."""

    device_kind: str
    compute_capability: str | None


@pytest.fixture
def process_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let the process take itself for one with this platform and device."""

    def set_up(platform: str, device: Device | None = None) -> None:
        def devices(backend: str) -> list[Device]:
            if device is None or backend != "gpu":
                raise RuntimeError(f"Unknown backend {backend}")
            return [device]

        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "local_devices", devices)
        _compat._local_gpu.cache_clear()

    yield set_up
    _compat._local_gpu.cache_clear()


@pytest.mark.parametrize("capability", ["gfx942", "", None, "9"])
def test_a_gpu_without_a_cuda_capability_is_told(
    capability: str | None, process_with: Callable[..., None]
):
    process_with("gpu", Device("AMD Instinct MI300X", capability))
    assert target() == Target("AMD Instinct MI300X", None)
    said = "kernels run on CUDA GPUs; AMD Instinct MI300X reports no CUDA compute capability"
    assert unmet(jnp.float32, 64) == said
    assert not on_cpu()


@pytest.mark.parametrize("platform", ["tpu", "METAL"])
def test_another_platform_is_told(platform: str, process_with: Callable[..., None]):
    process_with(platform)
    assert unmet(jnp.float32, 64) == (
        f"kernels run on CUDA GPUs and, interpreted, on CPU; this is {platform}"
    )


def test_a_default_device_replaces_the_platform_of_the_process(
    process_with: Callable[..., None],
):
    process_with("gpu", Device("NVIDIA H200", "9.0"))
    assert target() == Target("NVIDIA H200", (9, 0))
    assert (default_platform(), only_cpu(), interpreted()) == ("gpu", False, False)
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert (default_platform(), only_cpu(), interpreted()) == ("cpu", False, True)
            assert unmet(jnp.float32, 64) is None


@pytest.mark.parametrize(
    ("capability", "limit"),
    [
        ((8, 0), 166912),
        ((8, 6), 101376),
        ((8, 9), 101376),
        ((9, 0), 232448),
        ((10, 0), 232448),
        ((12, 0), 101376),  # a consumer's Blackwell
        ((13, 7), 101376),  # not known: the smallest
        (None, 101376),
    ],
)
def test_shared_memory_is_that_of_the_capability(capability: tuple[int, int] | None, limit: int):
    assert _launch.shared_limit(Target("some GPU", capability)) == limit


@pytest.mark.parametrize(("size", "padded"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128)])
def test_tiles_are_powers_of_two(size: int, padded: int):
    assert power_of_two(size) == padded
