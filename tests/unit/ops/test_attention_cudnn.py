"""When attention takes cuDNN: never on trust."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.errors import KernelUnsupported
from jaxmem.ops import attention_cudnn
from jaxmem.ops.attention import Dropout, Places, attention, attention_with_lse
from jaxmem.ops.dispatch import explain
from pallas_kernels._compat import stand_in_gpu
from tests.helpers.compare import BFLOAT16, assert_close

PLAIN = tuple(jax.ShapeDtypeStruct((2, 32, 4, 64), jnp.bfloat16) for _ in range(3))
IDS = jnp.asarray(np.ones((2, 32), np.int32))
KEY = jax.random.key(0)


def honest(q: Any, k: Any, v: Any, *, scale: float, window: int | None, causal: bool) -> jax.Array:
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=local, implementation="xla"
    )


def without_window(*arrays: Any, window: int | None, **options: Any) -> jax.Array:
    return honest(*arrays, window=None, **options)


def always_causal(*arrays: Any, causal: bool, **options: Any) -> jax.Array:
    return honest(*arrays, causal=True, **options)


def broken(*_: Any, **__: Any) -> jax.Array:
    raise RuntimeError("no plan found\nand much more")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(jnp.bfloat16)


@pytest.fixture(autouse=True)
def fresh():
    """A process that has not probed yet."""
    attention_cudnn.probe.cache_clear()
    yield
    attention_cudnn.probe.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A process that takes itself for one with a GPU, and runs XLA instead of cuDNN."""
    monkeypatch.setattr(attention_cudnn, "run", honest)
    with stand_in_gpu():
        yield


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch):
    """A process whose probe, which other tests try, has found nothing."""
    monkeypatch.setattr(attention_cudnn, "_verdict", lambda *_: None)


pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize(("windowed", "causal"), [(False, True), (True, True), (False, False)])
def test_the_probe_accepts_what_agrees(windowed: bool, causal: bool):
    assert attention_cudnn.probe(windowed, causal) is None


def test_the_probe_sees_a_mask_that_should_not_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_cudnn, "run", always_causal)
    assert "its probe is off by" in str(attention_cudnn.probe(False, causal=False))


@pytest.mark.parametrize("verdict", [None, "its probe failed: " + 300 * "x"], ids=["good", "bad"])
def test_the_first_process_decides_for_all(verdict: str | None, monkeypatch: pytest.MonkeyPatch):
    """Process 1 would say otherwise; it does not even look."""
    sent = []

    def broadcast(words: np.ndarray) -> np.ndarray:
        sent.append(words)
        return sent[0]

    monkeypatch.setattr(attention_cudnn, "_verdict", lambda *_: verdict)
    monkeypatch.setattr(attention_cudnn.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    first = attention_cudnn.probe(False)
    attention_cudnn.probe.cache_clear()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(attention_cudnn, "_verdict", lambda *_: pytest.fail("it looked"))
    assert attention_cudnn.probe(False) == first
    assert (first is None) == (verdict is None)
    assert str(verdict).startswith(str(first))


def test_the_probe_sees_an_ignored_window(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_cudnn, "run", without_window)
    assert attention_cudnn.probe(False) is None
    assert "its probe is off by" in str(attention_cudnn.probe(True))


def test_the_probe_reports_what_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_cudnn, "run", broken)
    assert attention_cudnn.probe(False) == "its probe failed: RuntimeError: no plan found"


def test_not_a_number_is_no_agreement(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_cudnn, "run", lambda q, k, v, **_: q * jnp.nan)
    assert "off by inf" in str(attention_cudnn.probe(False))


