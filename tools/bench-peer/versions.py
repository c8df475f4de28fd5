"""The peer's versions."""

import platform
from importlib import metadata


def here():
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("torch", "diffusers", "transformers")
    }
