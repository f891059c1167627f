"""Observations as the model takes them: frames cropped, resized and encoded, instructions looked up, states normalised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from agra.config import RunConfig
from agra.data.cameras import crop
from agra.data.normalize import NormStats
from agra.instructions import Instructions
from agra.types import Observation
from agra.wam.codec import Codec, to_video


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """Observations as the model takes them."""

    observation_latent: Float[Tensor, "B C 1 h w"]
    instruction: Float[Tensor, "B L E"]
    state: Float[Tensor, "B S"]
    embodiment: Int[Tensor, "B"]

    def rows(self, indices: Sequence[int]) -> "PolicyInputs":
        """Some of the observations."""
        return PolicyInputs(**{name: value[list(indices)] for name, value in vars(self).items()})


class ObservationEncoder:
    """Turns observations into model inputs on `device`, as training saw them."""

    def __init__(
        self,
        config: RunConfig,
        codec: Codec,
        instructions: Instructions,
        stats: Mapping[str, NormStats],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.codec, self.instructions, self.stats = config, codec, instructions, stats
        self.device = torch.device(device)

    @torch.no_grad()
    def encode(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Raises ValueError where an observation does not fit the training data."""
        model, head = self.config.model, self.config.model.action_dit
        videos = [to_video(self.crop(o.frame, o.embodiment)[None], model.frame_size) for o in observations]
        states = torch.zeros(len(observations), head.state_dim)
        for row, observation in zip(states, observations, strict=True):
            normalized = self.stats_of(observation.embodiment).normalize("state", observation.state)
            row[: len(normalized)] = torch.as_tensor(normalized)
        rows = [self.config.data.embodiments.index(o.embodiment) for o in observations]
        tokens = [self.instructions.tokens(o.instruction).to(self.device) for o in observations]
        return PolicyInputs(
            observation_latent=self.codec.encode(torch.cat(videos)).to(self.device),
            instruction=torch.stack(tokens),
            state=states.to(self.device),
            embodiment=torch.tensor(rows, device=self.device),
        )

    def crop(self, frames: np.ndarray, embodiment: str) -> np.ndarray:
        """Frames (..., H, W, 3) cropped as the embodiment's source says."""
        return crop(frames, self.config.data.source(embodiment), "the observed frame")

    def stats_of(self, embodiment: str) -> NormStats:
        """Statistics of an embodiment. Raises ValueError for one that was not trained on."""
        if embodiment not in self.stats:
            raise ValueError(f"not trained on embodiment {embodiment!r}; it knows {sorted(self.stats)}")
        return self.stats[embodiment]