def test_the_probe_runs_once_and_inside_a_trace(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def counted(*args: Any, **options: Any) -> jax.Array:
        calls.append(options["window"])
        return honest(*args, **options)

    monkeypatch.setattr(attention_cudnn, "run", counted)

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        assert attention_cudnn.probe(False) is None
        return x

    for shape in ((), (2,)):
        traced.trace(jax.ShapeDtypeStruct(shape, jnp.float32))
    assert calls == [None]


@pytest.mark.usefixtures("trusted")
def test_a_plain_call_is_taken():
    assert explain("attention", *PLAIN, scale=0.125, implementation="cudnn").reason
    q = normal(1, 8, 2, 16)

    @jax.jit
    def read(q: jax.Array) -> list[jax.Array]:
        y = attention(q, q, q, scale=0.25, window=3, implementation="cudnn")
        return [y, honest(q, q, q, scale=0.25, window=3, causal=True)]

    np.testing.assert_array_equal(*read(q))


def shaped(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct(shape, dtype),) * 3


@pytest.mark.parametrize(
    ("arrays", "options", "reason"),
    [
        (PLAIN, {"lag": 1}, "it has no lag"),
        (PLAIN, {"dropout": Dropout(0.1, KEY)}, "it has no dropout"),
        (PLAIN, {"places": Places(*(IDS,) * 4)}, "it has no places or segment_ids"),
        (PLAIN, {"segment_ids": IDS}, "it has no places or segment_ids"),
        (
            PLAIN,
            {"log_forget": jax.ShapeDtypeStruct((2, 32, 4), jnp.float32)},
            "it has no log_forget",
        ),
        (PLAIN, {"clamp": 5.0}, "it has no clamp"),
        (
            PLAIN,
            {"value_gate": jax.ShapeDtypeStruct((2, 32, 4), jnp.float32), "lag": 1},
            "it has no value_gate, lag",
        ),
        (PLAIN, {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)}, "one Python number"),
        (shaped((2, 32, 4, 64), jnp.float32), {}, "bfloat16 or float16, not float32"),
        (shaped((2, 32, 4, 60)), {}, r"a multiple of 8 to 128, not \[60\]"),
        (shaped((2, 32, 4, 136)), {}, r"a multiple of 8 to 128, not \[136\]"),
    ],
)
def test_what_it_is_not_asked_for(arrays: Any, options: dict[str, Any], reason: str):
    with pytest.raises(KernelUnsupported, match=reason):
        explain("attention", *arrays, **{"scale": 0.125, **options}, implementation="cudnn")
    choice = explain("attention", *arrays, **{"scale": 0.125, **options})
    assert choice.implementation == "pallas"
    assert choice.rejected[0].implementation == "cudnn"


def test_it_gives_no_log_sum_exp():
    run = functools.partial(attention_with_lse, scale=0.25, implementation="cudnn")
    with pytest.raises(KernelUnsupported, match="it has no log-sum-exp"):
        jax.eval_shape(run, *shaped((1, 8, 2, 16)))


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("scale", [0.125, np.float64(0.125)])
def test_a_rate_of_zero_is_no_dropout(scale: float):
    choice = explain("attention", *PLAIN, scale=scale, dropout=Dropout(0.0, KEY))
    assert choice.implementation == "cudnn"


@pytest.mark.usefixtures("trusted")
def test_few_queries_take_no_kernel():
    few = shaped((2, 16, 4, 64))
    choice = explain("attention", *few, scale=0.125)
    assert choice.implementation == "xla"
    assert [r.implementation for r in choice.rejected] == ["cudnn", "pallas"]
    assert all("16 are few" in r.reason for r in choice.rejected)
    named = explain("attention", *few, scale=0.125, implementation="cudnn")
    assert named.implementation == "cudnn"


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("causal", [True, False])
def test_plain_jax_runs_where_the_arrays_are(causal: bool, monkeypatch: pytest.MonkeyPatch):
    """Under `auto` a CPU in a process with a GPU runs neither cuDNN nor what stands for it here."""
    q = normal(1, 32, 2, 16)
    monkeypatch.setattr(attention_cudnn, "run", lambda q, *_, **__: jnp.nan * q)

    def loss(q: jax.Array, name: Any) -> jax.Array:
        y = attention(q, q, q, causal=causal, implementation=name)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    abstract = shaped(q.shape)
    assert explain("attention", *abstract, causal=causal).implementation == "cudnn"
    grad = jax.value_and_grad(loss)
    found, expected = jax.jit(lambda q: [grad(q, name) for name in ("auto", "xla")])(q)
    assert_close(found, expected, BFLOAT16)
