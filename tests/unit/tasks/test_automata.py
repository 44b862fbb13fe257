"""Random automata and their prompts: sizes, legality, distinctness, the same from the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.data.automata import (
    MOST_EDGES,
    PAD,
    SEPARATOR,
    SYMBOLS,
    TEXT,
    VOCABULARY,
    Automata,
    PromptShape,
    _draw,
    draw_automata,
    draw_prompts,
    language_hash,
    to_text,
)
from jaxmem.errors import ConfigError


def edges_of(automata, one, node):
    """The edges of a node as a dict from symbol to target."""
    number = automata.degree[one, node]
    symbols, targets = automata.symbols[one, node], automata.targets[one, node]
    return dict(zip(symbols[:number].tolist(), targets[:number].tolist(), strict=True))


def bits(symbols):
    return sum(1 << symbol for symbol in symbols)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), max_nodes=st.integers(2, 12))
def test_automata_are_as_described(seed, max_nodes):
    automata = draw_automata(np.random.default_rng(seed), 12, max_nodes)
    assert len(automata) == 12
    sets = automata.legal()
    for one in range(12):
        nodes = automata.nodes[one]
        assert 2 <= nodes <= max_nodes
        for node in range(max_nodes):
            edges = edges_of(automata, one, node)
            assert sets[one, node] == bits(edges)
            if node >= nodes:
                assert not edges
                continue
            assert 1 <= len(edges) == automata.degree[one, node] <= min(MOST_EDGES, nodes)
            assert len(set(edges.values())) == len(edges)  # distinct targets
            assert all(0 <= symbol < SYMBOLS for symbol in edges)
            assert all(0 <= target < nodes for target in edges.values())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 90),
    least=st.integers(1, 4),
    more=st.integers(0, 3),
    max_length=st.integers(1, 9),
)
def test_prompts_are_walks_of_their_automaton(seed, length, least, more, max_length):
    rng = np.random.default_rng(seed)
    automata = draw_automata(rng, 6, 5)
    shape = PromptShape(min_strings=least, max_strings=least + more, max_length=max_length)
    prompts = draw_prompts(rng, automata, shape, length)
    assert prompts.tokens.shape == prompts.legal.shape == (6, length)
    for one in range(6):
        text, node, strings = to_text(prompts.tokens[one]), 0, 1
        body = text.rstrip(TEXT[PAD])
        assert TEXT[PAD] not in body
        for token, legal in zip(prompts.tokens[one], prompts.legal[one], strict=False):
            edges = edges_of(automata, one, node)
            assert legal == (0 if token == PAD else bits(edges))
            if token == SEPARATOR:
                node, strings = 0, strings + 1
            elif token != PAD:
                node = edges[token]  # KeyError: an illegal symbol
        assert all(1 <= len(part) <= max_length for part in body.split(TEXT[SEPARATOR])[:-1])
        if len(body) < length:  # not cut
            assert least <= strings <= least + more
        else:
            assert strings <= least + more


def test_every_choice_occurs_about_equally_often():
    rng = np.random.default_rng(0)
    automata = _draw(rng, 3000, 6)  # before those that accept the same strings are dropped
    assert np.allclose(np.bincount(automata.nodes)[2:] / 3000, 1 / 5, atol=0.03)
    large = automata.degree[:, 0][automata.nodes >= 4]
    assert np.allclose(np.bincount(large)[1:] / len(large), 1 / 4, atol=0.04)
    used = automata.symbols[:, 0, 0]
    assert np.allclose(np.bincount(used) / len(used), 1 / SYMBOLS, atol=0.02)
    targets = automata.targets[:, 0, 0][automata.nodes == 6]
    assert np.allclose(np.bincount(targets) / len(targets), 1 / 6, atol=0.06)
    shape = PromptShape(min_strings=1, max_strings=4, max_length=5)
    tokens = draw_prompts(rng, automata, shape, 30).tokens
    strings = (tokens == SEPARATOR).sum(1)
    assert np.allclose(np.bincount(strings) / 3000, 1 / 4, atol=0.03)
    lengths = [len(part) for row in tokens for part in to_text(row).rstrip(".").split("|")]
    assert np.allclose(np.bincount(lengths)[1:] / len(lengths), 1 / 5, atol=0.03)


def one_automaton(*nodes):
    """An automaton from one dict per node, symbol to target."""
    degree = np.array([[len(edges) for edges in nodes]])
    symbols, targets = np.zeros((2, 1, len(nodes), MOST_EDGES), np.int64)
    for node, edges in enumerate(nodes):
        symbols[0, node, : len(edges)] = list(edges)
        targets[0, node, : len(edges)] = list(edges.values())
    return Automata(np.array([len(nodes)]), degree, symbols, targets)


def test_hash_is_that_of_the_language():
    loop = one_automaton({3: 0, 5: 1}, {1: 0})
    renamed = one_automaton({5: 2, 3: 0}, {7: 1}, {1: 0})  # node 1 cannot be reached
    unrolled = one_automaton({3: 2, 5: 1}, {1: 2}, {3: 0, 5: 1})  # nodes 0 and 2 are alike
    late = one_automaton({3: 2, 5: 1}, {1: 2}, {3: 0, 6: 1})  # differs at the second symbol
    hashes = [int(language_hash(one, 6)[0]) for one in (loop, renamed, unrolled, late)]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_drawn_automata_differ_from_one_another_and_from_others():
    # 18 symbols, two nodes, one edge each: few enough for repetitions among independent draws.
    first = draw_automata(np.random.default_rng(1), 2000, 2)
    second = draw_automata(np.random.default_rng(2), 2000, 2, apart_from=first)
    hashes = np.concatenate([language_hash(first, 4), language_hash(second, 4)])
    assert len(np.unique(hashes)) == 4000
    again = draw_automata(np.random.default_rng(2), 2000, 2)
    assert np.isin(language_hash(again, 4), language_hash(first, 4)).any()


def test_impossible_wishes_are_refused():
    with pytest.raises(ConfigError, match="use 2 or more"):
        draw_automata(np.random.default_rng(0), 3, 1)
    for bad in ({"min_strings": 0}, {"min_strings": 5, "max_strings": 4}, {"max_length": 0}):
        with pytest.raises(ConfigError, match="do not exist"):
            PromptShape(**bad)


def test_equal_seeds_give_equal_data():
    drawn = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        automata = draw_automata(rng, 5, 4)
        drawn.append([*automata, *draw_prompts(rng, automata, PromptShape(), 40)])
    for a, b in zip(*drawn, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(TEXT) == VOCABULARY
