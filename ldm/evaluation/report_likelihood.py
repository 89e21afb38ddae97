"""The report's part on likelihood: bits per dimension, and where along the noise they are lost."""

from __future__ import annotations

from collections.abc import Iterable

from ldm.data.sample import Batch
from ldm.evaluation.likelihood import VariationalBound
from ldm.evaluation.measurement import Measurement, Setting
from ldm.evaluation.model_likelihood import Likelihood, measure_likelihood
from ldm.evaluation.page import note, paragraph, plots, table
from ldm.evaluation.page_text import Html
from ldm.evaluation.plots import Series, line_plot
from ldm.evaluation.report import Section, figures_table
from ldm.pipeline_model import LatentDiffusionModel


def likelihood_section(
    model: LatentDiffusionModel, batches: Iterable[Batch], name: str, resolution: int, seed: int
) -> Section:
    """The bound of the images in `batches`, which readers call `name`. Raises `UserError` for flow models."""
    return section_of(measure_likelihood(model, batches, seed=seed), name, resolution)


def section_of(found: Likelihood, name: str, resolution: int) -> Section:
    """The tightest bound, its terms, and the autoencoder's share."""
    tightest = found.bounds[0]
    setting = Setting(
        n=tightest.n, resolution=resolution, extractor="the model itself", resize_filter="none", reference=name
    )
    label = f"bits per latent dimension (variances: {tightest.variance})"
    figures = [Measurement("bits_per_latent", label, "lower", tightest.total, setting)]
    rows = [
        (
            bound.variance,
            f"{bound.total.value:.4g}",
            f"{bound.prior:.3g}",
            f"{_steps(bound):.4g}",
            f"{bound.decoder:.4g}",
        )
        for bound in found.bounds
    ]
    heads = ("variances", "bits per latent dimension", "L_T", "sum of L_t", "L_0")
    content = [
        *(paragraph(line) for line in found.lines()),
        figures_table(figures),
        table(heads, rows, numbers=(1, 2, 3, 4)),
        plots(_terms_plot(tightest)),
        note(
            "An upper bound on -log2 of the density of an image's latents (DDPM, eq. 5). Lower is better. Figures are "
            "comparable only between models of one autoencoder; of the pixels' bits the autoencoder's share is told "
            "apart. It says how well a model knows the data, not how good its pictures look."
        ),
    ]
    return Section(
        name="likelihood",
        title="Likelihood",
        content=Html("".join(content)),
        figures=tuple(figures),
        values=_values(found),
        verdict=found.lines()[-1] if found.share is not None else found.lines()[0],
    )


def _terms_plot(bound: VariationalBound) -> Html:
    middles = [(term.first + term.last) / 2 for term in bound.terms]
    bits = [term.bits for term in bound.terms]
    reach = [1.96 * term.error for term in bound.terms]
    series = Series(
        label="L_t, mean of a stratum",
        x=middles,
        y=bits,
        low=[value - r for value, r in zip(bits, reach, strict=True)],
        high=[value + r for value, r in zip(bits, reach, strict=True)],
        dots=True,
    )
    title, y_label = "Where the bits are: one term of the bound", "bits per dimension"
    return line_plot([series], title=title, x_label="timestep (0 = clean)", y_label=y_label, log_y=True)


def _steps(bound: VariationalBound) -> float:
    return sum(term.total for term in bound.terms)


def _values(found: Likelihood) -> dict[str, object]:
    bounds = [
        {
            "variance": bound.variance,
            "total": bound.total.value,
            "prior": bound.prior,
            "steps": _steps(bound),
            "decoder": bound.decoder,
            "terms": [[term.first, term.last, term.bits, term.error] for term in bound.terms],
        }
        for bound in found.bounds
    ]
    share = found.share
    told = None if share is None else {"total": share.total, "rate": share.rate, "distortion": share.distortion}
    return {"bounds": bounds, "bits_per_pixel": told}
