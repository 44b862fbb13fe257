"""The mixer in CONTRIBUTING.md works as printed, in a decoder of a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TRY = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import jaxmem.mixers
jaxmem.mixers.__path__.append(sys.argv[1])
from jaxmem.backbones.decoder import Decoder, DecoderConfig
from jaxmem.mixers.base import config_class, names

assert "decaying_sum" in names()
config = DecoderConfig(
    vocab_size=7, dim=32, depth=1,
    mixer=config_class("decaying_sum")(), feed_forward=config_class("mlp")(),
)
model = Decoder(config, rngs=nnx.Rngs(0))
graph, params = nnx.split(model)

@jax.jit
def run(params, tokens):
    model = nnx.merge(graph, params)
    step = lambda state, token: model.step(token, state)[1::-1]
    _, stepped = jax.lax.scan(step, model.init_state(1), tokens.T)
    return model(tokens).logits, jnp.moveaxis(stepped, 1, 0)

whole, stepped = run(params, jnp.arange(5)[None])
np.testing.assert_allclose(stepped, whole, atol=1e-5)
assert np.std(whole) > 1e-3
"""


def test_the_worked_example(tmp_path: Path):
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (code,) = (block for block in blocks if "decaying_sum" in block)
    (tmp_path / "decaying_sum.py").write_text(code, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
