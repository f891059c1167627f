"""What the frozen parts compute, once for every dataset: latents, teacher targets, instruction tokens.      C.1; Eqs. 3-4

Here the frozen encoders of `wam` and `alignment` meet the cache of `data`. A codec that is fit on data is fit here too.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor

from agra.alignment.teacher import Teacher, interpolate_grid, load_teacher, reference_frames
from agra.config import RunConfig
from agra.data import cache
from agra.data.cache import CachedFeature
from agra.data.instructions import InstructionTokens
from agra.data.integrity import dataset_files
from agra.data.source import SourceConfig
from agra.data.sources import Source
from agra.footprint import encoding_flops_per_sample, flops_per_sample, teacher_width
from agra.training import checkpoint
from agra.types import Episode
from agra.wam.codec import Codec, PatchPCACodec, load_codec, to_video
from agra.wam.model import WAMConfig
from agra.wam.text import TextEncoder, load_text_encoder
from agra.wam.video_dit import load_text_projection

_CODEC_EPISODES = 64  # enough for a 768 x 768 covariance of 8 x 8 x 4 patches
_TEACHER_CHUNK = 8
_FEW = 16
"""Instructions for each process up to which the first one encodes them all."""
MAX_KNOWN = 256
"""Training instructions up to which a checkpoint carries their tokens: 0.3 GB of Cosmos's."""


class Latents:
    """Latents of the window that starts at each control step: (N, C, T, h, w) float16."""

    name = "latents"

    def __init__(self, codec: Codec, model: WAMConfig, frame_stride: int) -> None:
        self.codec, self.model, self.stride = codec, model, frame_stride

    @property
    def key(self) -> dict[str, Any]:
        """Codec and geometry."""
        return {
            "codec": self.codec.key,
            "frame_size": list(self.model.frame_size),
            "num_frames": self.model.num_frames,
            "frame_stride": self.stride,
        }

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Past the episode's end the last frame repeats."""
        video = to_video(episode.frames, self.model.frame_size)[0]  # (3, N, h, w)
        offsets = torch.arange(self.model.num_frames) * self.stride
        rows = (torch.arange(len(episode))[:, None] + offsets).clamp(max=len(episode) - 1)
        encoded = [self.codec.encode(video[:, chosen].transpose(0, 1)) for chosen in rows.split(16)]
        return {"latents": torch.cat(encoded).half().cpu().numpy()}


class Targets:
    """The teacher's grid of every frame on the video DiT's token grid: (N, H, W, P) float16.                 Eqs. 3-4

    Of an episode's first `limit` frames only, where there is a limit.
    """

    name = "targets"

    def __init__(self, teacher: Teacher, model: WAMConfig, limit: int | None) -> None:
        self.teacher, self.grid, self.limit = teacher, model.token_grid[1:], limit

    @property
    def key(self) -> dict[str, Any]:
        """Teacher, grid and limit."""
        return {"teacher": self.teacher.key, "grid": list(self.grid), "limit": self.limit}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Each frame alone, from the recorded resolution."""
        frames = torch.as_tensor(np.ascontiguousarray(episode.frames[: self.limit]))
        return {"targets": _target_grids(self.teacher, frames, self.grid).numpy()}


@dataclass(frozen=True, kw_only=True)
class EncodingCost:
    """Two ways to a feature of the training windows: from the cache, or encoded while training."""

    feature: str
    cached: bool
    """Which of the two the config takes."""
    bytes_per_step: int
    """Bytes of a control step in the cache."""
    bytes: int
    """Bytes of all training and validation episodes in the cache."""
    share: float
    """Share of a training step's FLOPs that encoding takes."""

    def __str__(self) -> str:
        ways = (
            f"cached {self.bytes / 1e9:,.1f} GB ({self.bytes_per_step / 1e3:,.0f} kB a control step), or encoded while"
        )
        choice = "the cache" if self.cached else "while training"
        return f"{self.feature}: {ways} training {self.share:.0%} of a step's FLOPs; this config: {choice}"


