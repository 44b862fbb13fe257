"""The per-user cache folder, and the compiled programs kept there for a quick second start."""

import os
from pathlib import Path

MIN_COMPILE_SECONDS = 0.5
"""Programs that compile faster than this are not worth a file."""


def cache_dir() -> Path:
    """Return the per-user cache folder; nothing is created.

    It is $JAXMEM_CACHE, else $XDG_CACHE_HOME/jaxmem, else ~/.cache/jaxmem.
    """
    if chosen := os.environ.get("JAXMEM_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jaxmem"


def enable_compilation_cache() -> Path | None:
    """Turn on JAX's persistent compilation cache and return its folder.

    JAX_COMPILATION_CACHE_DIR, or a folder set in `jax.config` before, is left alone. A cache folder
    that cannot be written only costs compile time, so it is not an error: None is returned.
    """
    import jax

    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen:
        return Path(chosen)
    folder = cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder
