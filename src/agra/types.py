"""Types shared by all packages: observations, action chunks, trials, episodes, and the protocols Policy and Simulator.

It needs only numpy, so a simulator or a robot client can import it without torch. Frames are uint8 RGB, height
x width x channel. States and actions are float32 in the robot's units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

REGIMES = ("in_distribution", "semantic", "instance", "attribute")
"""The four evaluation regimes of the paper (C.2.2)."""
ActionNoise = Literal["random", "zero"]
"""Where the denoising of a chunk starts. The paper's is random."""
VideoNoise = Literal["random", "fixed", "zero"]
"""Noise of the predicted frames in a conditioning pass. The paper's is random. `fixed` is the same in every answer."""


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """Name of a robot and of every dimension of its state and action."""

    name: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]


class SimulatorFailed(RuntimeError):
    """A failure of the simulator, not of the policy. The same trial can be played again from its start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """Input of a policy at one instant: o_0, s_0 and c (Eq. 1).

    `views` holds the frames of further cameras by name. A policy with several cameras (`EmbodimentSpec.views`) needs
    them, unless `joined` says that the frame holds all cameras side by side already.

    `past` holds the observations at the control steps `PolicySpec.past`, in that order. At the start of an episode the
    first observation repeats. If `past` is empty, the present observation stands for all.
    """

    frame: np.ndarray  # (H, W, 3) uint8 RGB
    state: np.ndarray  # (S,) float32
    instruction: str
    embodiment: str
    views: Mapping[str, np.ndarray] = field(default_factory=dict)  # each (H, W, 3) uint8 RGB
    past: tuple["Observation", ...] = ()
    joined: bool = False

    def __post_init__(self) -> None:
        if self.joined and self.views:
            raise ValueError(f"Observation.views: expected none with a joined frame, got {', '.join(self.views)}")
        for name, frame in {"frame": self.frame, **self.views}.items():
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"Observation.{name}: expected (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        if self.state.ndim != 1:
            raise ValueError(f"Observation.state: expected one axis, got shape {self.state.shape}")


def cameras_of(observation: Observation, names: Sequence[str]) -> list[np.ndarray]:
    """Return the frame and the views `names` of further cameras, in order, each (H, W, 3) uint8.

    Of an observation whose cameras are joined, return its frame alone. Raises ValueError for a missing view.
    """
    if observation.joined:
        return [observation.frame]
    missing = [name for name in names if name not in observation.views]
    if missing:
        raise ValueError(
            f"Observation.views: expected the extra cameras {', '.join(names)}, got"
            f" {', '.join(observation.views) or 'none'}; pass the view {missing[0]!r}, or train with the view's name in the"
            " dataset's meta/modality.json"
        )
    return [observation.frame, *(observation.views[name] for name in names)]


def side_by_side(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Place frames (..., H, W, 3) uint8 of several cameras to the right of the first, scaled to its height."""
    first, *others = frames
    if not others:
        return first
    return np.concatenate([first, *(_scaled(frame, first.shape[-3]) for frame in others)], axis=-2)


