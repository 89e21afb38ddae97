"""Latent text-to-image diffusion that people train and own. `import ldm` loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline as LatentDiffusionPipeline

__version__ = "0.1.0"
__all__ = ["LatentDiffusionPipeline", "__version__"]

_LAZY = {"LatentDiffusionPipeline": "ldm.pipeline"}


def __getattr__(name: str) -> Any:
    """Import the public classes at first use (PEP 562)."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
