"""Flags of earlier versions. Their error messages give the present flags."""

from collections.abc import Sequence

_CONFIG = {
    "--stage.video-lr": "--stage.learning-rate-by-part video_dit RATE",
    "--stage.action-lr": "--stage.learning-rate",
    "--stage.train-video-dit": "--stage.frozen video_dit",
    "--stage.warmup-share": "--stage.warmup-ratio",
    "--stage.objective.video-share": "--method.objective.video-batch-fraction",
    "--data.every": "--data.row-stride",
    "--data.lacks": "--data.missing-keys",
    "--data.tile": "--data.extra-cameras",
    "--monitor.draws": "--monitor.background-sets",
    "--parallel.accumulate": "--parallel.gradient-accumulation-steps",
    "--parallel.checkpoint-activations": "--parallel.activation-checkpointing",
    "--parallel.shards": "--parallel.shard-degree",
    "--init": "--init-from",
}
_SECTIONS = {
    "--stage.objective.": "--method.objective.",
    "--model.": "--method.model.",
    "--alignment.": "--method.alignment.",
    "--looking.": "--visual-reliance.",
}
_FLAGS: dict[str, dict[str, str]] = {
    "plan": {**_CONFIG, "--shards": "--shard-degree"},
    "diagnose": {"--noises": "--noise-samples", "--draws": "--background-sets"},
    "evaluate": {"--blind": "--no-render", "--python": "--simulator-python", "--keys": "--key-mapping"},
    "serve": {
        "--plain": "--no-fast",
        "--without-key": "--allow-unauthenticated",
        "--watch": "--reload-interval",
        "--groot-in-clear": "--groot-allow-plaintext",
    },
}
_CONFIGURED = ("train", "prepare", "probes", "study")


def check_renamed(command: str, arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag of an earlier version, with its present name."""
    flags = _CONFIG if command in _CONFIGURED else _FLAGS.get(command, {})
    sections = _SECTIONS if command in (*_CONFIGURED, "plan") else {}
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-") if argument.startswith("--") else ""
        present = flags.get(name)
        for earlier, section in sections.items():
            if present is None and name.startswith(earlier):
                present = section + name.removeprefix(earlier)
        if present is not None:
            raise ValueError(f"{name}: renamed, use {present}")
