"""The report of an autoencoder by itself."""

from __future__ import annotations

from autoencoder.model import Autoencoder
from ldm.data.sample import Source
from ldm.evaluation.report import Section
from ldm.evaluation.report_data import ReportData
from ldm.evaluation.report_eyes import open_eyes
from ldm.evaluation.report_model import Measuring
from ldm.evaluation.report_reconstruction import reconstruction_section


def autoencoder_sections(
    autoencoder: Autoencoder, data: ReportData, source: Source, measuring: Measuring
) -> list[Section]:
    """Reconstructions and latents, and a line for every extractor that is not there. Raises `UserError`."""
    device = next(autoencoder.parameters()).device
    eyes = open_eyes(measuring.extractors, data.config.resolution, autoencoder, data.vocabulary, device)
    section = reconstruction_section(
        autoencoder, data, source, measuring.reconstructed, eyes.opened, measuring.lpips_weights, measuring.seed
    )
    lines = [
        Section(name=f"rfid_{name}", title=f"rFID through {name}", missing=line) for name, line in eyes.missing.items()
    ]
    return [section, *lines]
