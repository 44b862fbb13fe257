"""The made-up stories: what they hold, and that they never change."""

import hashlib
import re

from jaxmem.data.config import DataConfig
from jaxmem.data.pipeline import load_corpus
from jaxmem.data.stories import made_up_stories

NAME = "[bdfgklmnprstvz][aeiou][bdfgklmnprstvz][aeiou]"
SENTENCE = re.compile(rf"({NAME}) (?:(?:hid|ran|sat)|(?:fed|hit|led|met|saw) ({NAME}))\.")


def test_every_story_is_about_two_names_of_its_own():
    stories = made_up_stories(count=500)
    pairs = set()
    for story in stories:
        sentences = SENTENCE.findall(story)
        assert 6 <= len(sentences) <= 9
        assert " ".join(m.group() for m in SENTENCE.finditer(story)) == story
        names = {name for sentence in sentences for name in sentence if name}
        assert len(names) <= 2
        assert all(subject != other for subject, other in sentences)
        pairs.add(frozenset(names))
    assert len(pairs) > 495


def test_stories_never_change_and_depend_on_the_seed():
    text = "\n".join(made_up_stories(count=200))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c89723141e3a2e15"
    assert made_up_stories(count=3, seed=1) != made_up_stories(count=3)
    assert made_up_stories(count=3) == made_up_stories(count=5)[:3]


def test_source_splits_them_and_says_what_they_are():
    corpus = load_corpus(DataConfig(source="stories"))
    assert corpus.tokenizer.vocab_size == 24
    assert corpus.description.startswith("20,000 made-up stories; split by characters")
    assert len(corpus.documents("train")) > 17_900
    assert 190_000 < len(corpus.tokens("validation")) < 230_000
    assert corpus.tokenizer.decode(corpus.documents("train")[0]) == f"{made_up_stories(1)[0]}\n"
