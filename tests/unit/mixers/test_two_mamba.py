"""The two_mamba grammar: what it refuses, and what the papers say follows from it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from jaxmem.errors import ConfigError, KernelUnsupported, ShapeError, UnknownName
from jaxmem.interop.attention_types import (
    ALIASES,
    ATTENTION,
    UNLISTED,
    fields,
    from_name,
)
from jaxmem.mixers.base import Mixer, build
from jaxmem.mixers.mamba2 import Mamba2Config
from jaxmem.mixers.root_orders import RootOrdersConfig
from jaxmem.mixers.softmax_state import SoftmaxStateConfig
from jaxmem.mixers.two_mamba import TwoMambaConfig
from jaxmem.nn.feature_maps import featured
from jaxmem.nn.init import uniform_init
from jaxmem.nn.scaled import Scaled, divided, l2_normed, layer_normed, rms_normed, scaled, value
from jaxmem.ops.decay import bounded_decay
from tests.helpers.compare import FORWARD, GRADIENT, assert_close

DIM = 12


def make(config: Any, dim: int = DIM) -> Mixer:
    mixer = build(config, dim, init=uniform_init(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    draw = np.random.default_rng(1)

    def moved(p: jax.Array) -> jax.Array:
        return jnp.asarray(np.float32(p + 0.3 * draw.normal(size=p.shape)))

    return nnx.merge(graph, jax.tree.map(moved, params))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: Any, params: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(x).y


def run(mixer: Mixer, x: Any) -> np.ndarray:
    return np.asarray(_run(*nnx.split(mixer), x))


def abstract(config: Any) -> Mixer:
    """Return a mixer whose parameters are shapes."""
    return nnx.eval_shape(lambda: build(config, DIM, init=uniform_init(), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(2, 10, DIM)), jnp.float32)


@pytest.mark.parametrize("kernel", ["exp", "taylor", "pow2"])
def test_a_power_of_counts_gates_the_keys_of_every_row(kernel: Any, x: jax.Array):
    mixer = abstract(
        TwoMambaConfig(num_heads=2, kernel=kernel, denominator="count", key_gate="count_pow")
    )
    assert nnx.eval_shape(lambda mixer: mixer(x).y, mixer).shape == x.shape


LINEAR = {"kernel": "pow1", "feature": "relu", "denominator": "sum"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kernel": "pow1"}, "signed weights"),
    ({"denominator": "one", "eps": 0.1}, "change a sum of weights"),
    ({"denominator": "count", "detach": True}, "change a sum of weights"),
    ({"out_gate": "post"}, "after a norm of each head"),
    ({"out_gate": "both", "norm": "rms_all"}, "after a norm of each head"),
    ({"dt_bias": True}, "bias of dt, which nothing uses"),
    ({"denominator": "count_pow", "key_gate": "count_pow"}, "share one exponent"),
    ({"denominator": "gate_sum", "out_gate": "pre"}, "made of the output gate"),
    ({"kernel": "cube"}, r"kernel='cube'. Use one of exp, pow1"),
    ({"feature": "gelu"}, "feature='gelu'. Use one of id"),
    ({"decay": "lag1024"}, "decay='lag1024'. Use one of none"),
    ({"conv": 1}, "conv=1. Use 2 to 4"),
    ({"conv": -2}, "conv=-2"),
    ({"terms": 0}, "terms=0"),
    ({"clamp": float("inf")}, "clamp=inf is not finite"),
    ({"norm_eps": 0.0}, "norm_eps=0.0 is not positive"),
    ({"norm_eps": float("inf")}, "norm_eps=inf is not positive and finite"),
    ({"norm_eps": float("nan")}, "norm_eps=nan"),
    ({"floor": -1.0}, "floor=-1.0 is negative"),
    ({"floor": float("inf")}, "floor=inf is negative or not finite"),
    ({"eps": float("nan")}, "eps=nan is negative or not finite"),
    ({"conv": 9}, "conv=9. Use 2 to 4"),
    ({"rope_theta": 0.0}, "rope_theta=0.0 is not positive"),
    ({"rope_theta": -1.0}, "rope_theta=-1.0"),
    ({"rope_theta": float("inf")}, "rope_theta=inf"),
    ({"rope_positions": "float16"}, "rope_positions='float16'. Use one of float32, bfloat16"),
    ({"rope": "pairs", **LINEAR}, "rope='pairs' turns relu and elu1.*Use rope='half'"),
    ({"rope": "pairs", **LINEAR, "feature": "elu1"}, "rope='pairs' turns relu and elu1"),
    ({"clamp": -0.5, **LINEAR}, "clamp=-0.5 with kernel='pow1'.*Use 0 or more"),
    ({"form": "steps"}, "form='steps'. Use one of parallel, chunked"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_rows_that_make_no_sense(
    wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as without the tests' hook
    with pytest.raises(ConfigError, match=f"^two_mamba.*{message}"):
        TwoMambaConfig(**wrong)


def test_rows_at_the_edge_of_sense():
    for right in (
        LINEAR | {"rope": "half"},
        LINEAR | {"clamp": 0.0},
        LINEAR | {"clamp": -0.5, "denominator": "count"},
        LINEAR | {"rope": "pairs", "denominator": "count"},
        {"kernel": "taylor", "terms": 80},
    ):
        TwoMambaConfig(**right)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TwoMambaConfig(num_heads=5), "does not divide model.dim"),
        (TwoMambaConfig(num_heads=4, rope="half"), "heads of 3 channels"),
        (Mamba2Config(head_dim=5), "ssm_dim=12 is not a multiple of head_dim=5"),
        (Mamba2Config(head_dim=8, ssm_dim=16), "ssm_dim=16 is not a multiple"),
        (RootOrdersConfig(num_heads=4), "heads of 3 channels"),
        (SoftmaxStateConfig(num_heads=4), "heads of 3 channels"),
    ],
)
def test_widths_that_make_no_sense(config: Any, message: str):
    with pytest.raises(ConfigError, match=f"^model.mixer.*{message}"):
        config.check(DIM, "model.mixer")


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (Mamba2Config, {"state_dim": 0}, "mamba2.state_dim=0. Use 1 or more"),
        (Mamba2Config, {"conv": 0}, "mamba2.conv=0"),
        (Mamba2Config, {"norm_eps": float("inf")}, "mamba2.norm_eps=inf is not positive"),
        (RootOrdersConfig, {"orders": 0}, "root_orders.orders=0"),
        (SoftmaxStateConfig, {"of": "key"}, "softmax_state.of='key'. Use one of state, output"),
    ],
)
def test_related_layers_that_make_no_sense(
    config: Any, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        config(**wrong)


@pytest.mark.parametrize(
    "config",
    [
        TwoMambaConfig(num_heads=2),
        Mamba2Config(head_dim=6),
        SoftmaxStateConfig(num_heads=2),
        RootOrdersConfig(num_heads=2),
    ],
)
def test_states_of_no_length(config: Any):
    with pytest.raises(ShapeError, match=r"found -5. Pass max_len"):
        abstract(config).init_state(1, max_len=-5)


@pytest.mark.parametrize("name", ["pallas", "cudnn"])
@pytest.mark.parametrize(
    "config",
    [
        TwoMambaConfig(num_heads=2, kernel="taylor"),
        TwoMambaConfig(num_heads=2, clamp=1.0),
        RootOrdersConfig(num_heads=2),
        SoftmaxStateConfig(num_heads=2, of="state"),
    ],
)
def test_a_kernel_that_does_not_exist_is_not_replaced(config: Any, name: Any, x: jax.Array):
    mixer = abstract(config)
    with pytest.raises(KernelUnsupported, match=rf"no implementation '{name}'.*xla"):
        nnx.eval_shape(lambda mixer: mixer(x, implementation=name).y, mixer)


def test_names():
    assert from_name("2mamba") == TwoMambaConfig()
    assert fields("2mamba_e") == fields(ALIASES["2mamba_e"])
    assert from_name("softmax").rope == "pairs"
    assert from_name("softmax", "attention").rope == "half"
    assert from_name("gated_softmax_decay", "attention").rope == "none"
    with pytest.raises(UnknownName, match="linear_cosine"):
        from_name("linear_cosin", "attention")
    with pytest.raises(UnknownName, match="squared__sm_norm"):
        from_name("squared__sm_norm__A_mask_type_neg_softplu__in_conv_k_2")
    with pytest.raises(UnknownName):
        from_name("softmax_divs", "attention", fixed=True)


def run_as(name: str, given: Mixer, x: jax.Array, **more: Any) -> jax.Array:
    """Run another name with the parameters of a mixer."""
    other = make(from_name(name, "attention", num_heads=2, **more))
    graph, params = nnx.split(other)
    flat = dict(nnx.to_flat_state(params))
    flat |= {path: v for path, v in nnx.to_flat_state(nnx.state(given)) if path in flat}
    return run(nnx.merge(graph, nnx.from_flat_state(flat)), x)


def test_equal_functions_have_equal_rows_and_gates_cancel(x: jax.Array):
    groups = (
        ("softmax_divS_gate", "softmax_divS_gatev2", "gated_softmax_no_in_gate_no_norm"),
        ("softmax_divs", "gated_softmax_no_gate_no_norm"),
        ("softmax_divS_norm", "gated_softmax_no_gate_rmsnorm"),
    )
    for first, *others in groups:
        assert all(ATTENTION[name] == ATTENTION[first] for name in others)
    # A gate or a count before a norm to unit length does nothing; after it, it does.
    plain = "gated_softmax_no_gate_L2norm_nodivS_noclamp"
    gated = make(
        from_name("gated_softmax_out_gate_L2norm_nodivS_noclamp", "attention", num_heads=2)
    )
    assert_close(run_as(plain, gated, x), run(gated, x), FORWARD)
    both = run_as("gated_softmax_post_out_gate_L2norm_nodivS_noclamp", gated, x)
    assert np.max(np.abs(both - run(gated, x))) > 1e-2


def times(weights: Any, size: float) -> jax.Array:
    """Multiply what makes queries."""
    new = np.array(weights[...])
    new[..., :DIM] *= np.float32(size)
    return jnp.asarray(new)


def test_normalised_squares_do_not_see_the_size_of_queries(x: jax.Array):
    mixer = make(from_name("squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2", num_heads=2))
    y = run(mixer, x)
    for parameter in (mixer.short_conv.kernel, mixer.short_conv.bias):
        parameter[...] = times(parameter, 100.0)
    # All pairs, so that what is small is computed from small numbers. Measured 5e-6 here.
    np.testing.assert_allclose(run(mixer, x), y, rtol=0, atol=2e-5 * np.max(np.abs(y)))


@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_tiny_queries_have_the_gradients_of_others(form: Any, x: jax.Array):
    """Sums of weights down to 1e-30, whose squares no float32 holds."""
    config = from_name("squared__sm_norm__A_mask_type_neg_softplus", num_heads=2, chunk_size=4)
    mixer = make(config)
    graph, params = nnx.split(mixer)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(graph, params)(x, form=form).y
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    (_, y), (at_params, at_x) = run(params, x)
    kernel = mixer.qkv.kernel
    plain = kernel[...]
    for size in (1e-10, 1e-15):
        kernel[...] = times(plain, size)
        (_, tiny), (tiny_params, tiny_x) = run(nnx.split(mixer)[1], x)
        assert_close(tiny, y, FORWARD)
        assert_close(tiny_x, at_x, GRADIENT)
        scaled_back = times(tiny_params.qkv.kernel[...], size)
        assert_close(scaled_back, at_params.qkv.kernel[...], GRADIENT)


@jax.jit
def pulled_quotient(y: jax.Array, total: jax.Array) -> Any:
    quotient, pull = jax.vjp(divided, y, total)
    return quotient, pull(jnp.ones_like(quotient))


@pytest.mark.parametrize("total", [1e-37, -1e-30, 1e-20, 3.0, 1e30])
def test_quotients_and_their_gradients_at_any_size(total: float):
    y = total * np.linspace(-1.0, 2.0, 4).reshape(1, 1, 1, 4)
    quotient, (of_y, of_total) = pulled_quotient(
        np.float32(y), np.full((1, 1, 1), total, np.float32)
    )
    np.testing.assert_allclose(quotient, y / total, rtol=1e-6)
    np.testing.assert_allclose(of_y, np.full(y.shape, 1 / total), rtol=1e-6)
    np.testing.assert_allclose(of_total, np.full((1, 1, 1), -np.sum(y / total) / total), rtol=1e-6)


def test_a_sum_of_squares_below_zero_is_rounding():
    """Where q is orthogonal to all keys the form with a state may add up to less than 0."""
    mixer = make(TwoMambaConfig(num_heads=2))
    y, total = np.ones((1, 1, 2, 6), np.float32), np.full((1, 1, 2), -1e-9, np.float32)
    found, plain = jax.jit(lambda *a: (mixer._divided(*a, None).x, divided(*a)))(y, total)
    np.testing.assert_array_equal(found, 0.0)
    assert np.max(np.abs(plain)) > 0.0  # learnt series may be negative


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_elu_plus_one_is_positive(dtype: Any):
    x = np.array([-80.0, -18.0, -8.0, -1.0, 0.0, 2.0]).astype(dtype).reshape(1, 1, 1, 6)

    @jax.jit
    def pulled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: featured(x, "elu1"), x)
        return y, *pull(jnp.ones_like(y))

    y, slopes = (np.asarray(a, np.float64) for a in pulled(x))
    wide = np.asarray(x, np.float64)
    rtol = 4 * float(jnp.finfo(dtype).eps)
    expected = np.where(wide > 0, wide + 1, np.exp(np.minimum(wide, 0)))
    np.testing.assert_allclose(y, expected, rtol=rtol)
    np.testing.assert_allclose(slopes, np.minimum(expected, 1.0), rtol=rtol)


def test_lengths_of_zero_have_gradient_zero():
    for feature in ("l2", "l2_heads"):
        slope = jax.jit(jax.grad(lambda x, feature=feature: jnp.sum(featured(x, feature))))
        np.testing.assert_array_equal(slope(np.zeros((1, 2, 3, 4), np.float32)), 0.0)


def test_complete_forgetting_leaves_each_token_its_value(x: jax.Array):
    mixer = make(
        TwoMambaConfig(num_heads=2, conv=0, kernel="exp", decay="neg_softplus", denominator="sum")
    )
    kernel = mixer.decay.projection.kernel
    slopes = np.zeros(kernel.shape, np.float32)
    kernel[...] = jnp.asarray(slopes)
    y = run(mixer, x)
    # softplus(0) = 0.69 a step; with a slope of 1e4 on a channel that is 1 everything is forgotten.
    ones = np.array(x)
    ones[..., 0] = 1.0
    slopes[0] = 1e4
    kernel[...] = jnp.asarray(slopes)
    of_values = jax.jit(lambda x: mixer.out(mixer.qkv(x)[..., 2 * DIM :]))
    assert_close(run(mixer, ones), of_values(ones), FORWARD)
    assert np.max(np.abs(y - of_values(x))) > 1e-2


def test_counts_are_of_visible_keys_not_of_the_row():
    mixer = make(from_name("softmax_divs", "attention", num_heads=2))
    x = np.random.default_rng(3).normal(size=(1, 9, DIM)).astype(np.float32)
    first = np.where(np.arange(9)[:, None] < 4, x, np.float32(0))
    # A longer row does not change what was there.
    np.testing.assert_array_equal(run(mixer, x)[:, :4], run(mixer, first)[:, :4])
    assert_close(run(mixer, x[:, :4]), run(mixer, x)[:, :4], FORWARD)


EPS = 1e-5


@jax.jit
def pulled_norms(u: Any, log: Any, weight: Any, bias: Any, direction: Any) -> Any:
    """Return norms of e^log u, and the gradients of each along a direction."""
    norms = (
        lambda of: layer_normed(of, weight, bias, EPS),
        lambda of: rms_normed(of, weight, EPS),
        l2_normed,
    )

    def along(u: Any, log: Any, norm: Any) -> tuple[jax.Array, jax.Array]:
        y = norm(scaled(u, log))
        return jnp.vdot(direction, y), y

    pulled = [jax.value_and_grad(along, (0, 1), has_aux=True)(u, log, norm) for norm in norms]
    return [y for (_, y), _ in pulled], [grads for _, grads in pulled]


@pytest.mark.parametrize("logit", [-1000.0, -30.0, 0.0, 30.0, 1000.0])
def test_norms_of_exponentials_at_any_logit(logit: float):
    """Norms of e^logit u against float64 where that can hold it, and finite beyond."""
    u = np.random.default_rng(0).normal(size=(1, 1, 1, 6))
    weight, bias = np.linspace(0.5, 1.5, 6), np.linspace(-1, 1, 6)
    log, one = np.full((1, 1, 1), logit, np.float32), np.ones(6, np.float32)
    got, grads = pulled_norms(np.float32(u), log, np.float32(weight), np.float32(bias), one)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((got, grads)))
    wide = u * np.exp(np.clip(logit, -700, 300))
    centred = wide - wide.mean(-1, keepdims=True)
    expected = (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * weight + bias,
        wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * weight,
        wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12),
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-14, 1e-8, 1.0, 1e25])
def test_norms_and_their_gradients_at_any_size(size: float):
    """Neither squares nor third powers of inverse lengths leave the range of floats."""
    u = size * np.random.default_rng(1).normal(size=(1, 1, 1, 6))
    given = (u, np.full((1, 1, 1), 40.0), np.ones(6), np.zeros(6), np.cos(np.arange(6.0)))
    found, grads = pulled_norms(*map(np.float32, given))
    with jax.enable_x64(True):
        expected, expected_grads = pulled_norms(*given)
    direction = given[-1]
    for part, whole in zip(found, expected, strict=True):
        assert_close(np.vdot(direction, part), np.vdot(direction, whole), GRADIENT)
    for (of_u, _), (expected_of_u, _) in zip(grads, expected_grads, strict=True):
        assert_close(of_u, expected_of_u, GRADIENT)


def test_nothing_visible_gives_zero_with_gradient_zero():
    norms = (value, l2_normed, lambda of: rms_normed(of, jnp.ones(4), EPS))

    @jax.jit
    def run(u: jax.Array, log: jax.Array) -> Any:
        ys = [norm(scaled(u, log)) for norm in norms]
        along = lambda u, log, norm: jnp.sum(norm(scaled(u, log)))  # noqa: E731
        return ys, [jax.grad(along, (0, 1))(u, log, norm) for norm in norms]

    u = np.ones((1, 1, 1, 4), np.float32)
    for leaf in jax.tree.leaves(run(u, np.full((1, 1, 1), -np.inf, np.float32))):
        np.testing.assert_array_equal(leaf, 0.0)
    assert isinstance(scaled(jnp.asarray(u)), Scaled)


BOUNDED = jax.jit(bounded_decay)


def test_growth_is_bounded_and_changes_no_share():
    draw = np.random.default_rng(0)
    gates = (draw.normal(size=(2, 50, 3)) + 0.2).astype(np.float32)
    resets = np.broadcast_to(np.arange(50) == 20, (2, 50))
    start = np.zeros((2, 3), np.float32)

    def bounded(*given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return jax.device_get(BOUNDED(*given))

    decays, excess = bounded(gates, start, resets)
    inside = np.ones((2, 50), bool)
    inside[:, [0, 20]] = False
    assert np.max(np.where(inside[..., None], decays, 0.0)) <= 1e-5
    assert np.min(excess) >= 0.0

    def shares(gates: np.ndarray, weight: np.ndarray, first: int, last: int) -> np.ndarray:
        passed = np.cumsum(gates[:, first:last], axis=1, dtype=np.float64)
        weights = np.exp(passed[:, -1:] - passed + weight[:, first:last])
        return weights / weights.sum(axis=1, keepdims=True)

    for first, last in ((0, 20), (20, 50), (20, 33)):
        expected = shares(gates, np.zeros_like(gates), first, last)
        assert_close(shares(decays, -excess, first, last), expected, FORWARD)
    # In two calls as in one.
    one, until = bounded(gates[:, :25], start, resets[:, :25])
    two, after = bounded(gates[:, 25:], until[:, -1], resets[:, 25:])
    assert_close(np.concatenate([one, two], axis=1), decays, FORWARD)
    assert_close(after[:, -1], excess[:, -1], FORWARD)


@pytest.mark.parametrize("decay", ["neg_silu", "neg_softplus2"])
def test_long_growth_stays_finite(decay: str):
    mixer = make(TwoMambaConfig(num_heads=2, decay=decay, conv=0))
    x = np.ones((1, 1024, DIM), np.float32)
    kernel = mixer.decay.projection.kernel
    # u = -1: each step grows by e^0.27 or more.
    kernel[...] = jnp.asarray(np.full(kernel.shape, -1.0 / DIM, np.float32))
    for form in ("parallel", "chunked"):
        y = jax.jit(lambda x, form=form: mixer(x, form=form).y)(x)
        assert np.all(np.isfinite(y))


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("gated_softmax", "attention"),
        ("softmax_gate", "attention"),
        ("gated_softmax_no_gate_L2norm_nodivS_noclamp", "attention"),
        ("2mamba", "mamba"),
        ("2mamba_e", "mamba"),
        ("mamba2s", "mamba"),
        # The others are polynomials, whose powers leave the range of floats.
        *((name, "attention") for name in UNLISTED if "clamp" in UNLISTED[name]),
    ],
)
def test_huge_inputs(name: str, paper: Any):
    """Clamps, sums in log space and shares stay finite at any size, and so do their gradients."""
    mixer = make(from_name(name, paper, num_heads=2))
    x = np.float32(1e4 * np.random.default_rng(4).normal(size=(1, 6, DIM)))
    found = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(mixer(x).y))))(x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_states_have_the_sizes_of_the_paper():
    """Numbers per head: KV cache 2 N d; order 2 D₂ d + D₂ + 3 d; order 1 d² + d + 3 d."""
    heads, width = 2, 6
    dim = heads * width
    pairs = width * (width + 1) // 2

    def numbers(config: TwoMambaConfig, tokens: int) -> float:
        mixer = build(config, dim, init=uniform_init(), rngs=nnx.Rngs(0))
        counters = 2 * 4  # place and document
        return (mixer.state_bytes(1, tokens) - counters) / 4 / heads

    squared = from_name("2mamba", num_heads=heads)
    assert numbers(squared, 100) == pairs * width + pairs + 3 * width
    positive = dataclasses.replace(squared, kernel="pow1", feature="relu")
    assert numbers(positive, 100) == width**2 + width + 3 * width
    softmax = from_name("softmax", num_heads=heads)
    assert numbers(softmax, 200) - numbers(softmax, 100) == 100 * (2 * width + 1 / heads)
