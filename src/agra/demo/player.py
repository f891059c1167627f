"""One policy in one simulator of the demo: its answers, what it read and imagined for them, and their execution."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from agra.diagnostics.instruments.attention import action_attention
from agra.diagnostics.metrics import attention_in_mask_ratio, mask_to_grid
from agra.diagnostics.visual_reliance import blank
from agra.methods.method import Attends, ReadsTokens
from agra.policies.policy import MethodPolicy
from agra.precision import autocast_to_weights
from agra.simulators.tabletop.hands import SIDES
from agra.simulators.tabletop.tabletop_env import Tabletop
from agra.types import (
    ActionChunk,
    ImaginingPolicy,
    Observation,
    Policy,
    PolicyRequest,
    Trial,
    past_of,
    with_past,
)

OpenPolicy = Callable[[str, Tabletop], Policy]
"""Opens a policy by name. The simulator is the one that it will act in, for the scripted expert."""


@runtime_checkable
class _Closes(Protocol):
    """A policy that holds a connection."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """Attention of the action head over the tokens of the observed frame, mean over the blocks."""

    grid: np.ndarray  # (h, w), summing to the observed frame's share of all attention
    on_mask: float  # share of it on the tokens of the acting hand and its object
    uniform_on_mask: float  # the same for uniform attention


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """A chunk of actions and its origin. Without `unmasked`, nothing was masked or the policy cannot repeat its noise."""

    chunk: ActionChunk
    seen: np.ndarray  # (H, W, 3) uint8, the frame that the policy received
    attention: Attention | None  # None where the policy has none
    unmasked: ActionChunk | None  # the chunk for the frame without the mask, from the same noise
    deviation: float | None  # distance of the two chunks, normalised as the policy predicts them


def masked(observation: Observation, mask: np.ndarray | None) -> Observation:
    """The observation with the frame's mean colour at the pixels of `mask` (H, W) bool, past frames included."""
    if mask is None:
        return observation
    frame = np.where(mask[..., None], blank(observation.frame), observation.frame)
    return replace(observation, frame=frame, past=tuple(masked(moment, mask) for moment in observation.past))


class Player:
    """A policy in a simulator of its own. Without a hand from outside, it plays as `agra evaluate` does."""

    def __init__(self, name: str, open_policy: OpenPolicy, *, execute_steps: int) -> None:
        self.name, self.execute_steps = name, execute_steps
        self.simulator = Tabletop()
        self.policy = open_policy(name, self.simulator)
        self.past = past_of(self.policy)

    def reset(self, trial: Trial, mask: np.ndarray | None, *, judged: bool) -> None:
        """Start an episode and request its first chunk. `judged`: the instruction is the trial's task."""
        self.observation = self.simulator.reset(trial)
        if isinstance(self.policy, MethodPolicy):
            self._episode = self.policy.episode(trial.seed)  # the policy itself may play for others too
        else:
            self.policy.reset(trial.seed)
        self._earlier: list[Observation] = []
        self.steps, self.judged, self.success = 0, judged, False
        self.limit = self.simulator.max_steps
        self.ask(mask)

    def instruct(self, trial: Trial, mask: np.ndarray | None, *, judged: bool) -> None:
        """Go on with another instruction, with as many control steps as a new episode has."""
        self.simulator.instruct(trial)
        self.judged = judged
        self.look(mask)

    def look(self, mask: np.ndarray | None) -> None:
        """Observe the scene after a change from outside, and go on with as many control steps as a new episode has."""
        self.observation, self.success = self.simulator.observe(), False
        self.limit = self.steps + self.simulator.max_steps
        self.ask(mask)

    def ask(self, mask: np.ndarray | None) -> None:
        """Request a chunk for the present observation. The rest of the last one is not executed."""
        observation = with_past(self.observation, self._earlier, self.past)
        seen = masked(observation, mask)
        self.executed = 0
        if not isinstance(self.policy, MethodPolicy):
            act = self.policy.act_and_imagine if isinstance(self.policy, ImaginingPolicy) else self.policy.act
            self.answer = Answer(chunk=act(seen), seen=seen.frame, attention=None, unmasked=None, deviation=None)
            return
        policy, start = self.policy, self._episode.get_state()
        (chunk,) = policy.act_batch([PolicyRequest(observation=seen, episode=self._episode, imagine=policy.imagines)])
        unmasked, deviation = None, None
        if mask is not None:
            (unmasked,) = policy.act_batch([PolicyRequest(observation=observation, episode=_generator(start))])
            both = policy.normalize(np.stack([chunk.actions, unmasked.actions]), observation.embodiment)
            deviation = float(np.linalg.norm(both[0] - both[1]))
        attention = self._attention(policy, seen, start)
        self.answer = Answer(chunk=chunk, seen=seen.frame, attention=attention, unmasked=unmasked, deviation=deviation)

    def step(self, mask: np.ndarray | None) -> None:
        """Execute an action, after a new request where the last chunk is used up. A finished episode stays as it is."""
        if self.finished:
            return
        if self.executed >= min(self.execute_steps, len(self.answer.chunk.actions)):
            self.ask(mask)
        self._earlier = [*self._earlier, self.observation][min((0, *self.past)) :] if self.past else []
        step = self.simulator.step(self.answer.chunk.actions[self.executed])
        self.executed += 1
        self.steps += 1
        self.observation = step.observation
        self.success = self.judged and step.success

    @property
    def finished(self) -> bool:
        """True where the episode has succeeded or used up its control steps."""
        return self.success or self.steps >= self.limit

    @property
    def imagined(self) -> np.ndarray | None:
        """The predicted frame of the present moment, (h, w, 3) uint8. None for a policy that predicts no video."""
        video = self.answer.chunk.imagined
        if video is None:
            return None
        return video[round(self.executed * (len(video) - 1) / len(self.answer.chunk.actions))]

    def path(self, chunk: ActionChunk) -> np.ndarray:
        """Positions (N, 3) of the hand that moves farther in a chunk: the present one, then those still to come."""
        hands = self.simulator.hands
        targets = [chunk.actions[self.executed :, hands.dims(side)][:, :3] for side in SIDES]
        present = [self.observation.state[hands.dims(side)][None, :3] for side in SIDES]
        paths = [np.concatenate(both) for both in zip(present, targets, strict=True)]
        return max(paths, key=lambda path: float(np.linalg.norm(path[-1] - path[0])))

    def close(self) -> None:
        """Free the renderer and the policy's connection, if it has one."""
        self.simulator.close()
        if isinstance(self.policy, _Closes):
            self.policy.close()

    @torch.no_grad()
    def _attention(self, policy: MethodPolicy, seen: Observation, start: torch.Tensor) -> Attention | None:
        """Attention of the answer to `seen` whose noise begins at the generator's state `start`."""
        method = policy.method
        if not (isinstance(method, ReadsTokens) and isinstance(method, Attends)):
            return None
        inputs, noise = policy.encode([seen]), policy.noise(1, _generator(start))
        with autocast_to_weights(method):
            hidden = method.hidden(inputs, noise)
        steps = policy.options.get("action_steps")
        maps = action_attention(method, hidden, inputs, noise, method.token_grid, steps=steps)
        grid = maps[0].mean(dim=0)[0].float().cpu().numpy()
        pixels = policy.crop(self.simulator.interaction_mask()[..., None], seen.embodiment)[..., 0]
        tokens = mask_to_grid(pixels, grid.shape)
        return Attention(
            grid=grid,
            on_mask=float(attention_in_mask_ratio(grid, tokens)),
            uniform_on_mask=float(tokens.mean()),
        )


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
