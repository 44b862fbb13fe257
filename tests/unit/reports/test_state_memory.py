"""The size of states: what layers would allocate against the published formulas."""

import pytest

from benchmarks.state_memory import Size, crossover, formula, layers, plot, size, table
from jaxmem.interop.attention_types import from_name


@pytest.mark.parametrize("width", [2, 6, 16, 64])
@pytest.mark.parametrize("heads", [1, 3])
def test_numbers_per_head_are_those_of_the_formulas(width: int, heads: int):
    order_1, order_2, cache = (size(config, heads * width) for config in layers(heads).values())
    d = width
    # The convolution of 2 tokens keeps one query, key and value.
    assert order_1 == Size(heads * (d * d + d + 3 * d), 0)
    assert order_2 == Size(heads * (d * (d + 1) // 2 * (d + 1) + 3 * d), 0)
    assert 2 * order_2.fixed == heads * (d * (d + 1) ** 2 + 6 * d)
    assert cache == Size(0, heads * 2 * d)
    assert crossover(order_2, cache) == formula(d)


def test_parts_of_the_state_are_there_only_if_needed():
    d, heads = 16, 2

    def numbers(name: str, **fields: object) -> Size:
        return size(from_name(name, num_heads=heads, **fields), heads * d)

    assert numbers("2mamba", conv=4).fixed - numbers("2mamba").fixed == heads * 2 * 3 * d
    assert numbers("2mamba", conv=0).fixed == heads * (136 * d + 136)
    # An output norm needs no denominator.
    assert numbers("mamba2s").fixed == heads * (d * d + 3 * d)
    # Without a state of fixed size: a cache, a decay per token, and the convolution.
    assert numbers("2mamba_e") == Size(heads * 3 * d, heads * (2 * d + 1))


def test_published_numbers():
    assert formula(64) == 1057.75
    assert [round(formula(d)) for d in (16, 32, 128)] == [74, 274, 4162]
    sizes = {name: size(config, 24 * 64) for name, config in layers(24).items()}
    assert [s.at(8191) for s in sizes.values()] == [104_448, 3_249_408, 8191 * 3072]
    text = table(sizes, (1057, 1058))
    assert "| 1,058 | 104,448 | 3,249,408 | 3,250,176 |" in text
    assert "| growth per token | 0 | 0 | 3,072 |" in text


def test_the_figure_is_drawn(tmp_path):
    path = tmp_path / "memory.png"
    plot({"a": Size(100, 0), "b": Size(0, 2)}, 50.0, path)
    assert path.read_bytes().startswith(b"\x89PNG")