def encoding_costs(config: RunConfig, sources: Sequence[Source]) -> list[EncodingCost]:
    """What latents, and targets where the stage aligns, cost either way. Loads no frozen network."""
    model, encoding, step = config.model, encoding_flops_per_sample(config), flops_per_sample(config)
    row = {"latents": math.prod(model.latent_shape)}
    if config.aligns:
        width = teacher_width(config)
        assert width is not None
        row["targets"] = math.prod(model.token_grid[1:]) * width
    costs = []
    for name, flops in encoding.items():
        limits = [_target_frames(config, source) if name == "targets" else None for source in sources]
        steps = sum(_steps(source, limit) for source, limit in zip(sources, limits, strict=True))
        bytes_per_step = 2 * row[name] + 4  # float16 and a checksum
        online = sum(encoding[other] for other in encoding if other == name or other not in config.data.cached)
        cost = EncodingCost(
            feature=name,
            cached=name in config.data.cached,
            bytes_per_step=bytes_per_step,
            bytes=steps * bytes_per_step,
            share=flops / (step + online),
        )
        costs.append(cost)
    return costs


def _steps(source: Source, limit: int | None) -> int:
    lengths = source.dataset.lengths[list(source.used)]
    return int((lengths if limit is None else np.minimum(lengths, limit)).sum())


class Preparation:
    """The frozen features that a config's stage needs: their cost, and their computation."""

    def __init__(self, config: RunConfig, sources: Sequence[Source], *, device: torch.device | str = "cpu") -> None:
        self.config, self.sources, self.root = config, sources, Path(config.data.cache)
        self._device = device

    @cached_property
    def _features(self) -> dict[str, Callable[[Source], cache.Feature]]:
        """How to make each cached feature for a source; the frozen networks are loaded once."""
        if _needed(self.config):
            remember_fingerprints(self.config, self.sources)
        return _features(self.config, self.sources, self._device)

    def costs(self) -> list[EncodingCost]:
        """What every feature costs in the cache and while training."""
        return encoding_costs(self.config, self.sources)

    def estimate(self) -> list[tuple[Source, cache.Estimate]]:
        """The cost of `run` for every source, measured on one episode of each."""
        sources = self.sources if self._features else ()
        return [(s, cache.estimate(s.dataset, self._of(s), self.root, episodes=s.used)) for s in sources]

    def run(self, *, rank: int = 0, world_size: int = 1) -> list[Path]:
        """Compute and cache the missing features of every source; returns the features' folders.

        Leaves a file beside each folder by which training finds it without loading a frozen network. Each of `world_size`
        processes, numbered by `rank`, computes its share of the episodes and of the instructions.
        """
        folders = [self._write_instructions(rank, world_size)]
        for source in self.sources if self._features else ():
            paths = cache.prepare(
                source.dataset,
                self._of(source),
                self.root,
                episodes=source.used,
                rank=rank,
                world_size=world_size,
                progress=rank == 0,
            )
            for name, path in zip(self._features, paths, strict=True):
                checkpoint.write_text(_index(self.config, self.sources, source, name), json.dumps(path.name) + "\n")
            folders += paths
        return folders

    def _of(self, source: Source) -> list[cache.Feature]:
        return [make(source) for make in self._features.values()]

    def _write_instructions(self, rank: int, world_size: int) -> Path:
        """Encode the instructions that have no tokens yet.

        The first process encodes a few alone, so that the others need no text encoder; many are shared.
        """
        index, texts = _instruction_index(self.config), _instruction_texts(self.sources)
        tokens = InstructionTokens(self.root / json.loads(index.read_text())) if index.is_file() else None
        missing = texts if tokens is None else tokens.missing(texts)
        share = missing[rank::world_size] if len(missing) > _FEW * world_size else missing if rank == 0 else []
        if tokens is not None and not share:
            return tokens.folder
        if tokens is None and rank > 0 and not share:
            return index
        encoder = open_text(self.config).to(self._device)
        tokens = InstructionTokens(self.root / f"instructions-{_digest({'text': encoder.key})}")
        _encode_missing(encoder, tokens, tokens.missing(share))
        checkpoint.write_text(index, json.dumps(tokens.folder.name) + "\n")
        return tokens.folder


