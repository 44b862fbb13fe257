"""TFDS sets by name, without TensorFlow and without network."""

import sys

import pytest
import tensorflow_datasets as tfds

from jaxmem.data.config import DataConfig
from jaxmem.data.pipeline import load_corpus
from jaxmem.data.shards import HoldOut
from jaxmem.data.sources import load_source
from jaxmem.errors import DataError


def prepare(data_dir, splits, *, features=("text",)):
    """Write a TFDS set that only its files know of: its builder is not registered."""

    class Letters(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Made for one test."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            texts = {feature: tfds.features.Text() for feature in features}
            return tfds.core.DatasetInfo(
                builder=self,
                description="letters",
                features=tfds.features.FeaturesDict(texts),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(texts) for split, texts in splits.items()}

        def _generate_examples(self, texts):
            for index, text in enumerate(texts):
                yield index, dict.fromkeys(features, text)

    Letters(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_set_with_its_own_splits(tmp_path):
    prepare(tmp_path, {"train": ["abé", "d\n"], "validation": ["ee"], "test": ["z"]})
    corpus = load_corpus(DataConfig(source="tfds:letters", path=str(tmp_path)))
    assert corpus.name == "letters"
    assert corpus.tokenizer.characters == "\nabdeé"  # the test split is not read
    assert corpus.tokenizer.decode(corpus.tokens("train")) == "abé\nd\n"
    assert corpus.tokenizer.decode(corpus.tokens("validation")) == "ee\n"
    assert [len(ids) for ids in corpus.documents("train")] == [4, 2]
    assert "its own splits" in corpus.description
    assert "tensorflow" not in sys.modules


def test_set_without_validation_is_split_by_characters(tmp_path, monkeypatch):
    prepare(tmp_path, {"train": ["abcdefghij"] * 2})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    corpus = load_corpus(DataConfig(source="tfds:letters"))
    assert corpus.tokenizer.decode(corpus.tokens("validation")) == "ij\n"
    assert "no validation split" in corpus.description


def test_the_only_text_feature_is_taken(tmp_path):
    prepare(tmp_path, {"train": ["a" * 30]}, features=("review",))
    source = load_source(DataConfig(source="tfds:letters", path=str(tmp_path)))
    assert source.splits["validation"] == ["aaa"]


def test_one_of_several_text_features_is_named(tmp_path):
    prepare(tmp_path, {"train": ["a" * 30]}, features=("question", "answer"))
    fields = {"source": "tfds:letters", "path": str(tmp_path)}
    source = load_source(DataConfig(**fields, field="answer"))
    assert source.splits["validation"] == ["aaa"]
    with pytest.raises(DataError, match=r"expected one named reply\. Name one by --data\.field"):
        load_source(DataConfig(**fields, field="reply"))


def test_documents_are_held_out_by_hash(tmp_path):
    texts = [f"text {number}" for number in range(40)]
    prepare(tmp_path, {"train": texts})
    fields = {"source": "tfds:letters", "path": str(tmp_path), "validation_share": 0.2}
    splits = load_source(DataConfig(**fields)).splits
    assert splits["validation"] == [t for t in texts if HoldOut(0.2, 123).takes(t)]
    assert sorted((*splits["train"], *splits["validation"])) == sorted(texts)


@pytest.mark.parametrize(
    ("split", "features", "words"),
    [
        ("train", ("question", "answer"), "text features answer, question"),
        ("test", ("text",), "splits test; expected train"),
    ],
)
def test_unusable_sets(tmp_path, split, features, words):
    prepare(tmp_path, {split: ["abc"]}, features=features)
    with pytest.raises(DataError, match=words):
        load_source(DataConfig(source="tfds:letters", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lettres", "knows no set 'lettres'"),
        ("tiny_shakespear", "Did you mean tiny_shakespeare"),
        ("mnist/colour", "TFDS cannot build 'mnist/colour'"),
        ("mnist", r"text features \(none\)"),
    ],
)
def test_unusable_names(tmp_path, name, words):
    with pytest.raises(DataError, match=words):
        load_source(DataConfig(source=f"tfds:{name}", path=str(tmp_path)))


def test_set_without_random_access(tmp_path):
    prepare(tmp_path, {"train": ["abc"]})
    folder = tmp_path / "letters" / "1.0.0"
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for records in folder.glob("*.array_record-*"):
        records.rename(folder / records.name.replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="file_format='array_record'"):
        load_source(DataConfig(source="tfds:letters", path=str(tmp_path)))


def test_tiny_shakespeare_is_prepared_without_tensorflow(tmp_path, monkeypatch, caplog):
    letters = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    text = (letters * 20_000)[:1_115_394]
    (tmp_path / "input.txt").write_text(text, newline="")
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download", lambda self, url: tmp_path / "input.txt"
    )
    config = DataConfig(source="tfds:tiny_shakespeare", path=str(tmp_path / "data"))
    corpus = load_corpus(config)
    assert corpus.tokenizer.vocab_size == 65
    # TFDS gives 90/5/5; its validation is the first half of the last tenth.
    assert len(corpus.tokens("train")) == 1_003_854
    assert len(corpus.tokens("validation")) == 55_770
    assert corpus.tokenizer.decode(corpus.tokens("train")[-70:]) == text[1_003_784:1_003_854]
    assert "tensorflow" not in sys.modules
    assert not caplog.records


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def offline(self, url):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.download.DownloadManager, "download", offline)
    with pytest.raises(DataError, match=r"ConnectionError: no route to host.*--data\.path"):
        load_source(DataConfig(source="tfds:tiny_shakespeare", path=str(tmp_path)))
