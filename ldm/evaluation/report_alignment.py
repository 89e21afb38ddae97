"""The report's part on pictures and their prompts: CLIP score, the whole set's and each prompt's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from PIL import Image
from torch import Tensor

from ldm.evaluation.alignment import Alignment, JointModel, PromptScore, clip_score
from ldm.evaluation.page import Shown, details, gallery, note, paragraph, table
from ldm.evaluation.page_text import Html
from ldm.evaluation.report import Section, figures_table, interval_text

EXTREMES = 6
"""Pictures shown of the worst and of the best prompts."""
MOST_ROWS = 500
"""Prompts in the page's table; metrics.json has all."""


def alignment_section(
    model: JointModel,
    images: Iterable[Tensor],
    prompts: Sequence[str],
    picture: Callable[[int], Image.Image],
    seed: int,
) -> Section:
    """The CLIP score of `images` with their `prompts`; `picture` gives the picture of a number. Raises `UserError`."""
    found = clip_score(model, images, prompts, seed=seed)
    figure = found.measurement
    worst, best = found.prompts[:EXTREMES], found.prompts[::-1][:EXTREMES]
    content = [
        figures_table([figure]),
        paragraph("The prompts with the lowest score:"),
        gallery([_shown(row, prompts, picture) for row in worst]),
        paragraph("and with the highest:"),
        gallery([_shown(row, prompts, picture) for row in best]),
        _every_prompt(found),
        note(
            "100 x the cosine of picture and prompt in the CLIP model's space. It counts words more than their order: "
            "a scene with left and right exchanged scores nearly the same."
        ),
    ]
    rows = [{"prompt": row.prompt, "clip_score": row.score, "pictures": row.pictures} for row in found.prompts]
    return Section(
        name="alignment",
        title="Pictures and prompts",
        content=Html("".join(content)),
        figures=(figure,),
        values={"prompts": rows},
        verdict=f"CLIP score {interval_text(figure)} ({figure.setting.extractor}, n = {figure.setting.n})",
    )


def _every_prompt(found: Alignment) -> Html:
    rows = [(row.prompt, f"{row.score:.2f}", row.pictures) for row in found.prompts[:MOST_ROWS]]
    summary = f"Every prompt, the worst first ({len(rows)} of {len(found.prompts)})"
    return details(summary, table(("prompt", "CLIP score", "pictures"), rows, numbers=(1, 2)))


def _shown(row: PromptScore, prompts: Sequence[str], picture: Callable[[int], Image.Image]) -> Shown:
    return Shown(picture(list(prompts).index(row.prompt)), f"{row.score:.1f}: {row.prompt}")