def remember_fingerprints(config: RunConfig, sources: Sequence[Source]) -> None:
    """Take the fingerprints of datasets without checksums from the cache folder while their files stay as they are.

    Otherwise every process would read every video at its start. A file counts as changed where its size or time has.
    """
    for dataset in (source.dataset for source in sources):
        if dataset.seal.checksums:
            continue
        files = {name: (dataset.path / name).stat() for name in dataset_files(dataset.path)}
        state = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
        path = Path(config.data.cache) / f"fingerprint-{_digest({'path': str(dataset.path.resolve())})}.json"
        memory = json.loads(path.read_text()) if path.is_file() else {}
        if memory.get("files") == state:
            dataset.fingerprint = memory["fingerprint"]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(path, json.dumps({"files": state, "fingerprint": dataset.fingerprint}) + "\n")


def open_features(config: RunConfig, sources: Sequence[Source]) -> list[dict[str, CachedFeature]]:
    """The cached features of `prepare` for these settings, by source. Raises FileNotFoundError naming the remedy."""
    opened, needed = [], _needed(config)
    if needed:
        remember_fingerprints(config, sources)
    for source in sources:
        features = {}
        for name in needed:
            path = _index(config, sources, source, name)
            if not path.is_file():
                raise _unprepared(config, name, str(source.dataset.path))
            features[name] = CachedFeature.open(path.parent / json.loads(path.read_text()), episodes=source.used)
        opened.append(features)
    return opened


def open_instructions(config: RunConfig, sources: Sequence[Source]) -> InstructionTokens:
    """The instruction tokens of `prepare`. Raises FileNotFoundError naming the remedy where some are missing."""
    index = _instruction_index(config)
    if not index.is_file():
        raise _unprepared(config, "instruction", "any dataset")
    tokens = InstructionTokens(index.parent / json.loads(index.read_text()))
    if missing := tokens.missing(_instruction_texts(sources)):
        raise _unprepared(config, f"tokens of the instruction {missing[0]!r}", "these datasets")
    return tokens


def write_tokens(
    config: RunConfig, tokens: InstructionTokens, texts: Sequence[str], *, device: torch.device | str = "cpu"
) -> None:
    """Encode further texts into an open folder; the text encoder is loaded only where some have no tokens."""
    if missing := tokens.missing(texts):
        _encode_missing(open_text(config).to(device), tokens, missing)


def _encode_missing(encoder: TextEncoder, tokens: InstructionTokens, texts: Sequence[str]) -> None:
    for text in track(texts, "instructions", console=Console(stderr=True), transient=True, disable=len(texts) < 2):
        tokens.write(text, encoder.encode([text])[0].half().cpu().numpy())


def write_known_instructions(path: Path, tokens: InstructionTokens, sources: Sequence[Source]) -> None:
    """The file of a checkpoint from which a policy reads the tokens of its training instructions.

    Empty where there are more than `MAX_KNOWN`: they are then no fixed set, and the file would grow without bound.
    """
    texts = _instruction_texts(sources)
    known = texts if len(texts) <= MAX_KNOWN else []
    checkpoint.write_tensors(path, {text: torch.from_numpy(tokens.read(text)) for text in known})


def _unprepared(config: RunConfig, what: str, where: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{config.data.cache}: no {what} prepared for {where} with these settings; run agra prepare with the same recipe,"
        " stage and flags"
    )


def _instruction_texts(sources: Sequence[Source]) -> list[str]:
    """The distinct instructions of all episodes that training or validation reads."""
    return [*dict.fromkeys(source.dataset.instruction(episode) for source in sources for episode in source.used)]


