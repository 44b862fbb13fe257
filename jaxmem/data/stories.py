"""Very short stories about made-up names, written by a program: text whose names must be recalled.

Every story has two names of its own, which no other part of the text foretells. After its first
letters, a name can only be continued by a look at where it stood before, so the loss tells how well
a model remembers; the rest is a handful of words.
"""

import random

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_ALONE, _TO_ANOTHER = ("hid", "ran", "sat"), ("fed", "hit", "led", "met", "saw")


def made_up_stories(count: int = 20_000, seed: int = 0) -> list[str]:
    """Return stories of six to nine sentences each, such as "bipo met zovo. zovo hid. ...".

    Args:
      count: number of stories; 20,000 have about 2 million characters.
      seed: another seed, other stories.
    """
    # Of Python's random numbers, only `random()` is promised to be the same in every version.
    draw = random.Random(seed).random

    def pick(options: tuple[str, ...] | str) -> str:
        return options[int(draw() * len(options))]

    def name() -> str:
        return "".join(pick(letters) for letters in (_CONSONANTS, _VOWELS) * 2)

    def sentence(names: tuple[str, str]) -> str:
        first = int(draw() * 2)
        verb = pick(_ALONE + _TO_ANOTHER)
        whom = f" {names[1 - first]}" if verb in _TO_ANOTHER else ""
        return f"{names[first]} {verb}{whom}."

    def story() -> str:
        names = (name(), name())
        return " ".join(sentence(names) for _ in range(6 + int(draw() * 4)))

    return [story() for _ in range(count)]
