"""Text generation: stop strings, streaming pieces, empty and impossible prompts."""

import jax
import numpy as np
import pytest

from jaxmem.data.tokenizers import ByteTokenizer, CharTokenizer
from jaxmem.errors import ConfigError, DataError
from jaxmem.generate import text
from jaxmem.generate.beam import beam_search
from jaxmem.generate.sampling import Sampling
from jaxmem.generate.text import first_tokens, generate_text, prompt_tokens, search_text
from tests.unit.generate.stand_in import StandIn, StandInConfig

TOKENIZER = CharTokenizer("\nabcdefghi")
ARGS = {"max_new_tokens": 60, "sampling": Sampling(temperature=1.5), "key": jax.random.key(1)}


@pytest.fixture(scope="module")
def model():
    return StandIn(StandInConfig())


def pieces_and_texts(model, stop=()):
    pieces = {0: [], 1: [], 2: []}
    texts = generate_text(
        model,
        TOKENIZER,
        ["abc", "h", ""],
        stop=stop,
        on_text=lambda r, piece: pieces[r].append(piece),
        **ARGS,
    )
    assert ["".join(p) for p in pieces.values()] == texts
    return pieces, texts


def test_pieces_join_to_the_result_in_several_blocks(model):
    pieces, texts = pieces_and_texts(model)
    assert [len(t) for t in texts] == [60] * 3
    assert all(len(p) > 1 for p in pieces.values())


def test_stop_strings_cut_at_the_earliest(model):
    _, free = pieces_and_texts(model)
    stop = [free[0][20:23], free[1][7:9]]
    _, texts = pieces_and_texts(model, stop)
    for before, after in zip(free, texts, strict=True):
        places = [before.find(s) for s in stop if s in before]
        assert after == before[: min(places, default=60)]
    assert len(texts[1]) <= 7


def test_empty_prompt_starts_from_a_newline(model):
    texts = generate_text(model, TOKENIZER, ["\n", ""], **{**ARGS, "sampling": Sampling(top_k=1)})
    assert texts[0] == texts[1]


def test_empty_prompt_prefers_end_of_text():
    class WithEnd(ByteTokenizer):
        end_of_text = 7

    assert first_tokens(WithEnd()).tolist() == [7]
    assert first_tokens(ByteTokenizer()).tolist() == [10]


def test_prompts_begin_as_the_texts_of_training_did(model):
    class WithBegin(CharTokenizer):
        begin_of_text = 4

    tokenizer = WithBegin("\nabcdefghi")
    assert prompt_tokens(tokenizer, "ab").tolist() == [1, 2]
    assert prompt_tokens(tokenizer, "ab", begin_of_text=True).tolist() == [4, 1, 2]
    assert prompt_tokens(tokenizer, "", begin_of_text=True).tolist() == [4]
    texts = generate_text(model, tokenizer, ["ab", "dab"], begin_of_text=True, **ARGS)
    same = generate_text(model, TOKENIZER, ["dab", "ddab"], **ARGS)
    assert texts == same  # the token 4 is the letter d
    kwargs = {"beams": 2, "max_new_tokens": 5}
    found = search_text(model, tokenizer, "ab", begin_of_text=True, **kwargs)
    assert found == search_text(model, TOKENIZER, "dab", **kwargs)


def test_empty_prompt_without_a_start_is_explained():
    with pytest.raises(DataError, match=r"neither\. Give a prompt"):
        first_tokens(CharTokenizer("abc"))


def test_end_of_text_ends_a_row(model):
    class WithEnd(CharTokenizer):
        end_of_text = 3

    texts = generate_text(model, WithEnd("\nabcdefghi"), ["abc"], **ARGS)
    free = generate_text(model, TOKENIZER, ["abc"], **ARGS)
    assert "c" in free[0]
    assert texts[0] == free[0].partition("c")[0]


def test_unknown_characters_are_named(model):
    with pytest.raises(DataError, match="'Z'"):
        generate_text(model, TOKENIZER, ["abZ"], **ARGS)


def test_halves_of_a_character_and_of_a_stop_string_are_held_back():
    tokenizer = ByteTokenizer()
    row = text._Row(tokenizer.decode, ["END"])
    euro = tokenizer.encode("a€")
    assert row.add(euro[:2]) == "a"
    assert row.add(euro[2:]) == "€"
    assert row.add(tokenizer.encode("b E")) == "b "
    assert row.add(tokenizer.encode("N")) == ""
    assert row.add(tokenizer.encode("N")) == "ENN"
    assert row.add(tokenizer.encode("!ENDx")) == "!"
    assert row.finished
    assert row.add(tokenizer.encode("more")) == ""
    assert row.close() == ""
    assert row.text == "a€b ENN!"


def test_what_is_held_back_is_shown_at_the_end():
    row = text._Row(ByteTokenizer().decode, ["END"])
    assert row.add(np.array([69, 78])) == ""
    assert row.close() == "EN"


def test_search_decodes_the_best_hypotheses_and_ends_at_strings_of_one_token(model):
    prompt = TOKENIZER.encode("ab")
    kwargs = {"beams": 3, "max_new_tokens": 10, "length_power": 1.0}
    found = search_text(model, TOKENIZER, "ab", **kwargs)
    wanted = beam_search(model, prompt, num_tokens=10, **kwargs)
    assert found == [TOKENIZER.decode(h.tokens) for h in wanted]
    assert len(found) == 3
    stop = found[0][4]
    cut = search_text(model, TOKENIZER, "ab", stop=[stop, ""], **kwargs)
    assert all(stop not in text for text in cut)
    wanted = beam_search(model, prompt, num_tokens=10, stop_tokens=TOKENIZER.encode(stop), **kwargs)
    assert cut == [TOKENIZER.decode(h.tokens) for h in wanted]
    with pytest.raises(ConfigError, match=r"'bc' takes 2 tokens.*one token only"):
        search_text(model, TOKENIZER, "ab", stop=["bc"], **kwargs)


def test_search_ends_at_the_end_of_text(model):
    class WithEnd(CharTokenizer):
        end_of_text = 3

    tokenizer = WithEnd("\nabcdefghi")
    kwargs = {"beams": 4, "max_new_tokens": 6}
    found = search_text(model, tokenizer, "", **kwargs)
    wanted = beam_search(model, [3], num_tokens=10, stop_tokens=[3], **kwargs)
    assert found == [tokenizer.decode(h.tokens) for h in wanted]
    assert any(h.stopped for h in wanted)
