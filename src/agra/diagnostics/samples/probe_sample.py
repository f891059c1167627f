"""Probe samples (4.2.1): moments of recorded episodes at which a policy is diagnosed, with interaction masks.

A sample holds the observation at one control step and, for every latent frame, the recorded reference frame and its
interaction mask. The policy gets the observation alone. The later frames come from the recording and locate the
interaction. The frames of the whole window, the demonstrated actions and the object's position are optional. They serve
to measure the predicted video, the predicted actions and the hidden states. numpy only, stored without pickle.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from agra import files
from agra.types import REGIMES, Episode, Observation

ARRAYS = ("state", "frames", "masks")
OPTIONAL = ("video", "actions", "position", "past_frames", "past_states")
TEXTS = ("trial", "step", "regime", "instruction", "embodiment")


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeSample:
    """One moment of one trial, named by (trial, step)."""

    trial: str
    step: int  # control step of the observation
    regime: str
    instruction: str
    embodiment: str
    state: np.ndarray  # (S,) float32, in the robot's units
    frames: np.ndarray  # (T, H, W, 3) uint8 RGB: the reference frame of every latent frame, the observation first
    masks: np.ndarray  # (T, H, W) bool: the acting hand and the target object
    video: np.ndarray | None = None  # (F, H, W, 3) uint8 RGB: every frame of the method's window
    actions: np.ndarray | None = None  # (N, D) float32: the demonstration from here on, in the robot's units
    position: np.ndarray | None = None  # (2,) row and column of the target object's centre, as fractions of the frame
    past_frames: np.ndarray | None = None  # (P, H, W, 3) uint8 RGB: earlier observations, for policies that read them
    past_states: np.ndarray | None = None  # (P, S)

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"ProbeSample.regime: expected one of {', '.join(REGIMES)}, got {self.regime!r}")
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3 or not len(self.frames):
            raise ValueError(
                f"ProbeSample.frames: expected (T, H, W, 3) uint8, got {self.frames.shape} {self.frames.dtype}"
            )
        if self.masks.dtype != np.bool_ or self.masks.shape != self.frames.shape[:-1]:
            raise ValueError(
                f"ProbeSample.masks: expected {self.frames.shape[:-1]} bool, got {self.masks.shape} {self.masks.dtype}"
            )
        if self.state.ndim != 1:
            raise ValueError(f"ProbeSample.state: expected one axis, got shape {self.state.shape}")
        if self.video is not None and (self.video.dtype != np.uint8 or self.video.shape[1:] != self.frames.shape[1:]):
            raise ValueError(
                f"ProbeSample.video: expected (F, {', '.join(map(str, self.frames.shape[1:]))}) uint8, got"
                f" {self.video.shape} {self.video.dtype}"
            )
        if self.actions is not None and (self.actions.ndim != 2 or not len(self.actions)):
            raise ValueError(f"ProbeSample.actions: expected (N, D), got shape {self.actions.shape}")
        past = tuple(None if array is None else len(array) for array in (self.past_frames, self.past_states))
        if past[0] != past[1]:
            raise ValueError(f"ProbeSample: expected as many past_frames as past_states, got {past[0]} and {past[1]}")
        if self.position is not None and self.position.shape != (2,):
            raise ValueError(f"ProbeSample.position: expected (2,), got shape {self.position.shape}")

    @property
    def name(self) -> str:
        """Trial and step, as part of a file name."""
        return f"{self.trial}-step{self.step:05d}".replace("/", "-")

    def image_names(self) -> list[str]:
        """The file name of every reference frame, by which annotations refer to it."""
        return [f"{self.name}-frame{frame}.png" for frame in range(len(self.frames))]

    def observation_for(self, past: Sequence[int]) -> Observation:
        """The input of a policy that also reads the observations at the control steps `past` (`PolicySpec.past`).

        Raises ValueError if the sample does not hold them.
        """
        if not past:
            return self.observation
        count = 0 if self.past_frames is None else len(self.past_frames)
        if self.past_frames is None or self.past_states is None or count != len(past):
            raise ValueError(
                f"sample {self.name}: the policy reads the observations at the control steps {tuple(past)}, but the "
                f"sample holds {count} past observations; write the probe samples again for this recipe"
            )
        earlier = zip(self.past_frames, self.past_states, strict=True)
        return replace(
            self.observation,
            past=tuple(replace(self.observation, frame=frame, state=state) for frame, state in earlier),
        )

    @property
    def observation(self) -> Observation:
        """The policy's input at this control step. Its frame holds all cameras of the dataset."""
        return Observation(
            frame=self.frames[0],
            state=self.state,
            instruction=self.instruction,
            embodiment=self.embodiment,
            joined=True,
        )


