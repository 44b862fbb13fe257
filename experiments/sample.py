"""Sample from a run: `python -m experiments.sample --run runs/mm_tiny --prompt "To be"`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from experiments import cli

if TYPE_CHECKING:
    from jaxmem.generate.sampling import Sampling
    from jaxmem.training.model import LoadedRun

PROG = "python -m experiments.sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Continue texts. One text is shown as it comes; several are shown when all are done."""

    run: Path
    """Folder of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times. None, or an empty one, starts from the
    end-of-text token if the vocabulary has one, else from a newline."""
    prompt_file: Path | None = None
    """File with one prompt per line, besides those of --prompt."""
    num_samples: int = 1
    """Texts per prompt."""
    max_new_tokens: int = 200
    """Tokens to add to each prompt at most."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 is wilder, 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Choose among tokens at least this fraction as likely as the likeliest."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End a text before this string; may be given several times."""
    beams: int = 0
    """Search for the likeliest texts with so many beams instead of drawing; --num-samples says
    how many of them are shown. Temperature, filters and seed then have no meaning."""
    length_power: float = 0.0
    """What --beams ranks by is log-probability / length^this: 0 favours short texts, 1 is fair."""
    seed: int = 0
    """The same seed, prompts and run give the same texts."""
    context_len: int = 0
    """Tokens that a row's state may hold before the row starts anew from its last half; 0: as in
    training. States of constant size take any number in the same memory."""
    which: Literal["best", "last"] = "best"
    """The checkpoint of the lowest validation loss, or the newest one."""


def main(args: list[str]) -> int:
    """Print continuations."""
    options = cli.parse(SampleOptions, args, prog=PROG, description=SampleOptions.__doc__)
    from jaxmem.errors import ConfigError

    if options.num_samples < 1:
        raise ConfigError(f"--num-samples {options.num_samples} is not positive. Use 1 or more.")
    if options.beams and options.beams < options.num_samples:
        raise ConfigError(
            f"--beams {options.beams} cannot find --num-samples {options.num_samples} texts. "
            "Use as many beams as samples or more, or 0 to draw."
        )
    prompts = _prompts(options)
    from jaxmem.generate.sampling import Sampling
    from jaxmem.training.model import load_run

    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )
    run = load_run(options.run, checkpoint=options.which)
    for prompt in prompts:
        run.tokenizer.encode(prompt)  # an impossible one is refused before anything is shown
    if options.context_len:
        from jaxmem.generate.prefill import with_context

        run = run._replace(model=with_context(run.model, options.context_len))
    if options.beams:
        _search(options, run, prompts)
    else:
        _draw(options, run, prompts, sampling)
    return 0


def _draw(
    options: SampleOptions, run: "LoadedRun", prompts: list[str], sampling: "Sampling"
) -> None:
    """Print random continuations; a single one as it comes."""
    import jax

    from jaxmem.generate.text import generate_text

    rows = [prompt for prompt in prompts for _ in range(options.num_samples)]
    alone = len(rows) == 1
    if alone:
        print(rows[0], end="", flush=True)
    texts = generate_text(
        run.model,
        run.tokenizer,
        rows,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        key=jax.random.key(options.seed),
        begin_of_text=run.config.data.begin_of_text,
        stop=options.stop,
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if alone else None,
    )
    if alone:
        print()
        return
    for number, (prompt, text) in enumerate(zip(rows, texts, strict=True)):
        which, sample = divmod(number, options.num_samples)
        print(f"--- prompt {which + 1}, sample {sample + 1} ---\n{prompt}{text}\n")


def _search(options: SampleOptions, run: "LoadedRun", prompts: list[str]) -> None:
    """Print the likeliest continuations of each prompt, best first."""
    from jaxmem.generate.text import search_text

    for which, prompt in enumerate(prompts):
        texts = search_text(
            run.model,
            run.tokenizer,
            prompt,
            beams=options.beams,
            max_new_tokens=options.max_new_tokens,
            length_power=options.length_power,
            begin_of_text=run.config.data.begin_of_text,
            stop=options.stop,
        )
        for place, text in enumerate(texts[: options.num_samples]):
            head = f"--- prompt {which + 1}, place {place + 1} ---\n"
            alone = len(prompts) == options.num_samples == 1
            print(f"{prompt}{text}" if alone else f"{head}{prompt}{text}\n", flush=True)


def _prompts(options: SampleOptions) -> list[str]:
    """Collect the prompts of both flags; one empty prompt if there are none.

    Raises:
      ConfigError: the file is missing or not UTF-8.
    """
    from jaxmem.errors import ConfigError

    prompts = list(options.prompt)
    if options.prompt_file is not None:
        try:
            prompts += options.prompt_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompt-file {options.prompt_file} cannot be read: {error}. "
                "Give a UTF-8 text with one prompt per line."
            ) from error
    return prompts or [""]


if __name__ == "__main__":
    cli.run(main)
