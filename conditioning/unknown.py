"""What says nothing: the class of a map's pixel and the label of a sample that are not known."""

from __future__ import annotations

UNKNOWN_CLASS = 255
"""The value of a semantic map's pixel that says nothing, a class of its own (DESIGN.md 3): there are 255 at most."""

UNKNOWN_LABEL = -1
"""The label of a sample that has none where others have, or lost it to dropout."""
