"""What DataConfig accepts, and what importing it costs."""

import subprocess
import sys

import pytest

from jaxmem.data.config import DataConfig
from jaxmem.errors import ConfigError, UnknownName


@pytest.mark.parametrize("source", ["auto", "stories", "jsonl", "tokens", "tfds:tiny_shakespeare"])
def test_sources_need_no_path_yet(source):
    assert DataConfig(source=source).source == source


def test_misspelt_source_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean corpus"):
        DataConfig(source="corpsu")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source": "corpus", "path": "a.txt"}, "takes no path"),
        ({"source": "stories", "path": "a.txt"}, "takes no path"),
        ({"source": "tfds:"}, "tfds:tiny_shakespeare"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"validation_share": 1.0}, r"validation_share=1\.0.*0\.001"),
        ({"begin_of_text": True}, r"sampling=windows.*--data\.sampling documents"),
    ],
)
def test_impossible_settings(fields, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**fields)


def test_importing_the_pipeline_loads_no_heavy_package():
    code = (
        "import sys, jaxmem.data.pipeline; "
        "heavy = ('jax', 'grain', 'tensorflow_datasets', 'tokenizers', 'tensorflow', 'pyarrow'); "
        "print([m for m in heavy "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
