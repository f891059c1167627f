"""`agra prepare`: the frozen features that a method needs, computed once for every dataset and read by training."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from agra import files
from agra.data.config import DataConfig
from agra.data.features import cache
from agra.data.features.cache import MEMORY_LIMIT, CachedFeature
from agra.data.features.encoders import codec_settings, digest, open_codec, open_teacher, open_text_encoder
from agra.data.features.instruction_tokens import InstructionTokens
from agra.data.features.jobs import FrameLatents, Frames, Latents, Targets
from agra.data.features.online import OnlineEncoder
from agra.data.lerobot.checksums import dataset_files
from agra.data.source import Source
from agra.methods.method import MethodConfig
from agra.wam.text import TextEncoder
from agra.weights import write_tensors

_FEW = 16
"""Up to this many instructions for each process, the first process encodes all of them."""
MAX_STORED_INSTRUCTIONS = 256
"""Largest number of training instructions whose tokens a checkpoint stores. 256 take 0.3 GB for Cosmos."""


class Preparation:
    """The frozen features that a method needs of its data. Estimates their cost and computes them."""

    def __init__(
        self,
        method: MethodConfig,
        data: DataConfig,
        sources: Sequence[Source],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.method, self.data, self.sources, self.root = method, data, sources, Path(data.cache)
        self._device = device

    @cached_property
    def _features(self) -> dict[str, Callable[[Source], cache.Feature]]:
        """Constructors of the cached features for a source, by name. The frozen networks are loaded once."""
        names = needed_features(self.method, self.data)
        if names:
            reuse_fingerprints(self.data, self.sources)
        return _constructors(self.method, self.data, self.sources, names, self._device)

    @property
    def missing(self) -> bool:
        """True where training with these settings needs features that are not cached."""
        try:
            open_features(self.method, self.data, self.sources, memory_limit=0)
            open_instructions(self.method, self.data, self.sources)
        except FileNotFoundError:
            return True
        return False

    def estimate(self) -> list[tuple[Source, cache.CacheEstimate]]:
        """Estimate the cost of `run` for every source from one episode of each."""
        sources = self.sources if self._features else ()
        return [(s, cache.estimate_cost(s.dataset, self._of(s), self.root, episodes=s.used)) for s in sources]

    def run(self, *, rank: int = 0, world_size: int = 1) -> list[Path]:
        """Compute and cache the missing features of each source. Returns the folders of the features.

        An index file beside each folder leads training to it without loading a frozen network. Each of `world_size`
        processes, numbered by `rank`, computes its part of the episodes and of the instructions. The caches do not
        depend on the number of processes.
        """
        folders = [self._write_instructions(rank, world_size)] if self.method.needs().instruction else []
        for source in self.sources if self._features else ():
            paths = cache.cache_features(
                source.dataset,
                self._of(source),
                self.root,
                episodes=source.used,
                rank=rank,
                world_size=world_size,
                progress=rank == 0,
            )
            for name, path in zip(self._features, paths, strict=True):
                index = _index(self.method, self.data, self.sources, source, name)
                files.write_text(index, json.dumps(path.name) + "\n")
            folders += paths
        return folders

    def open_uncached(self) -> None:
        """Open the networks of features that are not cached, so that their files are here before training needs them.

        Machines without network then find them. Raises FileNotFoundError where a network cannot be read.
        """
        OnlineEncoder.open(self.method, self.data, self.sources)

    def _of(self, source: Source) -> list[cache.Feature]:
        return [construct(source) for construct in self._features.values()]

    def _write_instructions(self, rank: int, world_size: int) -> Path:
        """Encode the instructions without tokens.

        The first process encodes a small number alone, so that the others need no text encoder. A large number is
        divided. The division does not depend on the tokens that other processes have written.
        """
        index, texts = _instruction_index(self.method, self.data), _instruction_texts(self.sources)
        tokens = InstructionTokens(self.root / json.loads(index.read_text())) if index.is_file() else None
        share = texts[rank::world_size] if len(texts) > _FEW * world_size else texts if rank == 0 else []
        if tokens is None and not share:
            return index
        if tokens is not None and not tokens.missing(share):
            return tokens.folder
        encoder = open_text_encoder(self.method, device=self._device)
        tokens = InstructionTokens(self.root / f"instructions-{digest({'text': encoder.key})}")
        _encode_missing(encoder, tokens, tokens.missing(share))
        files.write_text(index, json.dumps(tokens.folder.name) + "\n")
        return tokens.folder


def needed_features(method: MethodConfig, data: DataConfig) -> tuple[str, ...]:
    """Return the names of the features to cache for a method."""
    needs = method.needs()
    read = {
        "latents": needs.clip > 0,
        "frame_latents": bool(needs.frame_latents),
        "targets": bool(needs.targets or needs.features),
        "frames": bool(needs.frames),
    }
    read["frames"] = read["frames"] or (data.shift > 0 and any(read.values()))
    return tuple(name for name, needed in read.items() if needed and name in data.cached)


def open_features(
    method: MethodConfig, data: DataConfig, sources: Sequence[Source], *, memory_limit: int = MEMORY_LIMIT
) -> list[dict[str, CachedFeature]]:
    """Open the cached features of each source, by name. Those of at most `memory_limit` bytes are read into memory.

    Raises FileNotFoundError, which names the remedy, for missing ones.
    """
    opened, names = [], needed_features(method, data)
    if names:
        reuse_fingerprints(data, sources)
    for source in sources:
        features = {}
        for name in names:
            path = _index(method, data, sources, source, name)
            if not path.is_file():
                raise _unprepared(data, name, str(source.dataset.path))
            folder = path.parent / json.loads(path.read_text())
            features[name] = CachedFeature.open(folder, episodes=source.used, memory_limit=memory_limit)
        opened.append(features)
    return opened


def open_instructions(method: MethodConfig, data: DataConfig, sources: Sequence[Source]) -> InstructionTokens | None:
    """Open the cached instruction tokens. Returns None for a method without instructions.

    Raises FileNotFoundError, which names the remedy, where tokens are missing.
    """
    if not method.needs().instruction:
        return None
    index = _instruction_index(method, data)
    if not index.is_file():
        raise _unprepared(data, "instructions", "any dataset")
    tokens = InstructionTokens(index.parent / json.loads(index.read_text()))
    if missing := tokens.missing(_instruction_texts(sources)):
        raise _unprepared(data, f"tokens of the instruction {missing[0]!r}", "these datasets")
    return tokens


def write_tokens(
    method: MethodConfig, tokens: InstructionTokens, texts: Sequence[str], *, device: torch.device | str = "cpu"
) -> None:
    """Write the tokens of further texts. The text encoder is loaded only where tokens are missing."""
    if missing := tokens.missing(texts):
        _encode_missing(open_text_encoder(method, device=device), tokens, missing)


def write_instruction_tokens(path: Path, tokens: InstructionTokens, sources: Sequence[Source]) -> None:
    """Write the tokens of the training instructions into a file of a checkpoint.

    The file is empty where there are more than `MAX_STORED_INSTRUCTIONS`, so that its size is bounded.
    """
    texts = _instruction_texts(sources)
    stored = texts if len(texts) <= MAX_STORED_INSTRUCTIONS else []
    write_tensors(path, {text: torch.from_numpy(tokens.read(text)) for text in stored})


def target_limit(method: MethodConfig, data: DataConfig, source: Source) -> int | None:
    """Return how many first frames of an episode need teacher features. None: all."""
    needs = method.needs()
    if data.target_steps is None or needs.features:
        return None
    return data.target_steps + max(needs.targets) * source.config.frame_stride


def reuse_fingerprints(data: DataConfig, sources: Sequence[Source]) -> None:
    """Store the fingerprints of unsealed datasets in the cache folder, and reuse them while the files are unchanged.

    Otherwise every process would read every video at its start. A file counts as changed when its size or time changes.
    """
    for dataset in (source.dataset for source in sources):
        if dataset.seal.checksums:
            continue
        stats = {name: (dataset.path / name).stat() for name in dataset_files(dataset.path)}
        state = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        path = Path(data.cache) / f"fingerprint-{digest({'path': str(dataset.path.resolve())})}.json"
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if stored.get("files") == state:
            dataset.fingerprint = stored["fingerprint"]
        else:
            files.write_text(path, json.dumps({"files": state, "fingerprint": dataset.fingerprint}) + "\n")


def _constructors(
    method: MethodConfig,
    data: DataConfig,
    sources: Sequence[Source],
    names: Sequence[str],
    device: torch.device | str,
) -> dict[str, Callable[[Source], cache.Feature]]:
    size, grid = method.shapes.frame_size, method.shapes.feature_grid
    constructors: dict[str, Callable[[Source], cache.Feature]] = {}
    if "latents" in names or "frame_latents" in names:
        codec = open_codec(method, data, sources, device=device)
        if "latents" in names:
            clip = method.needs().clip
            constructors["latents"] = lambda source: Latents(codec, size, clip, source.config.frame_stride)
        if "frame_latents" in names:
            constructors["frame_latents"] = lambda source: FrameLatents(codec, size)
    if "targets" in names:
        teacher = open_teacher(method, device=device)
        constructors["targets"] = lambda source: Targets(teacher, grid, target_limit(method, data, source))
    if "frames" in names:
        constructors["frames"] = lambda source: Frames(size)
    return constructors


def _encode_missing(encoder: TextEncoder, tokens: InstructionTokens, texts: Sequence[str]) -> None:
    for text in track(texts, "instructions", console=Console(stderr=True), transient=True, disable=len(texts) < 2):
        tokens.write(text, encoder.encode([text])[0].half().cpu().numpy())


def _unprepared(data: DataConfig, feature: str, datasets: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{data.cache}: {feature} not prepared for {datasets} with these settings; run agra prepare with the same "
        "recipe, stage and flags"
    )


def _instruction_texts(sources: Sequence[Source]) -> list[str]:
    """Return the distinct instructions of all training and validation episodes."""
    of_episodes = (source.dataset.instructions(episode) for source in sources for episode in source.used)
    return [*dict.fromkeys(text for texts in of_episodes for text in texts)]


def _index(method: MethodConfig, data: DataConfig, sources: Sequence[Source], source: Source, name: str) -> Path:
    """Return the index file, which holds the name of a feature's folder.

    Its name is a digest of the feature's settings.
    """
    settings: dict[str, Any] = {"dataset": source.dataset.fingerprint, "view": dict(source.dataset.view)}
    if name == "targets":
        assert method.teacher is not None
        teacher = asdict(method.teacher)
        if teacher["token"] == "patches":  # as named before there was a choice
            del teacher["token"]
        settings |= teacher | {
            "grid": method.shapes.feature_grid,
            "limit": target_limit(method, data, source),
        }
    else:
        settings["frame_size"] = method.shapes.frame_size
    if name in ("latents", "frame_latents"):
        assert method.codec is not None
        fitted = method.codec.kind == "patch_pca"
        settings |= codec_settings(method, sources) if fitted else {"codec": asdict(method.codec)}
    if name == "latents":
        settings |= {"num_frames": method.needs().clip, "stride": source.config.frame_stride}
    return Path(data.cache) / f"{name}-{digest(settings)}.json"


def _instruction_index(method: MethodConfig, data: DataConfig) -> Path:
    """Return the index file, which holds the name of the folder of a text encoder's tokens."""
    assert method.text is not None
    settings: Mapping[str, Any] = asdict(method.text)
    return Path(data.cache) / f"instructions-{digest(settings)}.json"
