"""Inception score (arXiv 1606.03498): pictures that are each of one class, and of all classes together."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.evaluation.bootstrap import fixed_order, resampling_counts, spread_estimate
from ldm.evaluation.measurement import Estimate, check_count


def inception_score(logits: Tensor, seed: int = 0, replicates: int = 200) -> Estimate:
    """exp(mean KL(p(y|x) || p(y))) of logits [n, K], 1 to K; higher is better.

    Over the whole set at once, where the paper takes the mean of ten parts: parts depend on the images' order, and the
    score of a part is lower, since n is smaller. Equal to torch-fidelity's with one split (by test). Raises `UserError`
    for n < 2.
    """
    check_count("samples", len(logits), 2, "Inception score")
    logits = fixed_order(logits)
    shares = logits.softmax(1)  # [n, K]
    entropies = -(shares * logits.log_softmax(1)).sum(1)  # [n]
    rows = resampling_counts(len(logits), replicates, seed)
    rows = torch.cat([torch.ones(1, len(logits), dtype=torch.float64), rows]) / len(logits)  # [1 + R, n]
    marginal = rows @ shares  # [1 + R, K]
    scores = (torch.special.entr(marginal).sum(1) - rows @ entropies).exp()
    return spread_estimate(scores[0].item(), scores[1:], (f"one split of {len(logits)}",))
