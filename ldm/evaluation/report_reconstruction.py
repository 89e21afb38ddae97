"""The report's part on the autoencoder: what it keeps, what its latents look like, and where it fails worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from autoencoder.losses import AutoencoderLossConfig, build_lpips, lpips_distance
from autoencoder.model import Autoencoder
from ldm.data.fixed_batches import fixed_images
from ldm.data.sample import Source
from ldm.errors import UserError, user_input
from ldm.evaluation.autoencoder_report import AutoencoderReport, Lpips, WorstImage, measure_autoencoder
from ldm.evaluation.features import FeatureExtractor
from ldm.evaluation.measurement import Measurement
from ldm.evaluation.page import Shown, gallery, missing, note, paragraph, plots, table
from ldm.evaluation.page_charts import Bar, bar_chart
from ldm.evaluation.page_text import EMPTY, Html
from ldm.evaluation.plots import Series, line_plot
from ldm.evaluation.report import Section, figures_table, interval_text
from ldm.evaluation.report_copying import through_autoencoder
from ldm.evaluation.report_data import ReportData
from ldm.picture import to_pil

PAIRS = 12
"""Images on the page beside their reconstructions, besides the worst."""
BATCH = 32
OWN = "autoencoder latents"
NO_RFID = (
    "found no extractor but the autoencoder itself, which cannot see what it loses; put inception's or a CLIP model's "
    "weights into any folder and name them: --extractor inception=FILE"
)


def reconstruction_section(
    autoencoder: Autoencoder,
    data: ReportData,
    source: Source,
    count: int,
    extractors: Mapping[str, FeatureExtractor],
    lpips_weights: str | None,
    seed: int,
) -> Section:
    """Up to `count` images of the data, put through the autoencoder and measured."""
    lpips, why_not = open_lpips(autoencoder, lpips_weights)
    report = measure_autoencoder(
        autoencoder,
        fixed_images(source, data.config, count, BATCH),
        lpips=lpips,
        extractor=rfid_extractor(extractors),
        seed=seed,
    )
    pairs = pairs_of(autoencoder, source, data)
    return Section(
        name="reconstruction",
        title="The autoencoder",
        content=reconstruction_content(report, pairs, why_not),
        figures=report.measurements,
        values=reconstruction_values(report),
        verdict=reconstruction_verdict(report, data.name),
    )


def reconstruction_content(report: AutoencoderReport, pairs: Sequence[Shown], why_not: str) -> Html:
    """Pictures, then figures, then plots."""
    worst = [_worst(image) for image in report.worst]
    parts = [
        paragraph("Images (left) beside their reconstructions, spread evenly over the data."),
        gallery(pairs, cell=200, largest=512),
        paragraph(f"The {len(worst)} that are reconstructed worst, of {report.n}:"),
        gallery(worst, cell=200, largest=512),
        figures_table(report.measurements),
        missing("LPIPS", why_not) if why_not else EMPTY,
        EMPTY if any(figure.name == "rfid" for figure in report.measurements) else missing("rFID", NO_RFID),
        note("PSNR and SSIM reward blur, LPIPS and rFID punish it; look at the pictures and the spectrum too."),
        plots(*_plots(report)),
        _latents_table(report),
        _codebook_note(report),
    ]
    return Html("".join(parts))


def reconstruction_values(report: AutoencoderReport) -> dict[str, object]:
    """The rest of it for metrics.json."""
    spectra, latents, codebook = report.spectra, report.latents, report.codebook
    use = None
    if codebook is not None:
        use = {"codes": codebook.codes, "used": codebook.used, "perplexity": codebook.perplexity}
    return {
        "n": report.n,
        "high_frequencies_kept": spectra.high_frequencies(),
        "spectrum": {
            "cycles_per_pixel": [list(limits) for limits in spectra.limits],
            "survives": spectra.survives,
            "error": spectra.error,
            "latents": spectra.latents,
        },
        "latents": {
            "mean": latents.mean,
            "std": latents.std,
            "correlation": latents.correlation,
            "shape": latents.shape,
        },
        "codebook": use,
        "worst": [{"index": image.index, "psnr": image.psnr, "lpips": image.lpips} for image in report.worst],
    }


def reconstruction_verdict(report: AutoencoderReport, name: str) -> str:
    """`PSNR 27.9 dB [..], ...; 61 % of the fine detail survives`."""
    figures = ", ".join(f"{_named(figure)} {interval_text(figure)}" for figure in report.measurements)
    kept = 100 * report.spectra.high_frequencies()
    words = f"{figures}; {kept:.0f} % of the energy at high frequencies survives; n = {report.n} of {name}"
    if report.codebook is not None:
        words += f"; {report.codebook.used} of {report.codebook.codes} codes used"
    return words


def _named(figure: Measurement) -> str:
    """`PSNR`, but `rFID through inception-v3`: it says little without."""
    return (
        f"{figure.label} through {figure.setting.extractor.split(' at ')[0]}" if figure.name == "rfid" else figure.label
    )


def rfid_extractor(extractors: Mapping[str, FeatureExtractor]) -> FeatureExtractor | None:
    """What rFID is seen through: the first that is not the autoencoder itself, which cannot see what it loses."""
    return next((one for one in extractors.values() if one.name != OWN), None)


def open_lpips(autoencoder: Autoencoder, weights: str | None) -> tuple[Lpips | None, str]:
    """LPIPS with these weights where the autoencoder is, or why there is none."""
    if weights is None:
        return None, (
            "found no weights; put torchvision's VGG16 weights, saved as .safetensors, into any folder and name the "
            "file: --lpips-weights FILE"
        )
    try:
        with user_input("--lpips-weights"):
            network = build_lpips(AutoencoderLossConfig(perceptual="lpips", lpips_weights=weights))
    except UserError as error:
        return None, str(error)
    return partial(lpips_distance, network.to(next(autoencoder.parameters()).device)), ""


def pairs_of(autoencoder: Autoencoder, source: Source, data: ReportData, count: int = PAIRS) -> list[Shown]:
    """Images beside their reconstructions."""
    through = through_autoencoder(autoencoder)
    found = []
    with torch.no_grad():
        for images in fixed_images(source, data.config, count, BATCH):
            found += [_beside(image, other) for image, other in zip(images, through(images), strict=True)]
    return found


def _beside(image: Tensor, other: Tensor, words: str = "") -> Shown:
    """Two images [3, H, W] in [-1, 1] as one picture."""
    return Shown(to_pil(torch.cat([image, other], dim=2)[None])[0], words)


def _worst(image: WorstImage) -> Shown:
    lpips = "" if image.lpips is None else f", LPIPS {image.lpips:.3f}"
    words = f"image {image.index}: PSNR {image.psnr:.1f} dB{lpips}"
    return _beside(image.original * 2 - 1, image.reconstruction * 2 - 1, words)


def _plots(report: AutoencoderReport) -> list[Html]:
    spectra, latents = report.spectra, report.latents
    middles = [(low + high) / 2 for low, high in spectra.limits]
    kept = Series(label="energy that survives", x=middles, y=spectra.survives, dots=True)
    error = Series(label="error", x=middles, y=spectra.error, dots=True)
    # Of few latents no frequency falls into some bands.
    seen = [(x, power) for x, power in zip(middles, spectra.latents, strict=True) if power > 0]
    energy = Series(label="", x=[x for x, _ in seen], y=[power for _, power in seen], dots=True)
    bars = [Bar(f"channel {i}", value) for i, value in enumerate(latents.std)]
    return [
        line_plot(
            [kept, error],
            title="What survives, by spatial frequency",
            x_label="cycles per pixel (0.5 = finest)",
            y_label="share of the images' power",
        ),
        line_plot(
            [energy],
            title="Spectrum of the latents",
            x_label="cycles per latent",
            y_label="power",
            log_y=True,
            width=360,
        ),
        bar_chart(
            bars, title="Standard deviation of the latents", x_label="as the U-Net sees them; 1 is right", width=360
        ),
    ]


def _latents_table(report: AutoencoderReport) -> Html:
    latents = report.latents
    largest = max(
        (abs(v) for i, row in enumerate(latents.correlation) for j, v in enumerate(row) if i != j), default=0.0
    )
    rows = [
        (i, f"{mean:.3f}", f"{std:.3f}") for i, (mean, std) in enumerate(zip(latents.mean, latents.std, strict=True))
    ]
    channels, height, width = latents.shape
    told = note(
        f"Latents: {channels} channels of {height} x {width}. The U-Net expects mean 0 and standard deviation 1. The "
        f"largest correlation between two channels is {largest:.2f}."
    )
    return Html(told + table(("channel", "mean", "standard deviation"), rows, numbers=(0, 1, 2)))


def _codebook_note(report: AutoencoderReport) -> Html:
    use = report.codebook
    if use is None:
        return EMPTY
    return paragraph(
        f"Codebook: {use.used} of {use.codes} codes occur in {use.positions:,} positions; perplexity "
        f"{use.perplexity:.0f} (as varied as that many equally frequent codes)."
    )
