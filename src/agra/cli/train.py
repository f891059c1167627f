"""`agra train`, `plan` and `recipes`."""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from agra.cli.arguments import recipe_arguments, use_threads, with_data
from agra.cli.data import prepare_missing


def train(arguments: list[str]) -> None:
    """Train a recipe's stage: agra train RECIPE --stage joint --output DIR --data.path DATASET [--stage.steps 10 ...]"""
    from agra.api import train as run
    from agra.checkpoints.folder import newest
    from agra.training.parallelize import ParallelConfig
    from agra.wam.groot import GR1_ROW

    @dataclass(frozen=True, kw_only=True)
    class TrainOptions:
        output: Path
        """Folder of the run: checkpoints, metrics.jsonl, tensorboard. An unfinished run there is resumed."""
        init_from: str | None = None
        """Checkpoint or run folder of an earlier stage, or a diffusers model (folder, or hub id with or without
        @revision) for its transformer."""
        head: str | None = None
        """A GR00T-N1.5 model (folder or hub id) for its action head."""
        head_rows: tuple[int, ...] = (GR1_ROW,)
        """Rows of that model's embodiments from which ours start: one for each, or one for all. Without rows the
        encoders and the decoder stay fresh."""
        mixture: Path | None = None
        """JSON list of the datasets to mix. Each sets fields of `--data` (path, embodiment, weight ...)."""
        log: tuple[str, ...] | None = None
        """Loggers: tensorboard, wandb, trackio. By default TensorBoard where it is installed. metrics.jsonl is always
        written, so that `--log jsonl` writes nothing else."""
        prepare: bool = True
        """Compute missing frozen features first, after printing their cost. Under torchrun, and with False, missing
        features are an error."""
        augment: bool = False
        """Augment images as GR00T does. This needs clips that are decoded while training: --data.cached must be
        empty."""
        parallel: ParallelConfig = field(default_factory=ParallelConfig)
        device: str = "cpu"
        """cpu or cuda. Under torchrun each process takes the GPU of its local rank."""
        threads: int | None = None
        """Number of torch's threads. By default OMP_NUM_THREADS, or all cores."""

    options, config = recipe_arguments("train", arguments, TrainOptions)
    config = with_data(config, arguments, options.mixture)
    if options.augment:
        from agra.data.config import AugmentConfig

        config = replace(config, data=replace(config.data, augment=AugmentConfig()))
    use_threads(options.threads)
    public, first_process = config.method.public_model, os.environ.get("RANK", "0") == "0"
    if public is not None and options.init_from is None and first_process and newest(options.output) is None:
        print(
            f"all weights start random; --init-from {public} starts from the public video model, and --init-from RUN from"
            " an earlier stage",
            file=sys.stderr,
        )
    finished = run(
        config,
        output=options.output,
        init_from=options.init_from,
        head=options.head,
        head_rows=options.head_rows,
        device=options.device,
        parallel=options.parallel,
        loggers=options.log if options.log is None else [n for text in options.log for n in text.split(",") if n],
        prepare_missing=prepare_missing if options.prepare else None,
    )
    if not finished:
        print(f"stopped by SIGTERM; run the same command again to resume from {options.output}", file=sys.stderr)


def plan(arguments: list[str]) -> None:
    """Plan memory, time and cost before a launch: agra plan RECIPE --gpus 8 --gpu-memory 80 [--stage joint] [--with PRESET ...]"""
    from agra.training.plan import Machines, describe
    from agra.training.plan import plan as run

    machines, config = recipe_arguments("plan", arguments, Machines)
    result = run(config, machines)
    print(describe(result, config, machines))
    if result.hours == float("inf"):
        raise SystemExit(1)


def recipes() -> None:
    """List the recipes (variants of the paper, other methods, small versions) and the presets for --with."""
    from agra.recipes import PRESETS, RECIPES

    for title, table in (("recipes", RECIPES), ("presets, for --with", PRESETS)):
        print(f"# {title}")
        for name, function in table.items():
            print(f"{name:28}{(function.__doc__ or '').strip().splitlines()[0]}")
