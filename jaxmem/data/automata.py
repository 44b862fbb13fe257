"""Random deterministic automata, and prompts of strings that they accept.

An automaton has nodes 0 (the start) to n - 1. Every node has one to four outgoing symbols, each
leading to another node (itself among them); a string is a walk from the start in which every legal
symbol of the node is equally likely. Nothing in the automaton says where a string ends: lengths
are drawn before the walk, and every node may be the last one.

Drawn as in RegBench: nodes uniform in 2..max_nodes; per node the number of outgoing symbols uniform
in 1..min(4, nodes), the symbols uniform among 18, the targets uniform among all nodes, both without
replacement. Of automata that accept the same strings only the first is kept, which makes small
ones somewhat rarer.

Reference: Akyürek et al. 2024, "In-Context Language Learning: Architectures and Algorithms", 3.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt64

from jaxmem.errors import ConfigError

SYMBOLS = 18
"""Symbols of the automata: the tokens 0 to 17, written a to r."""
SEPARATOR = 18
"""Token between two strings of a prompt, written |."""
PAD = 19
"""Token after the end of a prompt, written a full stop."""
VOCABULARY = 20
TEXT = "abcdefghijklmnopqr|."
"""How the tokens are written."""

MOST_EDGES = 4
_ROUNDS = 100


class Automata(NamedTuple):
    """Some automata as arrays; an edge beyond a node's degree is 0 in `symbols` and `targets`."""

    nodes: Int[np.ndarray, "A"]
    """Nodes per automaton."""
    degree: Int[np.ndarray, "A N"]
    """Outgoing symbols per node, 0 for nodes that the automaton does not have."""
    symbols: Int[np.ndarray, "A N E"]
    """Symbol of each edge; E = 4."""
    targets: Int[np.ndarray, "A N E"]
    """Node that each edge leads to."""

    def __len__(self) -> int:
        return len(self.nodes)

    def take(self, index: np.ndarray | slice) -> "Automata":
        """Return some of the automata."""
        return Automata(*(array[index] for array in self))

    def legal(self) -> Int32[np.ndarray, "A N"]:
        """Return the legal symbols of every node as a set of bits: bit s for symbol s."""
        bits = np.where(_edges(self.degree), 1 << self.symbols.astype(np.int32), 0)
        return bits.sum(-1).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptShape:
    """How many strings a prompt has, and how long they are; all uniform, ends included."""

    min_strings: int = 10
    """Fewest strings of a prompt."""
    max_strings: int = 20
    """Most strings of a prompt."""
    max_length: int = 49
    """Most symbols of a string; the fewest are 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_strings <= self.max_strings or self.max_length < 1:
            raise ConfigError(
                f"Prompts of {self.min_strings} to {self.max_strings} strings of 1 to "
                f"{self.max_length} symbols do not exist. Use 1 <= min_strings <= max_strings and "
                "max_length >= 1."
            )


class Prompts(NamedTuple):
    """Rows of tokens, cut or padded to one length."""

    tokens: Int32[np.ndarray, "B L"]
    """Strings joined by SEPARATOR; PAD behind the last one."""
    legal: Int32[np.ndarray, "B L"]
    """Legal symbols, as bits, of the node in which each token was drawn. At a separator they are
    those with which the string would have gone on; 0 at padding."""


def draw_automata(
    rng: np.random.Generator, number: int, max_nodes: int, *, apart_from: Automata | None = None
) -> Automata:
    """Draw automata that all accept different strings.

    Args:
      rng: source of randomness.
      number: how many.
      max_nodes: most nodes of one, 2 or more.
      apart_from: others that none of the new ones may equal.

    Raises:
      ConfigError: `max_nodes` is below 2, or there are not that many different ones.
    """
    if max_nodes < 2:
        raise ConfigError(f"Automata of at most {max_nodes} nodes: use 2 or more.")
    rounds = 2 * max_nodes
    taken = np.zeros(0, np.uint64)
    if apart_from is not None:
        rounds = max_nodes + apart_from.degree.shape[1]
        taken = language_hash(apart_from, rounds)
    found: list[Automata] = []
    missing = number
    for _ in range(_ROUNDS):
        if not missing:
            break
        drawn = _draw(rng, missing, max_nodes)
        hashes = language_hash(drawn, rounds)
        _, first = np.unique(hashes, return_index=True)
        new = np.sort(first[~np.isin(hashes[first], taken)])
        found.append(drawn.take(new))
        taken = np.concatenate([taken, hashes[new]])
        missing -= len(new)
    if missing:
        raise ConfigError(
            f"Only {number - missing} of {number} different automata with at most {max_nodes} "
            "nodes were found. Use fewer automata or more nodes."
        )
    return Automata(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def _draw(rng: np.random.Generator, number: int, max_nodes: int) -> Automata:
    """Draw automata independently of one another."""
    nodes = rng.integers(2, max_nodes + 1, number)
    place = np.arange(max_nodes)
    exists = place < nodes[:, None]
    most = np.minimum(MOST_EDGES, nodes)[:, None]
    degree = np.where(exists, rng.integers(1, most + 1, (number, max_nodes)), 0)
    # The order of random numbers is a random permutation; absent nodes come last in it.
    order = rng.random((number, max_nodes, max_nodes)) + ~exists[:, None, :]
    targets = np.argsort(order, axis=-1)[..., :MOST_EDGES]
    missing = MOST_EDGES - targets.shape[-1]
    targets = np.pad(targets, [(0, 0), (0, 0), (0, max(missing, 0))])
    symbols = np.argsort(rng.random((number, max_nodes, SYMBOLS)), axis=-1)[..., :MOST_EDGES]
    edges = _edges(degree)
    return Automata(nodes, degree, np.where(edges, symbols, 0), np.where(edges, targets, 0))


def language_hash(automata: Automata, rounds: int) -> UInt64[np.ndarray, "A"]:
    """Return a number per automaton that depends on its strings of up to `rounds` symbols only.

    h_0(node) = 0; h_{k+1}(node) = Σ over edges of mix(symbol, h_k(target)), so h_k(start) stands
    for the legal walks of up to k symbols. Two automata of N and M nodes that differ do so within
    N + M symbols (Moore), so that many rounds tell all apart, but for collisions of 64 bits.
    """
    edges = _edges(automata.degree)
    rows = np.arange(len(automata))[:, None, None]
    symbols = automata.symbols.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(automata.degree.shape, np.uint64)
    for _ in range(rounds):
        mixed = _mix(_mix(symbols) ^ hashes[rows, automata.targets])
        hashes = _mix(np.where(edges, mixed, np.uint64(0)).sum(-1, dtype=np.uint64))
    return hashes[:, 0]


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _edges(degree: np.ndarray) -> np.ndarray:
    """Say which of the four edges of every node exist."""
    return np.arange(MOST_EDGES) < degree[..., None]


def draw_prompts(
    rng: np.random.Generator, automata: Automata, shape: PromptShape, length: int
) -> Prompts:
    """Draw one prompt of each automaton, the rows of the result.

    Args:
      rng: source of randomness.
      automata: one per row.
      shape: how many strings, and how long.
      length: tokens per row: what is longer is cut, what is shorter padded.
    """
    rows = len(automata)
    strings = rng.integers(shape.min_strings, shape.max_strings + 1, (rows, 1))
    sizes = rng.integers(1, shape.max_length + 1, (rows, shape.max_strings))
    symbols, legal = _walk(rng, automata, shape)
    place, string = np.arange(shape.max_length + 1), np.arange(shape.max_strings)
    ends = place == sizes[..., None]
    last = (string == strings - 1)[..., None]
    within = (place <= sizes[..., None]) & (string < strings)[..., None] & ~(ends & last)
    begins = np.cumsum(sizes + 1, axis=1) - sizes - 1
    column = begins[..., None] + place
    row = np.broadcast_to(np.arange(rows)[:, None, None], column.shape)
    kept = within & (column < length)
    tokens = np.full((rows, length), PAD, np.int32)
    sets = np.zeros((rows, length), np.int32)
    tokens[row[kept], column[kept]] = np.where(ends, SEPARATOR, symbols)[kept]
    sets[row[kept], column[kept]] = legal[kept]
    return Prompts(tokens, sets)


def _walk(
    rng: np.random.Generator, automata: Automata, shape: PromptShape
) -> tuple[np.ndarray, np.ndarray]:
    """Walk from the start once per string; return the symbol drawn and the set it was drawn from.

    Both are [rows, max_strings, max_length + 1].
    """
    chance = rng.random((len(automata), shape.max_strings, shape.max_length + 1))
    sets = automata.legal()
    row = np.arange(len(automata))[:, None]
    node = np.zeros(chance.shape[:2], np.int64)
    symbols, legal = np.empty(chance.shape, np.int32), np.empty(chance.shape, np.int32)
    for step in range(chance.shape[-1]):
        edge = (chance[..., step] * automata.degree[row, node]).astype(np.int64)
        symbols[..., step] = automata.symbols[row, node, edge]
        legal[..., step] = sets[row, node]
        node = automata.targets[row, node, edge]
    return symbols, legal


def to_text(tokens: np.ndarray) -> str:
    """Write a row of tokens as letters, bars and full stops."""
    return "".join(TEXT[token] for token in tokens)
