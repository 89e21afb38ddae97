"""What the captions must have for fine-tuning on a few images to teach anything."""

from __future__ import annotations

from ldm.data.sample import BadSample, Source
from ldm.errors import UserError
from ldm.training.stage2_config import Stage2Config

_MOST = 1000
"""Samples whose captions are read at most."""


def check_captions(source: Source, config: Stage2Config) -> None:
    """Raise `UserError` for data in which nothing names what is to be learned.

    With `textual_inversion` that is its word, with `prior` any caption at all.
    """
    if config.textual_inversion is None and config.prior is None:
        return
    captions = [text for index in range(min(len(source), _MOST)) for text in _captions(source, index)]
    cure = "write it into metadata.jsonl, or into a .txt file beside each image"
    if config.prior is not None and not any(captions):
        raise UserError(
            "data: found no captions; with prior, allowed is one for each image that tells it from its class, "
            f"such as a photo of a zwx dog; {cure}"
        )
    if config.textual_inversion is not None:
        token = config.textual_inversion.token
        if not any(token in caption.lower() for caption in captions):
            raise UserError(
                f"textual_inversion.token: found {token} in none of the captions; "
                f"allowed is a caption with it for each image, such as a picture of {token}; {cure}"
            )


def _captions(source: Source, index: int) -> tuple[str, ...]:
    try:
        return source.read(index, with_image=False).captions
    except BadSample:
        return ()
