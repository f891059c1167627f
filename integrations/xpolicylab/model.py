"""An agra policy as a policy of XPolicyLab: policy/agra/model.py, which XPolicyLab's policy server loads.

The server hands over an observation (`update_obs`) and asks for the chunk that the environment then executes (`get_action`).
Each environment (`env_idx`) is an episode of its own. `reset` begins new episodes in all of them. README.md has the commands.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from XPolicyLab.model_template import ModelTemplate
from XPolicyLab.utils.checkpoint_resolver import resolve_checkpoint_root
from XPolicyLab.utils.process_data import get_robot_action_dim_info

from agra.serving.client import PolicyClient
from agra.types import BatchPolicy, Observation, PolicyRequest, WarmsUp

FOLDER = Path(__file__).resolve().parent
POSE_DIM = 7
"""Numbers of an end-effector pose: x, y, z, and a quaternion with w first."""


class Model(ModelTemplate):
    """An agra policy behind XPolicyLab's interface. deploy.yml documents the settings."""

    def __init__(self, model_cfg: Mapping[str, Any]) -> None:
        """Open the policy and compare its sizes with the robot's.

        Raises ValueError for settings that do not fit the policy, FileNotFoundError where there is no checkpoint.
        """
        super().__init__()
        sizes = action_sizes(model_cfg["action_type"], get_robot_action_dim_info(model_cfg["env_cfg_type"]))
        self._state_keys = list(model_cfg.get("state_keys") or sizes)
        self._action_keys = list(model_cfg.get("action_keys") or sizes)
        if sorted(self._action_keys) != sorted(sizes):
            raise ValueError(f"action_keys: expected {sorted(sizes)} in the policy's order, got {self._action_keys}")
        self._splits = np.cumsum([sizes[key] for key in self._action_keys])
        self._camera = str(model_cfg.get("camera") or "cam_head")
        self._execute_steps = int(model_cfg.get("execute_steps") or 16)
        if self._execute_steps < 1:
            raise ValueError(f"execute_steps: expected at least 1, got {self._execute_steps}")
        self._seed = int(model_cfg.get("seed") or 0)
        self.model = self._policy = _open(model_cfg)
        spec = self._policy.spec
        if spec.past:
            raise ValueError(
                f"{spec.name}: this policy reads past observations (control steps {spec.past}), and XPolicyLab's websocket "
                "protocol sends only those at which a chunk begins; take a policy without them"
            )
        names = sorted(spec.embodiments)
        self._embodiment = model_cfg.get("embodiment") or (names[0] if len(names) == 1 else None)
        if self._embodiment not in names:
            raise ValueError(f"embodiment: expected one of {names}, got {self._embodiment!r}; set it in deploy.yml")
        robot = spec.embodiments[self._embodiment]
        if self._splits[-1] != robot.action_dim:
            raise ValueError(
                f"{spec.name}: its actions have {robot.action_dim} numbers, those of {model_cfg['env_cfg_type']!r} with "
                f"action_type {model_cfg['action_type']!r} have {self._splits[-1]}: {sizes}"
            )
        self._state_dim = robot.state_dim
        self._number = 0  # of the present episodes
        self._episodes: dict[int, Any] = {}
        self._observations: dict[int, Observation] = {}
        self._latest: list[int] = []

    def update_obs(self, obs: Mapping[str, Any]) -> None:
        """Take the observation of one environment."""
        self.update_obs_batch([obs])

    def update_obs_batch(self, obs_list: Sequence[Mapping[str, Any]]) -> None:
        """Take the observations of several environments. Raises ValueError for one that does not fit."""
        read = {int(obs.get("env_idx", row)): self._read(obs) for row, obs in enumerate(obs_list)}
        self._observations.update(read)
        self._latest = list(read)

    def get_action(self) -> list[dict[str, np.ndarray]]:
        """Return the next chunk for the latest observation: one map of arrays for each control step."""
        return self.get_action_batch(self._latest[:1])[0]

    def get_action_batch(self, env_idx_list: Sequence[int] | None = None) -> list[list[dict[str, np.ndarray]]]:
        """Return the chunks of these environments, by default those of the latest observations, in order."""
        rows = [int(row) for row in (self._latest if env_idx_list is None else env_idx_list)]
        missing = [row for row in rows if row not in self._observations]
        if missing or not rows:
            raise ValueError(f"no observation of environments {missing or 'at all'}; call update_obs first")
        for row in rows:
            if row not in self._episodes:
                seed = zlib.crc32(json.dumps([self._seed, self._number, row]).encode())
                self._episodes[row] = self._policy.episode(seed)
        chunks = self._policy.act_batch(
            [PolicyRequest(observation=self._observations[row], episode=self._episodes[row]) for row in rows]
        )
        return [[self._split(action) for action in chunk.actions[: self._execute_steps]] for chunk in chunks]

    def reset(self) -> None:
        """Begin new episodes. Without a chunk since the last reset, the seeds stay the same."""
        self._number += bool(self._episodes)
        for episode in self._episodes.values():
            if isinstance(episode, PolicyClient):
                episode.close()
        self._episodes, self._observations, self._latest = {}, {}, []

    def _split(self, action: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(np.asarray(action, np.float32), self._splits[:-1])
        return dict(zip(self._action_keys, parts, strict=True))

    def _read(self, obs: Mapping[str, Any]) -> Observation:
        vision, state = obs.get("vision", {}), obs.get("state", {})
        if self._camera not in vision or "color" not in vision[self._camera]:
            raise ValueError(f"vision/{self._camera}/color: missing; the observation has the cameras {sorted(vision)}")
        missing = [key for key in self._state_keys if key not in state]
        if missing:
            raise ValueError(f"state: {missing} are missing; the observation has {sorted(state)}")
        values = np.concatenate([np.asarray(state[key], np.float32).ravel() for key in self._state_keys])
        if len(values) != self._state_dim:
            raise ValueError(
                f"state: the policy takes {self._state_dim} numbers, {self._state_keys} have {len(values)}; "
                "set state_keys in deploy.yml"
            )
        return Observation(
            frame=np.asarray(vision[self._camera]["color"]),
            state=values,
            instruction=_instruction(obs),
            embodiment=self._embodiment,
        )


def action_sizes(action_type: str, robot: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the keys of an action with their sizes, in the order of XPolicyLab's datasets: each arm, then its hand."""
    if action_type not in ("joint", "ee"):
        raise ValueError(f"action_type: expected joint or ee, got {action_type!r}")
    arms, hands = robot["arm_dim"], robot["ee_dim"]
    sides = {1: ("",), 2: ("left_", "right_")}.get(len(arms))
    if sides is None or len(hands) != len(arms):
        raise ValueError(f"expected one or two arms with a hand each, got arm_dim {arms} and ee_dim {hands}")
    sizes = {}
    for side, arm, hand in zip(sides, arms, hands, strict=True):
        sizes |= {f"{side}arm_joint_state": arm} if action_type == "joint" else {f"{side}ee_pose": POSE_DIM}
        sizes[f"{side}ee_joint_state"] = hand
    return sizes


def _instruction(obs: Mapping[str, Any]) -> str:
    value = obs.get("instruction", obs.get("instructions"))
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if not isinstance(first, str):
        raise ValueError(f"instruction: expected a string or a list of strings, got {value!r}")
    return first


def _open(cfg: Mapping[str, Any]) -> BatchPolicy:
    policy = str(cfg.get("policy") or resolve_checkpoint_root(dict(cfg), FOLDER / "checkpoints", policy_dir=FOLDER))
    if "://" in policy:
        from agra.serving.batch_client import BatchClient

        return BatchClient(policy, api_key=os.environ.get("AGRA_API_KEY"), timeout=float(cfg.get("timeout") or 120))
    from agra import load_policy

    options = {"known_instructions": bool(cfg.get("known_instructions"))}
    loaded = load_policy(policy, device=str(cfg.get("device") or "cpu"), **options)
    if isinstance(loaded, WarmsUp):
        loaded.warm_up(1)
    return loaded