class OnlineEncoder:
    """The features that are not cached, computed from decoded frames while training.

    Its values equal the cache's, bit for bit on one device: both go through the same networks, and are rounded to float16.
    """

    def __init__(self, config: RunConfig, codec: Codec | None, teacher: Teacher | None) -> None:
        self.codec, self.teacher = codec, teacher
        self._size, self._grid = config.model.frame_size, config.model.token_grid[1:]

    @classmethod
    def open(
        cls, config: RunConfig, sources: Sequence[Source], *, device: torch.device | str = "cpu"
    ) -> "OnlineEncoder | None":
        """The frozen networks whose features the config does not cache; None where it caches all."""
        codec = teacher = None
        if "latents" not in config.data.cached:
            codec = open_codec(config, sources).to(device)
        if config.aligns and "targets" not in config.data.cached:
            assert config.alignment is not None
            teacher = load_teacher(config.alignment.teacher).to(device)
        return None if codec is None and teacher is None else cls(config, codec, teacher)

    @property
    def teacher_width(self) -> int | None:
        """Width of the targets; None where it makes none."""
        return None if self.teacher is None else self.teacher.width

    def latents(self, clips: Sequence[np.ndarray]) -> Float[Tensor, "B C T h w"]:
        """Latents of clips (T, H, W, 3) uint8, float16 on the CPU."""
        assert self.codec is not None
        return self.codec.encode(torch.cat([to_video(clip, self._size) for clip in clips])).half().cpu()

    def targets(self, frames: Sequence[np.ndarray]) -> Float[Tensor, "B T H W P"]:
        """Targets of the reference frames (T, H, W, 3) uint8 of each window, float16 on the CPU."""
        assert self.teacher is not None
        grids: list[Tensor | None] = [None] * len(frames)
        for size in {window.shape for window in frames}:  # datasets of a mixture may differ in the size of their frames
            rows = [row for row, window in enumerate(frames) if window.shape == size]
            stacked = torch.from_numpy(np.concatenate([frames[row] for row in rows]))
            encoded = _target_grids(self.teacher, stacked, self._grid).unflatten(0, (len(rows), -1))
            for row, grid in zip(rows, encoded, strict=True):
                grids[row] = grid
        return torch.stack([grid for grid in grids if grid is not None])


def _target_grids(
    teacher: Teacher, frames: UInt8[Tensor, "N H W 3"], grid: tuple[int, int]
) -> Float[Tensor, "N h w P"]:
    """The teacher's features of frames on the token grid (Eqs. 3, 4), float16 on the CPU.

    `_TEACHER_CHUNK` frames at a time, the last chunk padded: the kernels then see one shape, and a frame's features are the
    same bits whatever other frames are encoded with it.
    """
    grids = []
    for chunk in frames.split(_TEACHER_CHUNK):
        missing = _TEACHER_CHUNK - len(chunk)
        padded = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
        grids.append(interpolate_grid(teacher(padded), grid)[: len(chunk)].half().cpu())
    return torch.cat(grids)


def codec_file(config: RunConfig, sources: Sequence[Source]) -> Path:
    """Where the codec fit on the training episodes of these sources lies."""
    return Path(config.data.cache) / f"codec-{_digest(_codec_settings(config, sources))}.safetensors"


def _needed(config: RunConfig) -> tuple[str, ...]:
    """The features that are cached for the config's stage."""
    read = ("latents", "targets") if config.aligns else ("latents",)
    return tuple(name for name in read if name in config.data.cached)


def _features(
    config: RunConfig, sources: Sequence[Source], device: torch.device | str
) -> dict[str, Callable[[Source], cache.Feature]]:
    needed, model = _needed(config), config.model
    makers: dict[str, Callable[[Source], cache.Feature]] = {}
    if "latents" in needed:
        codec = open_codec(config, sources).to(device)
        makers["latents"] = lambda source: Latents(codec, model, source.config.frame_stride)
    if "targets" in needed:
        assert config.alignment is not None
        teacher = load_teacher(config.alignment.teacher).to(device)
        makers["targets"] = lambda source: Targets(teacher, model, _target_frames(config, source))
    return makers