def _scaled(frames: np.ndarray, height: int) -> np.ndarray:
    if frames.shape[-3] == height:
        return frames
    try:  # here, because cameras of one height need no library
        from PIL import Image
    except ImportError as error:
        raise ImportError("cameras of different heights are scaled by Pillow: pip install pillow") from error

    size = round(frames.shape[-2] * height / frames.shape[-3]), height
    pictures = [Image.fromarray(frame) for frame in frames.reshape(-1, *frames.shape[-3:])]
    scaled = np.stack([np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) for picture in pictures])
    return scaled.reshape(*frames.shape[:-3], *scaled.shape[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class ActionChunk:
    """Output of a policy: the actions a_1:K (Eq. 1), unnormalised, and the time of each part of their computation.

    `imagined` is the predicted video if the request asked for it: (F, H, W, 3) uint8 at the model's size, from the
    observation to the end of the chunk in equal steps.
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
    """Remaining actions of the chunk that a robot executes while it requests the next one (real-time chunking)."""

    actions: np.ndarray  # (P, D) in the robot's units; row 0 belongs to the control step of the observation
    delay: int  # number of these actions that the robot executes before the next chunk arrives

    def __post_init__(self) -> None:
        if self.actions.ndim != 2 or len(self.actions) == 0:
            raise ValueError(f"Continuation.actions: expected (P, D) with P >= 1, got {self.actions.shape}")
        if not 0 <= self.delay <= len(self.actions):
            raise ValueError(f"Continuation.delay: expected 0 to {len(self.actions)}, got {self.delay}")


@dataclass(frozen=True, kw_only=True)
class EmbodimentSpec:
    """Named parts of a robot's state and action, in order, each with its dimensions [start, end).

    `views` are the names of further cameras to the right of the frame. `recorded_sizes` are the (H, W) of the frame and
    of each view where the policy crops them, and takes no other size. Otherwise it is empty.
    """

    state: Mapping[str, tuple[int, int]]
    action: Mapping[str, tuple[int, int]]
    views: tuple[str, ...] = ()
    recorded_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def state_dim(self) -> int:
        """Number of state dimensions, S."""
        return max(end for _, end in self.state.values())

    @property
    def action_dim(self) -> int:
        """Number of action dimensions, D."""
        return max(end for _, end in self.action.values())


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """Inputs and outputs of a policy.

    `frame_size` (H, W) is the size to which the policy resizes frames. `imagines` tells whether it can
    predict video. `past` are earlier control steps whose observations it also reads, such as (-1,). `action_noise` is
    where it starts to denoise a chunk, `video_noise` the noise of a world action model's conditioning pass.
    """

    name: str
    horizon: int
    frame_size: tuple[int, int]
    embodiments: Mapping[str, EmbodimentSpec]
    imagines: bool = False
    past: tuple[int, ...] = ()
    action_noise: ActionNoise = "random"
    video_noise: VideoNoise = "random"


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyRequest:
    """Request of one robot in a batch. `episode` comes from `BatchPolicy.episode` and holds random numbers."""

    observation: Observation
    episode: Any
    continuation: Continuation | None = None
    imagine: bool = False  # predict the video too; the actions stay the same


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluation trial as JSON-serialisable data that fully determines the simulated scene.

    `name` is unique in its list. `seed` is that of the policy's noise. `scene` is the simulator's description of objects,
    positions and colours.
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
    """Result of one action in a simulator. `progress` holds the partial scores reached so far."""

    observation: Observation
    success: bool
    progress: Mapping[str, bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """A recorded trajectory of N control steps. Row n holds the observation before action n."""

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
            raise ValueError(f"Episode: expected one row per control step in all fields, got {lengths}")

    def __len__(self) -> int:
        return len(self.actions)


NO_FRAME = np.zeros((0, 0, 3), np.uint8)
"""Frame of an observation without rendering."""


@runtime_checkable
class Policy(Protocol):
    """A source of actions: a checkpoint in this process, a client of a server, a scripted expert."""

    def reset(self, seed: int) -> None:
        """Forget the last episode. `seed` determines all random numbers until the next reset."""
        ...

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next K actions."""
        ...


@runtime_checkable
class ReadsPast(Protocol):
    """A policy that may read earlier observations. Optional."""

    @property
    def past(self) -> tuple[int, ...]:
        """Control steps of the past observations, as in `PolicySpec.past`."""
        ...


def past_of(policy: object) -> tuple[int, ...]:
    """Control steps before the present one whose observations a policy reads."""
    return policy.past if isinstance(policy, ReadsPast) else ()


def with_past(observation: Observation, earlier: Sequence[Observation], past: Sequence[int]) -> Observation:
    """The observation with those at the control steps `past`, taken from all `earlier` ones of the episode, in order.

    Before the first observation it repeats. Raises ValueError where a past observation has no frame.
    """
    if not past:
        return observation
    moments = [earlier[max(0, len(earlier) + step)] if earlier else observation for step in past]
    for step, moment in zip(past, moments, strict=True):
        if not moment.frame.size:
            raise ValueError(f"the policy reads the observation at control step {step}, whose frame was not rendered")
    return replace(observation, past=tuple(moments))


@runtime_checkable
class ImaginingPolicy(Policy, Protocol):
    """A policy that may be able to predict video."""

    def act_and_imagine(self, observation: Observation) -> ActionChunk:
        """Return the result of `act`, with `imagined` if the policy predicts video, timed as `imagine` in the
        timings.
        """
        ...


@runtime_checkable
class BatchPolicy(Protocol):
    """A policy for several robots at once, for a server."""

    @property
    def spec(self) -> PolicySpec:
        """Inputs and outputs of the policy."""
        ...

    def episode(self, seed: int) -> Any:
        """Return the source of an episode's random numbers."""
        ...

    def act_batch(self, requests: Sequence[PolicyRequest]) -> list[ActionChunk]:
        """Return one chunk per request, in order.

        Raises ValueError for an invalid request, before any random number is drawn.
        """
        ...


@runtime_checkable
class WarmsUp(Protocol):
    """A `BatchPolicy` that compiles or otherwise prepares its computations. Optional.

    Before `warm_up` it acts uncompiled, because a server tests a new checkpoint before it warms it up.
    """

    def warm_up(self, max_batch: int) -> None:
        """Compile and run every batch size from 1 to `max_batch` once, in the thread that later calls `act_batch`."""
        ...

    def adopt(self, other: BatchPolicy) -> bool:
        """Copy another policy's weights and statistics in place, between two forward passes.

        This policy then acts as `other` does, and stays compiled. `other` may no longer act. Returns False and changes
        nothing if that is not possible, for example because shapes differ.
        """
        ...


@runtime_checkable
class LendsEncoder(Protocol):
    """A `BatchPolicy` whose text encoder can serve another policy. Optional."""

    def lend_encoder(self, other: BatchPolicy) -> None:
        """Give a new policy the text encoder that this one has loaded, where it needs the same one."""
        ...


class Ranges(Protocol):
    """Statistics of an embodiment by name ("min", "max", ...), one number per dimension."""

    @property
    def state(self) -> Mapping[str, np.ndarray]:
        """Statistics of the state, (S,) each."""
        ...

    @property
    def action(self) -> Mapping[str, np.ndarray]:
        """Statistics of the actions, (D,) each."""
        ...


@runtime_checkable
class KnowsRanges(Protocol):
    """A policy with the statistics of its training states and actions. Optional."""

    @property
    def stats(self) -> Mapping[str, Ranges]:
        """Statistics by embodiment."""
        ...


class Instructions(Protocol):
    """Instructions of a policy."""

    @property
    def known(self) -> Mapping[str, Any]:
        """Cached instructions, which need no text encoder."""
        ...


@runtime_checkable
class KnowsInstructions(Protocol):
    """A policy with cached instructions. Optional."""

    @property
    def instructions(self) -> Instructions | None:
        """Instructions of the policy, or None if it reads none."""
        ...


@runtime_checkable
class Simulator(Protocol):
    """A simulated environment that plays one trial at a time.

    `name` is its name in the registry and in its trials, `regimes` are the names of its trial lists. `settings` are the
    other conventions of the suite that affect an episode (camera, frame size, settling steps ...), JSON-serialisable.
    Every results file contains them.
    """

    name: str
    embodiment: Embodiment
    fps: int
    max_steps: int
    regimes: tuple[str, ...]
    settings: Mapping[str, Any]

    def reset(self, trial: Trial) -> Observation:
        """Set up the trial's scene. The same trial gives the same states and pixels."""
        ...

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Apply one (D,) action for one control period.

        Without `render` the frame is empty, (0, 0, 3). Rendering takes most of the time, and no frame is needed within
        a chunk.
        """
        ...

    def interaction_mask(self) -> np.ndarray:
        """Return the pixels of the acting hand and the target object in the current frame, (H, W) bool (4.2.1)."""
        ...

    def trials(self, regime: str) -> Sequence[Trial]:
        """Return the fixed trial list of one of `regimes`."""
        ...

    def close(self) -> None:
        """Free the renderer."""
        ...


@runtime_checkable
class LocatesTarget(Protocol):
    """A simulator that can distinguish the target object from the hand."""

    def target_mask(self) -> np.ndarray:
        """Return the pixels of the object to be moved next in the current frame, (H, W) bool."""
        ...
