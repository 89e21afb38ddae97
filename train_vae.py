"""Stage 1: train the autoencoder.    python train_vae.py CONFIG key.sub=value ...    (or accelerate launch ...)"""

from __future__ import annotations

import sys
from pathlib import Path

from ldm.cli.entry import run_training


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    return run_training("train_vae.py", __doc__, train_autoencoder)


def train_autoencoder(config_path: Path, overrides: list[str]) -> int | None:
    """Build what the config names, train it, and write the finished autoencoder; or replay a failure bundle."""
    from dataclasses import replace

    from autoencoder.model import build_autoencoder
    from ldm.config import claim_run_folder, load
    from ldm.data.sources import open_source
    from ldm.errors import user_input
    from ldm.randomness import seed_weights
    from ldm.training.alarms import AdversaryWatch, Alarms
    from ldm.training.bases import claim_bases
    from ldm.training.failure import open_failure
    from ldm.training.loop import open_quarantine, restore, train, training_batches
    from ldm.training.replay import open_replay, replay
    from ldm.training.run import describe_parameters, open_run
    from ldm.training.stage1 import AutoencoderStage, Stage1Config
    from ldm.training.stage1_result import finish
    from ldm.training.watch import BEST, Watch, watched

    failure = open_failure(config_path, "train_vae.py")
    config = load(Stage1Config, failure.config if failure else config_path, overrides)
    source = open_source(config.data)
    validation_source = open_source(config.validation_data) if config.validation_data else source
    folder = Path(config.out)
    run = (
        open_replay(failure, config.seed, config.runtime)
        if failure
        else open_run(folder, config.seed, config.runtime, config.training.keep_checkpoints)
    )

    seed_weights(config.seed)
    with user_input("autoencoder"):
        autoencoder = build_autoencoder(config.autoencoder)
    stage = AutoencoderStage(config, run, autoencoder, validation_source)
    for learner in stage.learners:
        run.say(describe_parameters(learner.name, learner.module))
    batches = training_batches(source, config.data, config.training, run)
    if failure is not None:
        return replay(stage, batches, config.training, run, source, config.data, failure)
    # Only now, as all that the config names has been found: a run that never began binds nobody to its config.
    with run.accelerator.main_process_first():
        claim_run_folder(config, folder, config.free_to_change)
        claim_bases(
            folder, {"autoencoder.pretrained": config.autoencoder.pretrained}, resumed=run.checkpoint is not None
        )
    watch = Watch(folder, every=config.training.validate_every, metric=config.keep_best) if config.keep_best else None
    adversary = config.discriminator
    alarms = Alarms(run.say, AdversaryWatch(loss=adversary.loss, weight=adversary.weight))
    train(stage, batches, config.training, run, open_quarantine(source, config.data, run), watch, alarms)
    if run.accelerator.is_main_process:
        finish(stage, config, run, source, validation_source)
        best = watch.best() if watch is not None else None
        if best is not None:
            run.say(f"best of {watched(best)}:")
            restore(stage, best)
            finish(stage, config, replace(run, folder=folder / BEST), source, validation_source)
    run.close()
    return None


if __name__ == "__main__":
    sys.exit(main())