def open_codec(config: RunConfig, sources: Sequence[Source]) -> Any:
    """The frozen codec; a patch PCA is fit on the training episodes the first time and kept in the cache folder."""
    if config.model.codec.kind != "patch_pca":
        return load_codec(config.model.codec)
    path = codec_file(config, sources)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        PatchPCACodec.fit(_codec_videos(config, sources), channels=config.model.codec.channels).save(path)
    return load_codec(config.model.codec, path)


def open_text(config: RunConfig) -> Any:
    """The frozen text encoder; Cosmos's text projection, frozen too, is applied at once: 1 MB an instruction."""
    text, video = config.model.text, config.model.video_dit
    if text.kind != "cosmos_reason" or video.text_projection_dim is None:
        return load_text_encoder(text)
    return load_text_encoder(text, load_text_projection(video, text.source, revision=text.revision))


def _index(config: RunConfig, sources: Sequence[Source], source: Source, name: str) -> Path:
    """A file that names a feature's folder; it is itself named after what the config says of the feature."""
    settings: dict[str, Any] = {"dataset": source.dataset.fingerprint, "view": dict(source.dataset.view)}
    if name == "latents":
        fitted = config.model.codec.kind == "patch_pca"
        codec = _codec_settings(config, sources) if fitted else {"codec": asdict(config.model.codec)}
        geometry = {"frame_size": config.model.frame_size, "num_frames": config.model.num_frames}
        settings |= codec | geometry | {"stride": source.config.frame_stride}
    else:
        assert config.alignment is not None
        settings |= asdict(config.alignment.teacher) | {
            "grid": config.model.token_grid[1:],
            "limit": _target_frames(config, source),
        }
    return Path(config.data.cache) / f"{name}-{_digest(settings)}.json"


def _instruction_index(config: RunConfig) -> Path:
    """A file that names the folder of a text encoder's tokens."""
    return Path(config.data.cache) / f"instructions-{_digest(asdict(config.model.text))}.json"


def _codec_settings(config: RunConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """Whatever decides a codec that is fit on data."""
    fit_on = [[s.dataset.fingerprint, dict(s.dataset.view), s.config.frame_stride, len(s.training)] for s in sources]
    return {"fit_on": fit_on, "frame_size": config.model.frame_size, "codec": asdict(config.model.codec)}


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _codec_videos(config: RunConfig, sources: Sequence[Source]) -> Iterator[Tensor]:
    training = [(source, episode) for source in sources for episode in source.training]
    chosen = np.linspace(0, len(training) - 1, min(len(training), _CODEC_EPISODES)).round().astype(int)
    for source, episode in (training[index] for index in chosen):
        frames = source.dataset.frames(episode)[:: source.config.frame_stride]
        whole = (len(frames) - 1) // 4 * 4 + 1
        yield to_video(frames[:whole], config.model.frame_size)


def window_frames(config: RunConfig, source: SourceConfig) -> list[int]:
    """The control steps after the observation whose frames make a window of a source."""
    return [frame * source.frame_stride for frame in range(config.model.num_frames)]


def window_references(config: RunConfig, source: SourceConfig) -> tuple[int, ...]:
    """The control steps after the observation whose frames stand for the latent frames of a source's window."""
    return tuple(frame * source.frame_stride for frame in reference_frames(config.model.latent_shape[1]))


def _target_frames(config: RunConfig, source: Source) -> int | None:
    """How many first frames of an episode need targets; None: all."""
    steps, last = config.data.target_steps, reference_frames(config.model.latent_shape[1])[-1]
    return None if steps is None else steps + last * source.config.frame_stride
