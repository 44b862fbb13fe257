"""What a finished run leaves besides its numbers: plots/loss.png, samples.txt and run.md."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxmem.backbones.decoder import Decoder
from jaxmem.data.tokenizers import Tokenizer
from jaxmem.errors import DataError
from jaxmem.generate.engine import LanguageModel
from jaxmem.generate.sampling import Sampling
from jaxmem.generate.text import first_tokens, generate_text
from jaxmem.reports.card import run_card
from jaxmem.reports.plots import loss_plot
from jaxmem.reports.runs import read_environment, read_metrics
from jaxmem.training.config import RunConfig
from jaxmem.training.disk import disk_errors, write_atomically
from jaxmem.training.state import stream_key

SAMPLING = Sampling(temperature=0.8)
"""How the texts at the end of a run are drawn."""
FILES = ("plots/loss.png", "samples.txt", "run.md")


def make_products(
    config: RunConfig,
    preset: RunConfig | None,
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    command: str,
) -> list[str]:
    """Write the plot, the samples and the run card into the run's folder.

    Call it on every process; the first one writes. The texts depend on `run.seed` and the
    parameters only.

    Args:
      config: of the run.
      preset: what it was made from.
      model: with the final parameters, however they are placed.
      tokenizer: of the run.
      command: the command line, for the card.

    Returns:
      The sampled texts; empty on all processes but the first.
    """
    graphdef, params = nnx.split(model)
    # On the host, so that sampling runs on one device and needs no other process.
    params = jax.tree.map(_to_host, params)
    if jax.process_index():
        return []
    model = nnx.merge(graphdef, params)
    folder = config.run.folder
    rows = read_metrics(folder)
    texts = sample_texts(config, model, tokenizer)
    with disk_errors(folder):
        loss_plot(rows, folder / "plots" / "loss.png", title=config.run.name or folder.name)
    write_atomically(folder / "samples.txt", _numbered(texts))
    card = run_card(
        config,
        preset,
        command=command,
        environment=read_environment(folder),
        rows=rows,
        model=model,
    )
    write_atomically(folder / "run.md", card)
    return texts


def missing_products(folder: Path) -> bool:
    """Say whether a kill came between the last update and the files of `make_products`."""
    return not all((folder / name).is_file() for name in FILES)


def sample_texts(config: RunConfig, model: LanguageModel, tokenizer: Tokenizer) -> list[str]:
    """Draw `run.samples` texts from an empty prompt, by the seed's own stream."""
    if not (config.run.samples and config.run.sample_tokens):
        return []
    return generate_text(
        model,
        tokenizer,
        [_start(tokenizer)] * config.run.samples,
        max_new_tokens=config.run.sample_tokens,
        sampling=SAMPLING,
        key=stream_key(config.run.seed, "sample"),
    )


def _start(tokenizer: Tokenizer) -> str:
    """Return the empty prompt, or the first token's text where an empty one is not possible."""
    try:
        first_tokens(tokenizer)
    except DataError:
        return tokenizer.decode([0])
    return ""


def _numbered(texts: list[str]) -> str:
    return "".join(f"--- sample {n} ---\n{text}\n\n" for n, text in enumerate(texts, start=1))


def _to_host(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
