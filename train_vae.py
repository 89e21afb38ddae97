"""Stage 1: train the autoencoder.    python train_vae.py CONFIG key.sub=value ...    (or accelerate launch ...)"""

from __future__ import annotations

import sys
from pathlib import Path

from ldm.cli.entry import Parser, run_command


def main() -> int:
    """Parse the command line and train; returns the exit code."""
    parser = Parser(prog="train_vae.py", description=__doc__)
    parser.add_argument("config", type=Path, help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replace single values of the config")
    arguments = parser.parse_args()
    return run_command("train_vae.py", lambda: train_autoencoder(arguments.config, arguments.overrides))


def train_autoencoder(config_path: Path, overrides: list[str]) -> None:
    """Build what the config names, train it, and write the finished autoencoder."""
    from autoencoder.model import build_autoencoder
    from ldm.config import claim_run_folder, load
    from ldm.data.loader import TrainingBatches
    from ldm.data.quarantine import Quarantine
    from ldm.data.sources import open_source
    from ldm.errors import user_input
    from ldm.randomness import seed_weights
    from ldm.training.loop import restore, train
    from ldm.training.run import describe_parameters, open_run, split_batch
    from ldm.training.stage1 import AutoencoderStage, Stage1Config
    from ldm.training.stage1_result import finish

    config = load(Stage1Config, config_path, overrides)
    source = open_source(config.data)
    validation_source = open_source(config.validation_data) if config.validation_data else source
    folder = Path(config.out)
    run = open_run(folder, config.seed, config.runtime, config.training.keep_checkpoints)
    split_batch(config.training.batch_size, config.training.accumulation, run.accelerator)

    seed_weights(config.seed)
    with user_input("autoencoder"):
        autoencoder = build_autoencoder(config.autoencoder)
    stage = AutoencoderStage(config, run, autoencoder, validation_source)
    for learner in stage.learners:
        run.say(describe_parameters(learner.name, learner.module))
    # Only now, as all that the config names has been found: a run that never began binds nobody to its config.
    with run.accelerator.main_process_first():
        claim_run_folder(config, folder, config.free_to_change)
    if run.checkpoint is not None:
        restore(stage, run.checkpoint)
    batches = TrainingBatches(
        source,
        config.data,
        batch_size=config.training.batch_size,
        accumulation=config.training.accumulation,
        seed=config.seed,
        start_step=run.start_step,
        end_step=config.training.steps,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        workers=config.training.workers,
    )
    quarantine = Quarantine(
        folder / "quarantine.jsonl",
        config.data.max_bad_share,
        len(source),
        writes=run.accelerator.is_main_process,
    )
    train(stage, batches, config.training, run, quarantine)
    if run.accelerator.is_main_process:
        finish(stage, config, run, source, validation_source)
    run.accelerator.wait_for_everyone()
    run.accelerator.state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
