"""Encodes observations for a method: crops, resizes and encodes frames, looks up instructions, normalises states."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agra.alignment.teacher import Teacher
from agra.batch import PolicyInputs
from agra.checkpoints.recorded_sizes import RecordedSizes
from agra.config import RunConfig
from agra.data.features.jobs import encode_frames, resize, teacher_grids_of_windows
from agra.data.normalization.normalize import NormStats
from agra.policies.instructions import Instructions
from agra.types import Observation, cameras_of
from agra.wam.codec import Codec, to_video


class ObservationEncoder:
    """Encodes observations as a method's inputs on `device`, as in training."""

    def __init__(
        self,
        config: RunConfig,
        codec: Codec | None,
        instructions: Instructions | None,
        stats: Mapping[str, NormStats],
        *,
        teacher: Teacher | None = None,
        recorded_sizes: RecordedSizes | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`codec`, `instructions` and `teacher` may be None where the method does not need them.

        Of an embodiment in `recorded_sizes`, observations must have frames of these sizes. Frames of other embodiments
        may have any size.
        """
        self.config, self.codec, self.instructions, self.stats = config, codec, instructions, stats
        self.teacher, self.recorded_sizes, self.device = teacher, recorded_sizes or {}, torch.device(device)
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
        """Control steps of the past observations that the method reads, counted from the present one."""

    @torch.no_grad()
    def encode(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Encode a batch of observations. Raises ValueError where an observation does not fit the training data."""
        moments = [self._moments(observation) for observation in observations]
        states = [{number: self._state(o) for number, o in moment.items()} for moment in moments]
        frames = [{number: self.picture(o) for number, o in moment.items()} for moment in moments]
        fields = self._features(frames, [self.instruction(o) for o in observations])
        if self.needs.states:
            rows_of_states = [torch.stack([state[number] for number in self.needs.states]) for state in states]
            fields["states"] = torch.stack(rows_of_states).to(self.device)
        rows = [self.config.data.embodiments.index(o.embodiment) for o in observations]
        return PolicyInputs(
            state=torch.stack([state[0] for state in states]).to(self.device),
            embodiment=torch.tensor(rows, device=self.device),
            **fields,
        )

    def _moments(self, observation: Observation) -> dict[int, Observation]:
        """Return the observation and the past ones by frame number.

        The present one replaces past ones that are missing.
        """
        past = observation.past or (observation,) * len(self.past)
        if len(past) != len(self.past):
            raise ValueError(f"expected past observations at the control steps {self.past}, got {len(past)}")
        return dict(zip((*self._past_frames, 0), (*past, observation), strict=True))

    def _state(self, observation: Observation) -> Tensor:
        """Return the (S,) normalised state, padded with zeros."""
        normalized = torch.as_tensor(self.stats_of(observation.embodiment).normalize("state", observation.state))
        return F.pad(normalized, (0, self.config.method.shapes.state_dim - len(normalized)))

    def _features(self, crops: Sequence[Mapping[int, np.ndarray]], instructions: Sequence[str]) -> dict[str, Tensor]:
        """Make the optional fields of `PolicyInputs` from each observation's cropped frames by number."""
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
            # A CPU pays for padding, a GPU hardly.
            alone = self.device.type == "cpu"
            fields["features"] = teacher_grids_of_windows(
                self.teacher, select(needs.features), shapes.feature_grid, alone=alone
            ).float()
        if needs.instruction:
            assert self.instructions is not None
            fields["instruction"] = torch.stack([self.instructions.tokens(text) for text in instructions])
        return {name: value.to(self.device) for name, value in fields.items()}

    def instruction(self, observation: Observation) -> str:
        """Return the instruction of an observation as in training, without the prefixes of the embodiment's source."""
        return self.config.data.source(observation.embodiment).without_prefixes(observation.instruction)

    def picture(self, observation: Observation) -> np.ndarray:
        """Make the picture (H, W, 3) of an observation as in training: cropped, with extra cameras to the right.

        The extra cameras are `Observation.views`, under their names without "observation.images.". A joined frame holds
        them already. Raises ValueError for a missing view, and for frames of another size than the recorded ones that
        the crop was chosen for.
        """
        source, names = self.config.data.source(observation.embodiment), self.views_of(observation.embodiment)
        cameras = cameras_of(observation, names)
        if len(cameras) == 1:
            return self.crop(observation.frame, observation.embodiment)
        named = ["the observed frame", *names]
        self._check_sizes(cameras, named, observation.embodiment)
        return source.picture(cameras, named)

    def views_of(self, embodiment: str) -> tuple[str, ...]:
        """Return the names of an embodiment's extra cameras in `Observation.views`."""
        cameras = self.config.data.source(embodiment).extra_cameras
        return tuple(camera.removeprefix("observation.images.") for camera in cameras)

    def sizes_of(self, embodiment: str) -> tuple[tuple[int, int], ...]:
        """Return the recorded (H, W) of an embodiment's camera and extra cameras, or nothing where any size fits."""
        return tuple(self.recorded_sizes.get(embodiment, {}).values())

    def crop(self, frames: np.ndarray, embodiment: str) -> np.ndarray:
        """Crop frames (..., H, W, 3) to the region of the embodiment's source.

        Raises ValueError where the source has extra cameras, because each camera is cropped before they stand side by
        side, and for frames of another size than the recorded ones.
        """
        source = self.config.data.source(embodiment)
        if source.crops_each_camera:
            raise ValueError(
                "the observed frame: data.crop_rows and data.crop_columns crop each camera alone, expected"
                f" {', '.join(self.views_of(embodiment))} in Observation.views, got one joined frame; pass each"
                " camera by itself, or train without the crop"
            )
        self._check_sizes([frames], ["the observed frame"], embodiment)
        return source.crop(frames, "the observed frame")

    def _check_sizes(self, cameras: Sequence[np.ndarray], names: Sequence[str], embodiment: str) -> None:
        """Raise ValueError for frames (..., H, W, 3) of another size than the recorded ones that the crop counts in."""
        sizes = self.sizes_of(embodiment)
        if not sizes:
            return
        for frames, name, size in zip(cameras, names, sizes, strict=True):
            if frames.shape[-3:-1] != size:
                raise ValueError(
                    f"{name}: expected {size[0]} x {size[1]} pixels as in the training data, whose crop"
                    f" (data.crop_rows, data.crop_columns) counts pixels, got {frames.shape[-3]} x {frames.shape[-2]};"
                    " set the camera to that size, or scale its frames to it"
                )

    def stats_of(self, embodiment: str) -> NormStats:
        """Return an embodiment's statistics. Raises ValueError for an embodiment that was not trained on."""
        if embodiment not in self.stats:
            raise ValueError(f"not trained on embodiment {embodiment!r}; expected one of {sorted(self.stats)}")
        return self.stats[embodiment]
