"""What crosses between rooms: observations, action chunks, trials, episodes, and the two protocols.

numpy only, so that a simulator or a robot client can import it without torch. Value ranges are stated once, here:
frames are uint8 RGB, height x width x channel; states and actions are float32 in the robot's own units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

REGIMES = ("in_distribution", "semantic", "instance", "attribute")
"""The four evaluation regimes of the paper, C.2.2."""


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """A robot's name and the meaning of every state and action dimension."""

    name: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]


class SimulatorFailed(RuntimeError):
    """The simulator, not the policy, broke down in an episode; the same trial may be played again from its start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a policy sees at one instant: o_0, s_0 and c of Eq. 1. `views` are further cameras that a suite defines.

    `past` are the observations at the control steps in `PolicySpec.past`, in that order. Before an episode's first
    observation it repeats. Without any the present one stands for all.
    """

    frame: np.ndarray  # (H, W, 3) uint8 RGB
    state: np.ndarray  # (S,) float32
    instruction: str
    embodiment: str
    views: Mapping[str, np.ndarray] = field(default_factory=dict)  # each (H, W, 3) uint8 RGB
    past: tuple["Observation", ...] = ()

    def __post_init__(self) -> None:
        for name, frame in {"frame": self.frame, **self.views}.items():
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"Observation.{name}: expected (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        if self.state.ndim != 1:
            raise ValueError(f"Observation.state: expected one axis, got shape {self.state.shape}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActionChunk:
    """What a policy answers: a_1:K of Eq. 1, un-normalised, and how long each part of the answer took.

    `imagined` is the video that it expects, where it was asked for: (F, H, W, 3) uint8 at the model's size, from the
    observation to the chunk's end in equal steps.
    """

    actions: np.ndarray  # (K, D) float32
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds by part
    imagined: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.actions.ndim != 2 or len(self.actions) == 0:
            raise ValueError(f"ActionChunk.actions: expected (K, D) with K >= 1, got {self.actions.shape}")
        video = self.imagined
        if video is not None and (video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not video.size):
            raise ValueError(f"ActionChunk.imagined: expected (F, H, W, 3) uint8, got {video.shape} {video.dtype}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """The rest of the chunk that a robot is executing while it asks for the next one (real-time chunking)."""

    actions: np.ndarray  # (P, D) in the robot's units; row 0 belongs to the control step of the observation
    delay: int  # how many of them will have been executed before the answer can be there

    def __post_init__(self) -> None:
        if self.actions.ndim != 2 or len(self.actions) == 0:
            raise ValueError(f"Continuation.actions: expected (P, D) with P >= 1, got {self.actions.shape}")
        if not 0 <= self.delay <= len(self.actions):
            raise ValueError(f"Continuation.delay: expected 0 to {len(self.actions)}, got {self.delay}")


@dataclass(frozen=True, kw_only=True)
class EmbodimentSpec:
    """The named parts of a robot's state and action, each as the dimensions [start, end), in order."""

    state: Mapping[str, tuple[int, int]]
    action: Mapping[str, tuple[int, int]]

    @property
    def state_dim(self) -> int:
        """S."""
        return max(end for _, end in self.state.values())

    @property
    def action_dim(self) -> int:
        """D."""
        return max(end for _, end in self.action.values())


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """What a policy takes and answers; `frame_size` (H, W) is what it makes of frames of any size.

    `imagines` says that it may be asked for the video that it expects. `past` are control steps before the present one,
    such as (-1,), whose observations it reads too.
    """

    name: str
    horizon: int
    frame_size: tuple[int, int]
    embodiments: Mapping[str, EmbodimentSpec]
    imagines: bool = False
    past: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyRequest:
    """One robot's question in a batch; `episode` comes from the policy and holds its random numbers."""

    observation: Observation
    episode: Any
    continuation: Continuation | None = None
    imagine: bool = False  # answer the expected video too; the actions stay the same


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluation trial as data: everything that decides what the simulator shows, JSON-serialisable.

    `name` is unique in its list; `scene` is the simulator's own description (objects, positions, colours).
    """

    name: str
    simulator: str
    regime: str
    task: str
    seed: int
    instruction: str
    scene: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What a simulator answers to one action: `progress` holds the partial scores reached so far."""

    observation: Observation
    success: bool
    progress: Mapping[str, bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """A recorded trajectory of N control steps; row n is what was seen before action n was sent."""

    frames: np.ndarray  # (N, H, W, 3) uint8
    states: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, D) float32
    instruction: str
    embodiment: str
    fps: int
    success: bool = False
    progress: Mapping[str, bool] = field(default_factory=dict)
    masks: np.ndarray | None = None  # (N, H, W) bool, the interaction mask of every frame

    def __post_init__(self) -> None:
        lengths = {
            "frames": len(self.frames),
            "states": len(self.states),
            "actions": len(self.actions),
            **({} if self.masks is None else {"masks": len(self.masks)}),
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Episode: all fields need one row a step, got {lengths}")

    def __len__(self) -> int:
        return len(self.actions)


NO_FRAME = np.zeros((0, 0, 3), np.uint8)
"""The frame of an observation that nobody looks at."""


@runtime_checkable
class Policy(Protocol):
    """Anything that acts: a checkpoint in this process, a server's client, a scripted expert."""

    def reset(self, seed: int) -> None:
        """Forget the last episode; every random number until the next reset follows from `seed`."""
        ...

    def act(self, observation: Observation) -> ActionChunk:
        """Answer the next K actions."""
        ...


@runtime_checkable
class ImaginingPolicy(Policy, Protocol):
    """A policy that may be able to show the video that it expects."""

    def act_and_imagine(self, observation: Observation) -> ActionChunk:
        """The answer of `act`, with `imagined` where the policy can; stage `imagine` of the timings is what that took."""
        ...


@runtime_checkable
class BatchPolicy(Protocol):
    """A policy for many robots at once, as a server wants it."""

    @property
    def spec(self) -> PolicySpec:
        """What it takes and answers."""
        ...

    def episode(self, seed: int) -> Any:
        """What an episode's random numbers come from."""
        ...

    def act_batch(self, requests: Sequence[PolicyRequest]) -> list[ActionChunk]:
        """One chunk a request, in order. Raises ValueError, before any random number is drawn, for a request that the
        policy cannot take."""
        ...


@runtime_checkable
class WarmsUp(Protocol):
    """A `BatchPolicy` that compiles, or prepares otherwise, what it runs. Optional.

    Before `warm_up` it answers all the same, uncompiled: a server tries a new checkpoint out before it warms it up.
    """

    def warm_up(self, max_batch: int) -> None:
        """Compile and run every batch size from 1 to `max_batch` once. Called in the thread that will call `act_batch`."""
        ...

    def adopt(self, other: BatchPolicy) -> bool:
        """Take over another policy's weights and statistics in place, between two forwards.

        Afterwards this policy answers as `other` would, compiled as it is. Returns False, with nothing changed, where it
        cannot, for instance because the shapes differ.
        """
        ...


class Ranges(Protocol):
    """Statistics of an embodiment: quantity by name ("min", "max", ...), one number a dimension."""

    @property
    def state(self) -> Mapping[str, np.ndarray]:
        """Each (S,)."""
        ...

    @property
    def action(self) -> Mapping[str, np.ndarray]:
        """Each (D,)."""
        ...


@runtime_checkable
class KnowsRanges(Protocol):
    """A policy that knows the statistics of the states and actions that it was trained on. Optional."""

    @property
    def stats(self) -> Mapping[str, Ranges]:
        """Embodiment to statistics."""
        ...


class Instructions(Protocol):
    """The instructions of a policy."""

    @property
    def known(self) -> Mapping[str, Any]:
        """Instructions that need no text encoder."""
        ...


@runtime_checkable
class KnowsInstructions(Protocol):
    """A policy that answers some instructions without loading more. Optional."""

    @property
    def instructions(self) -> Instructions | None:
        """Its instructions. None where it reads none."""
        ...


@runtime_checkable
class Simulator(Protocol):
    """A world that plays trials, one at a time.

    `name` is that of the registry and of its trials, `regimes` names its trial lists. `settings` holds what else of the
    suite's conventions decides an episode (camera, frame size, settling steps ...), JSON-serialisable; it goes into
    every results file.
    """

    name: str
    embodiment: Embodiment
    fps: int
    max_steps: int
    regimes: tuple[str, ...]
    settings: Mapping[str, Any]

    def reset(self, trial: Trial) -> Observation:
        """Set the trial's scene up; the same trial gives the same states and pixels."""
        ...

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Apply one (D,) action for one control period. Without `render` the frame is left out, (0, 0, 3): rendering is
        most of the work, and within a chunk nobody looks."""
        ...

    def interaction_mask(self) -> np.ndarray:
        """(H, W) bool: pixels of the acting hand and of the target object in the present frame (4.2.1)."""
        ...

    def trials(self, regime: str) -> Sequence[Trial]:
        """The fixed trial list of one of `regimes`."""
        ...

    def close(self) -> None:
        """Free the renderer."""
        ...


@runtime_checkable
class LocatesTarget(Protocol):
    """A simulator that can also tell the object from the hand."""

    def target_mask(self) -> np.ndarray:
        """(H, W) bool: pixels of the object that is to be moved next, in the present frame."""
        ...
