"""Set the platform up before JAX is imported, and check every annotated shape."""

import gc
import os
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight fake devices for the sharding tests. Compilation is the cost of this suite, and level 0
# halves it; nothing here is a timing.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # A third less to compile; newer versions do not know the flag. The golden check, and all
        # tests on the newest JAX, run the usual emitters.
        "--xla_cpu_use_fusion_emitters=false" * metadata.version("jax").startswith("0.10."),
    ]
)

import jax
import pytest
from jaxtyping import install_import_hook

pytest_plugins = ["tests.helpers.budget"]

# Tracing makes many small objects. To look for garbage after every 700 of them, as Python does, is
# a twelfth of the time of a test.
gc.set_threshold(20_000, 50, 50)

jax.config.update("jax_default_matmul_precision", "highest")
install_import_hook(
    ["jaxmem.ops", "jaxmem.nn", "jaxmem.mixers", "jaxmem.backbones"], "beartype.beartype"
)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Leave the user's cache of compiled programs alone; all workers of a session share one."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["JAXMEM_CACHE"] = str(folder / "cache")