def samples_from_episode(
    episode: Episode,
    steps: Sequence[int],
    reference_offsets: Sequence[int],
    *,
    trial: str,
    regime: str,
    window_offsets: Sequence[int] | None = None,
    past_offsets: Sequence[int] = (),
    position: np.ndarray | None = None,
) -> list[ProbeSample]:
    """The samples of an episode at the control steps `steps`.

    `reference_offsets` are the control steps from the observation to the reference frame of each latent frame:
    (0, 1, 5, 9, 13) times the video stride for five latent frames. `window_offsets` are those to every frame of the
    window, `past_offsets` those to earlier observations. Before the start of the episode its first frame repeats, after
    the end its last frame. An episode without masks gives empty masks, to be drawn later. Raises ValueError for a step
    outside the episode.
    """
    offsets = np.asarray(reference_offsets)
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or (offsets < 0).any():
        raise ValueError(
            f"reference_offsets: expected 0 first and nothing negative, got {tuple(map(int, offsets.ravel()))}"
        )
    for step in steps:
        if not 0 <= step < len(episode):
            raise ValueError(f"trial {trial}: step {step} lies outside the episode's {len(episode)} steps")

    def sample(step: int) -> ProbeSample:
        rows = np.minimum(step + offsets, len(episode) - 1)
        past = np.maximum(step + np.asarray(past_offsets, dtype=int), 0)
        window = None if window_offsets is None else np.minimum(step + np.asarray(window_offsets), len(episode) - 1)
        return ProbeSample(
            trial=trial,
            step=int(step),
            regime=regime,
            instruction=episode.instruction,
            embodiment=episode.embodiment,
            state=episode.states[step],
            frames=episode.frames[rows],
            masks=np.zeros(episode.frames[rows].shape[:-1], bool) if episode.masks is None else episode.masks[rows],
            video=None if window is None else episode.frames[window],
            actions=episode.actions[step:],
            position=position,
            past_frames=episode.frames[past] if len(past) else None,
            past_states=episode.states[past] if len(past) else None,
        )

    return [sample(step) for step in steps]


def save_samples(samples: Sequence[ProbeSample], folder: Path) -> None:
    """Write `samples.npz` (arrays) and `samples.json` (the rest) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{i}/{name}": array
        for i, sample in enumerate(samples)
        for name in (*ARRAYS, *OPTIONAL)
        if (array := getattr(sample, name)) is not None
    }
    texts = [{name: getattr(sample, name) for name in TEXTS} for sample in samples]
    with files.replacing(folder / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    files.write_text(folder / "samples.json", json.dumps({"samples": texts}, indent=1) + "\n")


def load_samples(folder: Path) -> list[ProbeSample]:
    """Inverse of `save_samples`. Raises FileNotFoundError for a missing file, ValueError for files that do not fit."""
    folder = Path(folder)
    if not (folder / "samples.json").is_file() or not (folder / "samples.npz").is_file():
        raise FileNotFoundError(f"{folder}: expected samples.json and samples.npz, as `agra probes` writes them")
    try:
        return _load_samples(folder)
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{folder}: not probe samples ({error})") from error
    except (LookupError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder}: not probe samples ({error!r}); write them with `agra probes`") from error


def _load_samples(folder: Path) -> list[ProbeSample]:
    texts = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        required = {f"{i}/{name}" for i in range(len(texts)) for name in ARRAYS}
        allowed = required | {f"{i}/{name}" for i in range(len(texts)) for name in OPTIONAL}
        if not required <= set(arrays.files) <= allowed:
            differing = sorted((required - set(arrays.files)) | (set(arrays.files) - allowed))
            raise ValueError(
                f"{folder}: samples.npz does not hold the {len(texts)} samples of samples.json; missing or unknown "
                f"arrays: {', '.join(differing[:3])}"
            )
        present = [[n for n in (*ARRAYS, *OPTIONAL) if f"{i}/{n}" in arrays.files] for i in range(len(texts))]
        return [
            ProbeSample(**text, **{n: arrays[f"{i}/{n}"] for n in names})
            for i, (text, names) in enumerate(zip(texts, present, strict=True))
        ]
