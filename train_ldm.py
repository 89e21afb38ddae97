"""Stage 2: train the latent U-Net.    python train_ldm.py CONFIG key.sub=value ...    (or accelerate launch ...)"""

from __future__ import annotations

import sys
from pathlib import Path

from ldm.cli.entry import run_training


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    return run_training("train_ldm.py", __doc__, train_diffusion)


def train_diffusion(config_path: Path, overrides: list[str]) -> int | None:
    """Build what the config names, train it, and write the finished pipeline; or replay a failure bundle."""
    from autoencoder.model import downsampling_factor
    from ldm.config import claim_run_folder, load
    from ldm.data.bucket_index import open_buckets
    from ldm.data.latent_cache import buckets_folder, cached_latents
    from ldm.data.share import Share
    from ldm.data.sources import open_source
    from ldm.training.bases import claim_bases
    from ldm.training.captions import check_captions
    from ldm.training.conditions import wanted_of
    from ldm.training.failure import open_failure
    from ldm.training.loop import open_quarantine, restore, train, training_batches
    from ldm.training.networks import build_networks
    from ldm.training.prior import with_prior
    from ldm.training.replay import open_replay, replay
    from ldm.training.run import describe_attention, describe_parameters, open_run
    from ldm.training.stage2 import DiffusionStage
    from ldm.training.stage2_config import Stage2Config
    from ldm.training.stage2_result import save_result
    from ldm.training.watch import BEST, watched
    from ldm.training.watch_pictures import watch_of

    failure = open_failure(config_path, "train_ldm.py")
    config = load(Stage2Config, failure.config if failure else config_path, overrides)
    source = open_source(config.data)
    validation_source = open_source(config.validation_data) if config.validation_data else source
    folder = failure.run_folder if failure else Path(config.out)
    run = (
        open_replay(failure, config.seed, config.runtime)
        if failure
        else open_run(folder, config.seed, config.runtime, config.training.keep_checkpoints)
    )
    nets = build_networks(config, source)
    encoders, unet = nets.encoders, nets.unet
    stage = DiffusionStage(config, run, nets.autoencoder, encoders, unet, nets.noise, validation_source)
    watch = watch_of(stage, validation_source)
    run.say(describe_parameters("U-Net", unet))
    run.say(describe_attention(unet, run))
    run.say(describe_parameters(f"conditions ({', '.join(config.conditions.dropouts()) or 'none'})", encoders))
    check_captions(source, config)
    if config.prior is not None:
        source = with_prior(source, config.prior, stage.artist(nets.weights), run)
    accelerator = run.accelerator
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    cache_folder = Path(config.cache.folder) if config.cache.folder else folder / "latents"
    factor = downsampling_factor(nets.autoencoder)
    buckets = open_buckets(buckets_folder(cache_folder), source, config.data, factor, share)
    if buckets is not None:
        run.say(buckets.summary(config.training.batch_size))
    reader = None
    if config.cache.enabled:
        reader = cached_latents(cache_folder, source, config.data, nets.autoencoder, config.cache, share)
    wanted = wanted_of(config.conditions, encoders)
    batches = training_batches(source, config.data, config.training, run, reader, wanted, buckets)
    if failure is not None:
        return replay(stage, batches, config.training, run, source, config.data, failure)
    # Only now, as all that the config names has been found: a run that never began binds nobody to its config.
    with run.accelerator.main_process_first():
        claim_run_folder(config, folder, config.free_to_change)
        claim_bases(folder, config.bases(), resumed=run.checkpoint is not None)
    train(stage, batches, config.training, run, open_quarantine(source, config.data, run), watch)
    if run.accelerator.is_main_process:
        run.say(save_result(stage, folder))
        best = watch.best() if watch is not None else None
        if best is not None:
            restore(stage, best)
            run.say(f"best of {watched(best)}: {save_result(stage, folder / BEST)}")
    run.close()
    return None


if __name__ == "__main__":
    sys.exit(main())
