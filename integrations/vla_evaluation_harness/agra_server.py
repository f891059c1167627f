# /// script
# requires-python = ">=3.11"
# dependencies = ["vla-eval>=0.8", "agra[client]"]
#
# [tool.uv.sources]
# agra = { path = "../..", editable = true }
# ///
"""A model server of vla-evaluation-harness (`vla-eval`) that answers with an agra policy.

The policy is a checkpoint or a bundled policy in this process (needs agra[policy]), or the address of `agra serve`, which
needs no torch. The harness asks once per control step. The first `execute_steps` actions of a chunk are answered one by one,
then the policy computes the next chunk. README.md has the commands.
"""

import json
import os
import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import IMAGE_RGB, LANGUAGE, DimSpec
from vla_eval.types import Action
from vla_eval.types import Observation as Message

from agra.serving.client import PolicyClient
from agra.types import BatchPolicy, Observation, PolicyRequest, WarmsUp, with_past

STATE_KEYS = ("states", "state")
"""Keys under which the harness's benchmarks send their state."""


@dataclass
class _Episode:
    source: Any  # of `BatchPolicy.episode`
    earlier: deque[Observation] = field(default_factory=deque)  # for a policy that reads past observations


class AgraModelServer(PredictModelServer):
    """An agra policy behind the harness's protocol. A session of the harness plays one episode at a time."""

    def __init__(
        self,
        policy: str,
        camera: str | None = None,
        state_keys: list[str] | None = None,
        embodiment: str | None = None,
        execute_steps: int = 8,
        seed: int = 0,
        device: str = "cpu",
        known_instructions: bool = False,
        timeout: float = 120.0,
        max_batch_size: int = 1,
        max_wait_time: float = 0.01,
        observation_params: dict[str, Any] | None = None,
        action_spec: dict[str, dict[str, Any]] | None = None,
        observation_spec: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Open the policy and let it act once, so that the first episode does not wait.

        Args:
            policy: a checkpoint or run folder, a bundled policy, or a server's address such as ws://127.0.0.1:8000.
                The variable AGRA_API_KEY holds the server's key.
            camera: key of the frame among the observation's images. Needed if there are several.
            state_keys: keys of the state, joined in order. KEY/PART reads a part of a map. By default `states` or `state`.
            embodiment: robot of a checkpoint that has several.
            execute_steps: executed actions of each chunk.
            seed: the noise of an episode follows from it and from the harness's task and episode number alone.
            device: torch device of a checkpoint.
            known_instructions: load no text encoder for a checkpoint, and refuse instructions that it does not know.
            timeout: seconds for an answer of a server.
            max_batch_size: observations of different sessions computed together.
            max_wait_time: seconds to wait for a full batch.
            observation_params: parameters that the harness hands to the benchmark. By default `send_state`.
            action_spec: names of the harness for parts of the action, each with `dims` and `format`, in order. The
                harness compares them with the benchmark's before the first episode.
            observation_spec: the same for images, state and language.
        """
        if execute_steps < 1:
            raise ValueError(f"execute_steps: expected at least 1, got {execute_steps}")
        super().__init__(chunk_size=execute_steps, max_batch_size=max_batch_size, max_wait_time=max_wait_time)
        self._policy = _open(policy, device=device, known_instructions=known_instructions, timeout=timeout)
        if isinstance(self._policy, WarmsUp):
            self._policy.warm_up(max_batch_size)
        spec = self._policy.spec
        if embodiment is None and len(spec.embodiments) > 1:
            raise ValueError(f"embodiment: the policy has several, name one of {sorted(spec.embodiments)}")
        self._embodiment = next(iter(spec.embodiments)) if embodiment is None else embodiment
        if self._embodiment not in spec.embodiments:
            raise ValueError(f"embodiment: expected one of {sorted(spec.embodiments)}, got {embodiment!r}")
        self._robot = spec.embodiments[self._embodiment]
        self._past = spec.past
        self._camera, self._state_keys, self._seed = camera, state_keys, seed
        self._observation_params = {"send_state": True} if observation_params is None else observation_params
        self._action_spec = _specs(action_spec) or {"actions": DimSpec("actions", self._robot.action_dim, "raw")}
        if (total := sum(part.dims for part in self._action_spec.values())) != self._robot.action_dim:
            raise ValueError(f"action_spec: expected {self._robot.action_dim} dims in total, got {total}")
        self._observation_spec = _specs(observation_spec) or {camera or "image": IMAGE_RGB, "language": LANGUAGE}
        self._episodes: dict[str, _Episode] = {}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Return the parts of an action, for the harness's comparison with the benchmark's."""
        return self._action_spec

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Return the parts of an observation, for the harness's comparison with the benchmark's."""
        return self._observation_spec

    def get_observation_params(self) -> dict[str, Any]:
        """Return parameters for the benchmark."""
        return self._observation_params

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Begin an episode, also where the harness gave up the last one without ending it."""
        self._forget(ctx)
        key = json.dumps([self._seed, config.get("task", {})], sort_keys=True)
        earlier: deque[Observation] = deque(maxlen=-min(self._past, default=0))
        self._episodes[ctx.session_id] = _Episode(self._policy.episode(zlib.crc32(key.encode())), earlier)
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the episode."""
        self._forget(ctx)
        await super().on_episode_end(result, ctx)

    async def on_observation(self, obs: Message, ctx: SessionContext) -> None:
        """Answer with the next action of the present chunk, or of a new one.

        Raises ValueError for an observation that does not fit. The harness then receives an error, and no other session's
        batch is affected.
        """
        episode = self._episodes.get(ctx.session_id)
        if episode is None:
            raise ValueError("an observation came before episode_start; start an episode first")
        observation = self._read(obs)
        await super().on_observation({"observation": observation}, ctx)
        episode.earlier.append(observation)

    def predict_batch(self, obs_batch: list[Message], ctx_batch: list[SessionContext]) -> list[Action]:
        """Compute one chunk for each session, from observations that `on_observation` has read."""
        requests = []
        for message, ctx in zip(obs_batch, ctx_batch, strict=True):
            episode = self._episodes[ctx.session_id]
            observation = with_past(message["observation"], tuple(episode.earlier), self._past)
            requests.append(PolicyRequest(observation=observation, episode=episode.source))
        return [{"actions": chunk.actions} for chunk in self._policy.act_batch(requests)]

    def _forget(self, ctx: SessionContext) -> None:
        episode = self._episodes.pop(ctx.session_id, None)
        if episode is not None and isinstance(episode.source, PolicyClient):
            episode.source.close()

    def _read(self, message: Message) -> Observation:
        images = message.get("images") or {}
        camera = next(iter(images)) if self._camera is None and len(images) == 1 else self._camera
        if camera is None or camera not in images:
            wanted = "the only image" if self._camera is None else repr(self._camera)
            raise ValueError(f"camera: expected {wanted} in the observation, got {sorted(images)}; set camera to one")
        keys = self._state_keys or [key for key in STATE_KEYS if key in message][:1]
        parts = [np.asarray(_lookup(message, key), np.float32).ravel() for key in keys]
        state = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if len(state) != self._robot.state_dim:
            sizes = {key: len(part) for key, part in zip(keys, parts, strict=True)}
            raise ValueError(
                f"state: the policy takes {self._robot.state_dim} numbers of {self._embodiment!r}, got {len(state)} from "
                f"{sizes}; set state_keys to keys of the observation, which has {sorted(message)}"
            )
        if "task_description" not in message:
            raise ValueError(f"task_description: missing in the observation, which has {sorted(message)}")
        return Observation(
            frame=np.asarray(images[camera]),
            state=state,
            instruction=str(message["task_description"]),
            embodiment=self._embodiment,
        )


def _open(policy: str, *, device: str, known_instructions: bool, timeout: float) -> BatchPolicy:
    if "://" in policy:
        from agra.serving.batch_client import BatchClient

        return BatchClient(policy, api_key=os.environ.get("AGRA_API_KEY"), timeout=timeout)
    from agra import load_policy

    return load_policy(policy, device=device, known_instructions=known_instructions)


def _specs(parts: dict[str, dict[str, Any]] | None) -> dict[str, DimSpec]:
    return {name: DimSpec.from_dict({"name": name, **part}) for name, part in (parts or {}).items()}


def _lookup(message: Message, key: str) -> Any:
    value: Any = message
    for name in key.split("/"):
        if not isinstance(value, dict) or name not in value:
            keys = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"state_keys: {key!r} is not in the observation; {name!r} was looked up in {keys}")
        value = value[name]
    return value


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(AgraModelServer)
