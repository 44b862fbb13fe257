"""Attention over all pairs of tokens and a state in float64, with gradients, and inputs for it.

A function here returns values and their `pull`: from weights of all values to the gradients of
their weighted sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.ops.linear_attention import LinearState

# Padding before, between, inside and after documents; the state belongs to document 4.
IDS = np.array([0, 4, 4, 0, 7, 7, 0, 7, 7, 2, 2, 2, 0, 0, 2, 2, 9, 0])
STATE_DOCUMENT = 4

Similarity = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From scaled products of queries and keys [B H T S] to weights and their derivatives."""


class Operands(NamedTuple):
    """What a call takes."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    state: Any


class Outputs(NamedTuple):
    """What a call returns."""

    y: Any
    total: Any
    state: Any


class Rows(NamedTuple):
    """What is read, per head and in float64."""

    q: np.ndarray
    """[B T H K]"""
    k: np.ndarray
    """[B T H K]"""
    values: np.ndarray
    """[B T H V+1]: the last one is 1, and its weighted sum that of the weights."""
    gates: np.ndarray
    """[B T H]"""


class Documents(NamedTuple):
    """Which tokens belong together."""

    real: np.ndarray
    """Tokens that are no padding [B T]."""
    seen: np.ndarray
    """Keys that a query sees [B T S]."""
    first: np.ndarray
    """Tokens that read the state before [B T]."""
    last: np.ndarray
    """Tokens that are in the state after [B T]."""


def operands(
    power: int,
    length: int,
    *,
    heads: int = 4,
    groups: int = 2,
    width: int = 5,
    value_width: int = 3,
    batch: int = 2,
) -> Operands:
    """Draw float32 operands; the total of the state is a sum over 7 keys."""
    draw = np.random.default_rng(length + 100 * power)

    def normal(*shape: int) -> np.ndarray:
        return np.float32(draw.normal(size=shape))

    q, k = normal(batch, length, groups, width), normal(batch, length, groups, width)
    v, gates = normal(batch, length, heads, value_width), normal(batch, length, heads) - 1
    total = np.sum(features(power, normal(batch, heads, 7, width)), axis=2)
    state = LinearState(normal(*total.shape, value_width), np.float32(total))
    return Operands(q, k, v, gates, state)


def waves(tree: Any) -> Any:
    """Return different weights of all numbers of a tree, which give each of them a gradient."""
    return jax.tree.map(lambda a: np.float32(np.cos(np.arange(a.size)).reshape(a.shape)), tree)


def functional(outputs: Any) -> jax.Array:
    """Return the sum of all outputs by `waves`."""
    weighted = jax.tree.map(lambda a, w: jnp.sum(a * w), outputs, waves(outputs))
    return sum(jax.tree.leaves(weighted))


def exact(
    power: int,
    scale: float,
    given: Operands,
    ids: np.ndarray | None = None,
    state_document: int | None = None,
    *,
    with_total: bool = True,
    with_state: bool = True,
) -> tuple[Outputs, Operands]:
    """Return the results of a call, and the gradients of their sum by `waves`.

    Args:
      power: of the products of queries and keys.
      scale: factor of the products.
      given: the operands; gates and the state may be None.
      ids: document of each token [T] or [B T], 0 for padding; None: one per row.
      state_document: what the state belongs to; None: each row's first document.
      with_total: return sums of weights.
      with_state: return the state after.
    """
    tokens, heads = given.v.shape[:2], given.v.shape[2]
    found = documents(np.broadcast_to(1 if ids is None else ids, tokens), state_document)
    share = heads // given.q.shape[2]
    q, k = (np.repeat(np.float64(a), share, axis=2) for a in (given.q, given.k))
    gates = np.zeros((*tokens, heads)) if given.log_decay is None else given.log_decay
    gates = np.where(found.real[..., None], np.float64(gates), 0.0)
    rows = Rows(q, k, joined(given.v, 1.0), gates)
    state = np.zeros((tokens[0], heads, features(power, k).shape[3], rows.values.shape[3]))
    if given.state is not None:
        state = joined(given.state.memory, given.state.total)

    by_pairs, pull_pairs = read_pairs(monomial(power), scale, rows, found.seen)
    (by_state, after), pull_state = read_state(power, scale, rows, found, state)
    outputs = Outputs(*split(by_pairs + by_state, with_total), None)
    if with_state:
        outputs = outputs._replace(state=LinearState(*split(after, with_total)))
    weights = waves(outputs)
    of_reads = joined(weights.y, weights.total)
    of_state = joined(*weights.state) if with_state else np.zeros_like(after)
    from_state, dstate = pull_state(of_reads, of_state)
    dq, dk, dvalues, dgates = map(np.add, pull_pairs(of_reads), from_state)
    dq, dk = (a.reshape(*tokens, -1, share, q.shape[3]).sum(axis=3) for a in (dq, dk))
    dgates = np.where(found.real[..., None], dgates, 0.0)
    return outputs, Operands(
        dq,
        dk,
        dvalues[..., :-1],
        None if given.log_decay is None else dgates,
        given.state and LinearState(*split(dstate, given.state.total is not None)),
    )


def exact_series(
    coefficients: np.ndarray,
    scale: float,
    given: Operands,
    clamp: float | None = None,
) -> tuple[Outputs, Operands]:
    """Return the same of polynomial attention with coefficients [N] or [N H], one row each."""
    rows = Rows(
        *(np.float64(a) for a in (given.q, given.k)),
        joined(given.v, 1.0),
        np.float64(given.log_decay),
    )
    tokens = np.ones(given.v.shape[:2], int)
    sums, pull = read_pairs(polynomial(coefficients, clamp), scale, rows, documents(tokens, 1).seen)
    outputs = Outputs(*split(sums), None)
    weights = waves(outputs)
    dq, dk, dvalues, dgates = pull(joined(weights.y, weights.total))
    return outputs, Operands(dq, dk, dvalues[..., :-1], dgates, None)


def joined(array: np.ndarray, last: Any) -> np.ndarray:
    """Append a channel to an array; None is zeros."""
    column = np.broadcast_to(0.0 if last is None else last, array.shape[:-1])
    return np.concatenate([array, column[..., None]], axis=-1, dtype=np.float64)


def split(array: np.ndarray, with_total: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """Return an array without its last channel, and that one if asked for."""
    return array[..., :-1], array[..., -1] if with_total else None


def monomial(power: int) -> Similarity:
    """Return the similarity whose weights are powers of products."""
    return lambda s: (s**power, power * s ** (power - 1))


def polynomial(coefficients: np.ndarray, clamp: float | None) -> Similarity:
    """Return the similarity of a sum of powers of products, constant beyond a limit."""
    terms = list(coefficients.reshape(len(coefficients), -1, 1, 1).astype(np.float64))

    def similarity(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        held = s if clamp is None else np.minimum(s, clamp)
        slopes = sum(n * c * held ** (n - 1) for n, c in enumerate(terms) if n > 0)
        return sum(c * held**n for n, c in enumerate(terms)), slopes * (held == s)

    return similarity


def read_pairs(
    similarity: Similarity, scale: float, rows: Rows, seen: np.ndarray
) -> tuple[np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, ...]]]:
    """Return the weighted sums of values over the pairs that are seen; pull to all rows."""
    q, k, values, gates = rows
    passed = np.moveaxis(np.cumsum(gates, axis=1), 1, 2)
    apart = passed[..., :, None] - passed[..., None, :]
    fade = np.exp(np.where(seen[:, None], apart, -np.inf))
    alike, slope = similarity(scale * np.einsum("bthk,bshk->bhts", q, k))
    shares = fade * alike

    def pull(weights: np.ndarray) -> tuple[np.ndarray, ...]:
        dshares = np.einsum("bthv,bshv->bhts", weights, values)
        dproducts = scale * slope * fade * dshares
        dq = np.einsum("bhts,bshk->bthk", dproducts, k)
        dk = np.einsum("bhts,bthk->bshk", dproducts, q)
        return dq, dk, np.einsum("bhts,bthv->bshv", shares, weights), crossed(shares * dshares)

    return np.einsum("bhts,bshv->bthv", shares, values), pull


def crossed(pairs: np.ndarray) -> np.ndarray:
    """Return for each token u the sum over pairs [B H T S] with s < u <= t, as [B T H]."""
    until = np.cumsum(pairs, axis=3)
    both = np.cumsum(until[:, :, ::-1], axis=2)[:, :, ::-1]
    inside = np.diagonal(both, offset=-1, axis1=2, axis2=3)
    return np.pad(np.moveaxis(inside, 2, 1), ((0, 0), (1, 0), (0, 0)))


def read_state(
    power: int, scale: float, rows: Rows, found: Documents, state: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], Callable[..., tuple[Any, np.ndarray]]]:
    """Return what queries read from the state, and the state after; pull to rows and state."""
    q, k, values, gates = rows
    passed = np.cumsum(gates, axis=1)
    since = np.exp(np.where(found.first[..., None], passed, -np.inf))[..., None]
    until = np.exp(np.where(found.last[..., None], passed[:, -1:] - passed, -np.inf))[..., None]
    kept = since[:, -1, ..., None]
    asked, written = since * features(power, scale * q), until * features(power, k)
    y = np.einsum("bthf,bhfv->bthv", asked, state)
    after = kept * state + np.einsum("bthf,bthv->bhfv", written, values)

    def pull(weights: np.ndarray, weights_after: np.ndarray) -> tuple[Any, np.ndarray]:
        dq = since * np.einsum("bthv,bhfv->bthf", weights, state)
        dk = until * np.einsum("bthv,bhfv->bthf", values, weights_after)
        dq = scale * pull_features(power, scale * q, dq)
        dvalues = np.einsum("bthf,bhfv->bthv", written, weights_after)
        dsince, duntil = np.sum(weights * y, axis=3), np.sum(values * dvalues, axis=3)
        dsince[:, -1] += np.sum(kept * state * weights_after, axis=(2, 3))
        # A gate lets the state through to all later tokens, and all earlier ones to the state.
        dgates = np.cumsum(dsince[:, ::-1], axis=1)[:, ::-1]
        dgates[:, 1:] += np.cumsum(duntil[:, :-1], axis=1)
        dstate = kept * weights_after + np.einsum("bthf,bthv->bhfv", asked, weights)
        return (dq, pull_features(power, k, dk), dvalues, dgates), dstate

    return (y, after), pull


def features(power: int, x: np.ndarray) -> np.ndarray:
    """Return φ(x) with φ(x)·φ(y) = (x·y)^power, for squares as products of two channels."""
    if power == 1:
        return x
    i, j = np.triu_indices(x.shape[-1])
    return np.where(i == j, 1.0, np.sqrt(2.0)) * x[..., i] * x[..., j]


def pull_features(power: int, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the gradient by x of the weighted sum of its features."""
    if power == 1:
        return weights
    i, j = np.triu_indices(x.shape[-1])
    form = np.zeros((*x.shape, x.shape[-1]))
    form[..., i, j] = np.where(i == j, 1.0, np.sqrt(2.0)) * weights
    return np.einsum("...ij,...j->...i", form + np.swapaxes(form, -1, -2), x)


def documents(ids: np.ndarray, state_document: int | None) -> Documents:
    """Describe packed rows [B T], where padding takes the document of the last token before it."""
    carried = np.array(ids)
    first = [row[np.flatnonzero(row)[0]] for row in ids]
    before = np.array(first if state_document is None else np.full(len(ids), state_document))
    last = before
    for t in range(ids.shape[1]):
        last = carried[:, t] = np.where(ids[:, t] == 0, last, ids[:, t])
    real = ids != 0
    together = carried[:, :, None] == carried[:, None, :]
    seen = np.tril(together & real[:, None, :])
    return Documents(real, seen, carried == before[:, None], real & (carried == carried[:, -1:]))
