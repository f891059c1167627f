"""Observations as a method takes them: frames cropped, resized and encoded, instructions looked up, states normalised."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agra.alignment.teacher import Teacher
from agra.batch import PolicyInputs
from agra.config import RunConfig
from agra.data.features.jobs import encode_frames, resize, teacher_grids_of_windows
from agra.data.normalization.normalize import NormStats
from agra.policies.instructions import Instructions
from agra.types import Observation
from agra.wam.codec import Codec, to_video


class ObservationEncoder:
    """Turns observations into a method's inputs on `device`, as training saw them."""

    def __init__(
        self,
        config: RunConfig,
        codec: Codec | None,
        instructions: Instructions | None,
        stats: Mapping[str, NormStats],
        *,
        teacher: Teacher | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """The codec, the instructions and the teacher may be None where the method reads nothing of theirs."""
        self.config, self.codec, self.instructions, self.stats = config, codec, instructions, stats
        self.teacher, self.device = teacher, torch.device(device)
        self.needs = config.method.needs_to_act()

    @torch.no_grad()
    def encode(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Raises ValueError where an observation does not fit the training data."""
        shapes = self.config.method.shapes
        frames = [self.crop(o.frame, o.embodiment)[None] for o in observations]
        states = torch.zeros(len(observations), shapes.state_dim)
        for row, observation in zip(states, observations, strict=True):
            normalized = self.stats_of(observation.embodiment).normalize("state", observation.state)
            row[: len(normalized)] = torch.as_tensor(normalized)
        rows = [self.config.data.embodiments.index(o.embodiment) for o in observations]
        return PolicyInputs(
            state=states.to(self.device),
            embodiment=torch.tensor(rows, device=self.device),
            **self._features(frames, [o.instruction for o in observations]),
        )

    def _features(self, frames: Sequence[np.ndarray], instructions: Sequence[str]) -> dict[str, Tensor]:
        """The optional fields of `PolicyInputs`, of cropped frames (F, H, W, 3) of each observation."""
        needs, shapes = self.needs, self.config.method.shapes
        fields: dict[str, Tensor] = {}
        if needs.clip:
            assert self.codec is not None
            videos = torch.cat([to_video(clip, shapes.frame_size) for clip in frames])
            fields["latents"] = self.codec.encode(videos)
        if needs.frame_latents:
            assert self.codec is not None
            codec = self.codec
            fields["frame_latents"] = torch.stack([encode_frames(codec, f, shapes.frame_size).float() for f in frames])
        if needs.frames:
            fields["frames"] = torch.stack([resize(clip, shapes.frame_size) for clip in frames])
        if needs.features:
            assert self.teacher is not None
            fields["features"] = teacher_grids_of_windows(self.teacher, frames, shapes.feature_grid).float()
        if needs.instruction:
            assert self.instructions is not None
            fields["instruction"] = torch.stack([self.instructions.tokens(text) for text in instructions])
        return {name: value.to(self.device) for name, value in fields.items()}

    def crop(self, frames: np.ndarray, embodiment: str) -> np.ndarray:
        """Frames (..., H, W, 3) cropped to the region that the embodiment's source gives."""
        return self.config.data.source(embodiment).crop(frames, "the observed frame")

    def stats_of(self, embodiment: str) -> NormStats:
        """Statistics of an embodiment. Raises ValueError for one that was not trained on."""
        if embodiment not in self.stats:
            raise ValueError(f"not trained on embodiment {embodiment!r}; it knows {sorted(self.stats)}")
        return self.stats[embodiment]
