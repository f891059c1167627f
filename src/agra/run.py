"""A config or a run's folder in, files out: what the commands do, for use from Python as well."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from agra.config import RunConfig
from agra.data import cache
from agra.data.lerobot import LeRobotDataset
from agra.data.mixture import WindowSampler
from agra.data.normalize import NormStats
from agra.prepare import codec_file, features, window_references
from agra.training import checkpoint
from agra.training.loop import Trainer, initialize, seed_everything
from agra.training.objective import Objective
from agra.wam.model import WAM


def prepare(config: RunConfig, *, device: str = "cpu") -> list[Path]:
    """Compute and cache the frozen features that the config's stage needs; returns their folders."""
    dataset = LeRobotDataset(config.data.path, camera=config.data.camera)
    return cache.prepare(dataset, features(config, dataset, device=device), Path(config.data.cache))


def train(config: RunConfig, *, output: Path, init: Path | None = None, device: str = "cpu") -> bool:
    """Train one stage into `output`, resuming a run found there. False if a signal stopped it early."""
    dataset = LeRobotDataset(config.data.path, camera=config.data.camera)
    wanted = features(config, dataset, device=device)
    opened = {feature.name: cache.CachedFeature.open(dataset, feature, Path(config.data.cache)) for feature in wanted}
    stats = {dataset.embodiment: NormStats.of(dataset, config.data.normalization)}
    sampler = WindowSampler(config.data, dataset, opened, stats, horizon=config.model.action_dit.horizon,
                            references=window_references(config), batch_size=config.stage.batch_size,
                            seed=config.stage.seed, max_state_dim=config.model.action_dit.state_dim,
                            max_action_dim=config.model.action_dit.action_dim)
    seed_everything(config.stage.seed, 2**31 + 1)
    teacher_width = opened["targets"].shape[-1] if "targets" in opened else None
    objective = Objective(WAM(config.model), config.stage.objective, config.alignment if config.aligns else None,
                          teacher_width)
    if init is not None:
        initialize(objective, checkpoint.resolve(init), config.stage.name)
    extra = {"norm_stats.json": lambda path: NormStats.save_all(stats, path)}
    if config.model.codec.kind == "patch_pca":
        fitted = codec_file(config, dataset)
        extra["codec.safetensors"] = lambda path: path.write_bytes(fitted.read_bytes())
    trainer = Trainer(config, objective, batch=sampler.batch, validation=sampler.validation_batch, output=output,
                      extra_files=extra, device=device)
    return trainer.run()
