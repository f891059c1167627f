"""The policy `agra`: chunks from a policy server, or from a checkpoint in this process."""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE
from torch import Tensor

from agra.serving.batch_client import BatchClient
from agra.serving.client import PolicyClient
from agra.types import BatchPolicy, Continuation, EmbodimentSpec, Observation, PolicyRequest, side_by_side, with_past
from lerobot_policy_agra.configuration_agra import AgraConfig
from lerobot_policy_agra.continuation import remaining

log = logging.getLogger(__name__)

TRIAL_SEED = "observation.trial_seed"
"""(B, 2): the episode's seed, as quotient and remainder by SEED_BASE, because float32 is exact only below 2^24."""
SEED_BASE = 2**24


class AgraPolicy(PreTrainedPolicy):
    """Client of `agra serve`, or a checkpoint of agra in this process. LeRobot sees no parameters.

    Every row of a batch is an episode of its own, and one forward pass computes all rows. One lock guards reset and
    inference, because real-time chunking predicts in a thread of its own. Raises `agra.serving.client.ServerLost` for
    an unreachable server, ImportError for a checkpoint without agra's training parts, and ValueError for dimensions
    that differ from the policy's.
    """

    config_class = AgraConfig
    name = "agra"

    def __init__(self, config: AgraConfig, **_: Any) -> None:
        """Connect or load, and compare the policy's description with the features of `config`."""
        super().__init__(config)
        self._lock = threading.Lock()
        self._policy = _open(config)
        self._spec = self._policy.spec
        self._embodiment = _only(config.embodiment, self._spec.embodiments, "embodiment", f"policy {self._spec.name}")
        self._check_features(self._spec.embodiments[self._embodiment])
        self._next_seed, self._rows = config.seed, 0
        self._episodes: list[Any] = []
        self._forget()

    def _check_features(self, robot: EmbodimentSpec) -> None:
        """Compare the widths with the policy's. Without features, as in lerobot-rollout, take the policy's."""
        features = {
            OBS_STATE: (self.config.robot_state_feature, FeatureType.STATE, robot.state_dim),
            ACTION: (self.config.action_feature, FeatureType.ACTION, robot.action_dim),
        }
        for name, (feature, kind, size) in features.items():
            if feature is None:
                group = self.config.output_features if name == ACTION else self.config.input_features
                if group is not None:
                    group[name] = PolicyFeature(type=kind, shape=(size,))
            elif tuple(feature.shape) != (size,):
                raise ValueError(
                    f"{name}: {self._spec.name} at {self.config.source} has {size} dimensions for {self._embodiment}, "
                    f"but here there are {tuple(feature.shape)}"
                )

    def _forget(self) -> None:
        for episode in self._episodes:
            if isinstance(episode, PolicyClient):
                episode.close()
        self._episodes = []
        self._rows, self._step = 0, 0
        self._chunks: np.ndarray | None = None  # (B, K, D), the latest
        self._earlier: list[list[Observation]] = []

    def reset(self) -> None:
        """Begin new episodes with the next observation."""
        with self._lock:
            self._next_seed += self._rows
            self._forget()

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action of every row (B, D). A new chunk is requested after `n_action_steps`."""
        with self._lock:
            self._begin(batch)
            used_up = self._chunks is None or self._step >= min(self.config.n_action_steps, self._chunks.shape[1])
            observations = self._observations(batch) if used_up or self._spec.past else []
            if used_up:
                self._request(observations)
            if self._spec.past:
                for earlier, observation in zip(self._earlier, observations, strict=True):
                    earlier.append(observation)
                    del earlier[: min(self._spec.past)]
            assert self._chunks is not None
            actions, self._step = self._chunks[:, self._step], self._step + 1
            return torch.from_numpy(actions.copy()).to(self.config.device)

    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        *,
        inference_delay: int = 0,
        prev_chunk_left_over: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """A chunk for every row (B, K, D).

        In real-time chunking it continues the rest of the last chunk, of which `inference_delay` actions will have been
        executed when this one arrives. Raises ValueError for a policy that reads past observations, which are missing
        here.
        """
        if self._spec.past:
            raise ValueError(f"{self._spec.name} reads past observations: use select_action (--inference.type=sync)")
        with self._lock:
            self._begin(batch)
            continuation = self._continuation(inference_delay, prev_chunk_left_over)
            return torch.from_numpy(self._request(self._observations(batch), continuation)).to(self.config.device)

    def supports_rtc(self) -> bool:
        """True, but for a policy that reads past observations."""
        return not self._spec.past

    def init_rtc_processor(self) -> None:
        """Say which settings of real-time chunking the policy does not take."""
        log.warning(
            "the policy guides a chunk by its own schedule: "
            "prefix_attention_schedule, max_guidance_weight and execution_horizon have no effect"
        )

    def _continuation(self, delay: int, handed: Tensor | None) -> Continuation | None:
        if handed is None or self._chunks is None:
            return None
        if self._rows != 1:
            raise ValueError(f"real-time chunking: expected one robot, got a batch of {self._rows}")
        rest = remaining(self._chunks[0], handed.detach().cpu().numpy())
        if rest is None:
            log.warning("the actions left over are no part of the last chunk: the next chunk does not continue them")
        if rest is None or not len(rest):
            return None
        return Continuation(actions=rest, delay=min(delay, len(rest)))

    def _begin(self, batch: Mapping[str, Any]) -> None:
        """Begin an episode for every row, if none is running."""
        rows = len(batch[OBS_STATE])
        if self._rows == rows:
            return
        if self._rows:
            raise ValueError(f"batch: expected {self._rows} rows until the next reset, got {rows}")
        self._rows, self._earlier = rows, [[] for _ in range(rows)]
        given = batch.get(TRIAL_SEED)
        seeds = [self._next_seed + row for row in range(rows)]
        if given is not None:
            seeds = [int(high) * SEED_BASE + int(low) for high, low in given.tolist()]
        self._episodes = [self._policy.episode(seed) for seed in seeds]

    def _observations(self, batch: Mapping[str, Any]) -> list[Observation]:
        cameras = [batch[key] for key in self._cameras(batch)]
        pictures = [[_frame(camera[row]) for camera in cameras] for row in range(self._rows)]
        names = self._spec.embodiments[self._embodiment].views
        if names and len(cameras) != 1 + len(names):
            raise ValueError(
                f"camera: {self._spec.name} reads {1 + len(names)} cameras, the first and {', '.join(names)}; choose them"
                f" in that order with --policy.camera, got {self.config.camera or 'none'}"
            )
        if not names:
            pictures = [[side_by_side(row)] for row in pictures]
        states = batch[OBS_STATE].detach().cpu().numpy().astype(np.float32)
        tasks = batch.get("task") or ""
        tasks = [tasks] * self._rows if isinstance(tasks, str) else tasks
        return [
            Observation(
                frame=frame,
                views=dict(zip(names, views, strict=True)),
                state=state,
                instruction=task,
                embodiment=self._embodiment,
            )
            for (frame, *views), state, task in zip(pictures, states, tasks, strict=True)
        ]

    def _cameras(self, batch: Mapping[str, Any]) -> list[str]:
        present = {
            key.removeprefix(f"{OBS_IMAGES}."): key
            for key in batch
            if key == OBS_IMAGE or key.startswith(f"{OBS_IMAGES}.")
        }
        wanted = [name.strip().removeprefix(f"{OBS_IMAGES}.") for name in (self.config.camera or "").split(",")]
        return [present[_only(name or None, present, "camera", "observation")] for name in wanted]

    def _request(self, observations: Sequence[Observation], continuation: Continuation | None = None) -> np.ndarray:
        """Request a chunk for every row at once, and keep them."""
        requests = [
            PolicyRequest(
                observation=with_past(observation, earlier, self._spec.past), episode=episode, continuation=continuation
            )
            for observation, earlier, episode in zip(observations, self._earlier, self._episodes, strict=True)
        ]
        chunks = self._policy.act_batch(requests)
        self._chunks = np.stack([chunk.actions for chunk in chunks]).astype(np.float32)
        self._step = 0
        return self._chunks

    # --- methods of LeRobot's policies that have no use here ----------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> NoReturn:
        """Refuse training."""
        self.config.get_optimizer_preset()

    def get_optim_params(self) -> NoReturn:
        """Refuse training."""
        self.config.get_optimizer_preset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> "AgraPolicy":
        """Read the config, which is JSON, and open its policy. The folder holds no weights."""
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("dataset_")}
        kwargs.pop("strict", None)
        read = config or PreTrainedConfig.from_pretrained(pretrained_name_or_path, **kwargs)
        return cls(read).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: Any = None) -> None:
        self.config._save_pretrained(save_directory)


def _open(config: AgraConfig) -> BatchPolicy:
    if config.checkpoint is None:
        return BatchClient(config.server, api_key=os.environ.get("AGRA_API_KEY"), timeout=config.timeout)
    # Imported here: it loads diffusers and transformers, which a client does not need.
    try:
        from agra.policies.load import load_policy
    except ImportError as error:
        raise ImportError(
            f"--policy.checkpoint: {error}; install it with: pip install '.[policy]' in a checkout of agra"
        ) from error
    return load_policy(config.checkpoint, device=config.device or "cpu")


def _only(name: str | None, available: Mapping[str, Any], what: str, owner: str) -> str:
    """The named one of `available`, or the only one."""
    if name is None and len(available) == 1:
        return next(iter(available))
    if name in available:
        return name
    problem = "has several" if name is None and available else f"has no {name!r}" if name else "has none"
    raise ValueError(
        f"{what}: the {owner} {problem}; choose with --policy.{what}, available: {', '.join(available) or 'none'}"
    )


def _frame(image: Tensor) -> np.ndarray:
    """The picture (H, W, 3) uint8 of an image (3, H, W) in [0, 1]. Exact for what was uint8."""
    return (image.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
