"""Observations as a method takes them: frames cropped, resized and encoded, instructions looked up, states normalised."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
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
        read = {*self.needs.frame_latents, *self.needs.frames, *self.needs.states, *self.needs.features}
        self._past_frames = tuple(sorted(frame for frame in read if frame < 0))
        strides = {source.frame_stride for source in config.data.sources}
        if self._past_frames and len(strides) > 1:
            raise ValueError(
                f"data.frame_stride: {config.method.kind} reads past frames, so all sources need the same stride, got"
                f" {sorted(strides)}"
            )
        self.past = tuple(frame * min(strides) for frame in self._past_frames)
        """Control steps before the present one whose observations it reads."""

    @torch.no_grad()
    def encode(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Raises ValueError where an observation does not fit the training data."""
        moments = [self._moments(observation) for observation in observations]
        states = [{frame: self._state(seen) for frame, seen in moment.items()} for moment in moments]
        frames = [
            {frame: self.crop(seen.frame, seen.embodiment) for frame, seen in moment.items()} for moment in moments
        ]
        fields = self._features(frames, [o.instruction for o in observations])
        if self.needs.states:
            chosen = [torch.stack([state[frame] for frame in self.needs.states]) for state in states]
            fields["states"] = torch.stack(chosen).to(self.device)
        rows = [self.config.data.embodiments.index(o.embodiment) for o in observations]
        return PolicyInputs(
            state=torch.stack([state[0] for state in states]).to(self.device),
            embodiment=torch.tensor(rows, device=self.device),
            **fields,
        )

    def _moments(self, observation: Observation) -> dict[int, Observation]:
        """The observation and those before it, by their frame numbers. Without past ones the present one stands for them."""
        past = observation.past or (observation,) * len(self.past)
        if len(past) != len(self.past):
            raise ValueError(f"expected past observations at the control steps {self.past}, got {len(past)}")
        return dict(zip((*self._past_frames, 0), (*past, observation), strict=True))

    def _state(self, observation: Observation) -> Tensor:
        """(S,) normalised, padded with zeros."""
        normalized = torch.as_tensor(self.stats_of(observation.embodiment).normalize("state", observation.state))
        return F.pad(normalized, (0, self.config.method.shapes.state_dim - len(normalized)))

    def _features(self, crops: Sequence[Mapping[int, np.ndarray]], instructions: Sequence[str]) -> dict[str, Tensor]:
        """The optional fields of `PolicyInputs`, of each observation's cropped frames by their numbers."""
        needs, shapes = self.needs, self.config.method.shapes

        def select(numbers: Sequence[int]) -> list[np.ndarray]:
            return [np.stack([frames[number] for number in numbers]) for frames in crops]

        fields: dict[str, Tensor] = {}
        if needs.clip:
            assert self.codec is not None
            videos = torch.cat([to_video(clip, shapes.frame_size) for clip in select([0])])
            fields["latents"] = self.codec.encode(videos)
        if needs.frame_latents:
            assert self.codec is not None
            codec = self.codec
            fields["frame_latents"] = torch.stack(
                [encode_frames(codec, clip, shapes.frame_size).float() for clip in select(needs.frame_latents)]
            )
        if needs.frames:
            fields["frames"] = torch.stack([resize(clip, shapes.frame_size) for clip in select(needs.frames)])
        if needs.features:
            assert self.teacher is not None
            fields["features"] = teacher_grids_of_windows(
                self.teacher, select(needs.features), shapes.feature_grid
            ).float()
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
