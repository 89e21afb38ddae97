"""How much of a VQ autoencoder's codebook is used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluation.measurement import check_count


@dataclass(frozen=True)
class CodebookUse:
    """Over all latent positions of the measured images."""

    codes: int
    used: int
    """Codes that occurred."""
    perplexity: float
    """exp(entropy of the codes' frequencies): as many equally frequent codes would be as varied; 1 to `codes`."""
    positions: int

    @property
    def share(self) -> float:
        """Share of the codes that occurred. With few positions it is small for every codebook."""
        return self.used / self.codes


class CodebookMeter:
    """Counts codes over batches."""

    def __init__(self, codes: int) -> None:
        self._counts = torch.zeros(codes, dtype=torch.int64)

    def update(self, indices: Tensor) -> None:
        """Indices of codes, int64 of any shape."""
        self._counts += torch.bincount(indices.detach().cpu().flatten(), minlength=len(self._counts))

    def result(self) -> CodebookUse:
        """Raises `UserError` without images."""
        total = int(self._counts.sum())
        check_count("data", total, 1, "codebook use")
        entropy = torch.special.entr(self._counts.double() / total).sum()
        return CodebookUse(len(self._counts), int((self._counts > 0).sum()), entropy.exp().item(), total)
