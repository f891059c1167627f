"""A trained method as a policy: from observations to chunks of actions in the robot's units (A.2, C.1)."""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from agra.alignment.teacher import Teacher
from agra.batch import PolicyInputs
from agra.checkpoints.recorded_sizes import RecordedSizes
from agra.config import RunConfig
from agra.data.normalization.normalize import NormStats
from agra.flow import continuation_weights
from agra.methods.method import Imagines, Method, Noise
from agra.policies.instructions import Instructions
from agra.policies.observations import ObservationEncoder
from agra.precision import Precision, allow_tensor_cores, autocast_to_weights, compute_dtype, local_device
from agra.types import (
    ActionChunk,
    ActionNoise,
    BatchPolicy,
    Continuation,
    EmbodimentSpec,
    Observation,
    PolicyRequest,
    PolicySpec,
    VideoNoise,
)
from agra.wam.codec import Codec, decode_frames

_IMAGINE_STEPS = 6


class MethodPolicy:
    """An `agra.types.Policy` and `BatchPolicy` around a trained method.

    It computes in the precision of its training. On a GPU the weights are bfloat16, and the rest runs in TF32. Noise
    comes from a generator that `reset` seeds, so the same seed and observations give the same actions.
    """

    def __init__(
        self,
        *,
        name: str,
        config: RunConfig,
        method: Method,
        codec: Codec | None,
        instructions: Instructions | None,
        stats: Mapping[str, NormStats],
        teacher: Teacher | None = None,
        recorded_sizes: RecordedSizes | None = None,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
        imagines: bool = True,
        action_noise: ActionNoise | None = None,
        video_noise: VideoNoise | None = None,
        **options: Any,
    ) -> None:
        """Move, cast and freeze `method`, in place. `precision` is the training's by default.

        `recorded_sizes` are those of a checkpoint whose training frames are cropped: other sizes are refused.

        `action_noise` is where the denoising of a chunk starts: at random noise as in the paper, or at zero.
        `video_noise` is the noise of the conditioning pass and of a predicted video: random as in the paper, fixed (the
        same for every answer) or zero. By default they are the config's. With neither random, a WAM's answer depends on
        the observation alone.

        `options` are those of `Method.actor`: for a WAM `action_steps`, `fast`, `compiled` and `pool_future`. Raises
        ValueError for options and noise that the method does not have.
        """
        self.name, self.config, self.stats = name, config, stats
        self.device = local_device(device)
        self.observations = ObservationEncoder(
            config, codec, instructions, stats, teacher=teacher, recorded_sizes=recorded_sizes, device=self.device
        )
        allow_tensor_cores(self.device)
        dtype = compute_dtype(self.device, precision or config.stage.precision)
        self.method = method.to(self.device, dtype).eval().requires_grad_(False)
        self.imagines = imagines and isinstance(method, Imagines)
        if action_noise not in ("random", "zero", None):
            raise ValueError(f"action_noise: expected random or zero, got {action_noise!r}")
        if video_noise not in ("random", "fixed", "zero", None):
            raise ValueError(f"video_noise: expected random, fixed or zero, got {video_noise!r}")
        self.action_noise: ActionNoise = action_noise or config.action_noise
        self.video_noise: VideoNoise = video_noise or config.video_noise
        if self.video_noise != "random" and "video" not in method.noise_shapes():
            raise ValueError(f"video_noise: {config.method.kind} has no video noise, got {self.video_noise}")
        self.options = options
        self._actor = self.method.actor(**options)
        self._prepared = lru_cache(maxsize=8)(self._prepare_instruction)
        self._warm_graphs: int | None = None
        self.reset(0)

    # --- preparation and updates, for servers -------------------------------------------------------------------------

    def warm_up(self, max_batch: int) -> None:
        """Load the text encoder and compile, by acting on a blank observation in every batch size up to `max_batch`.

        Call it in the thread that will act, since CUDA graphs belong to their thread. Afterwards `recompiles` counts
        from 0.
        """
        if self.instructions is not None:
            self.instructions.load()
        if self._warm_graphs is None:
            self._actor.compile()
        blank = self.blank_observation()
        # A CUDA graph is recorded at the second call and replayed at the third.
        calls = 3 if self._actor.compiled else 1
        for size in self._actor.batch_sizes(max_batch):
            for _ in range(calls):
                self.act_batch([PolicyRequest(observation=blank, episode=self.episode(0)) for _ in range(size)])
        self._warm_graphs = self._compiled_graphs()

    def blank_observation(self) -> Observation:
        """Make an observation of a black frame, the mean state of the first embodiment, and a known instruction.

        The frame and the view of each extra camera have their recorded size. Where it is unknown, they have the
        method's size, or are large enough for the crop of the embodiment's source.
        """
        embodiment, stats = next(iter(self.stats.items()))
        source, (height, width) = self.config.data.source(embodiment), self.frame_size
        rows, columns = source.crop_rows or (0, height), source.crop_columns or (0, width)
        texts = () if self.instructions is None else self.instructions.known
        views = self.observations.views_of(embodiment)
        sizes = self.observations.sizes_of(embodiment) or ((rows[1], columns[1]),) * (1 + len(views))
        frame, *others = (np.zeros((*size, 3), np.uint8) for size in sizes)
        return Observation(
            frame=frame,
            views=dict(zip(views, others, strict=True)),
            state=np.asarray(stats.state["mean"], np.float32),
            instruction=next(iter(texts), "warm up"),
            embodiment=embodiment,
        )

    @property
    def recompiles(self) -> int:
        """Number of graphs compiled since `warm_up`. Above 0, a response has waited for the compiler."""
        return 0 if self._warm_graphs is None else self._compiled_graphs() - self._warm_graphs

    def _compiled_graphs(self) -> int:
        """Count the graphs that torch has compiled in this process."""
        if not self._actor.compiled:
            return 0
        # Imported here: it takes a second, and uncompiled policies do not need it.
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def lend_encoder(self, other: BatchPolicy) -> None:
        """Give another policy the text encoder that this one has loaded, where it is the same one.

        A server calls it before it tests a new checkpoint, so that a second encoder is not loaded.
        """
        if not isinstance(other, MethodPolicy) or self.config.method.text != other.config.method.text:
            return
        if self.instructions is not None and other.instructions is not None and self.device == other.device:
            other.instructions.take_encoder(self.instructions)

    def adopt(self, other: BatchPolicy) -> bool:
        """Take over another policy's weights in place, where compiled graphs stay valid: same method, options and
        device.

        Returns False, with nothing changed, where they do not stay valid or nothing is compiled. Afterwards `other`
        cannot act. Call it between two calls of `act_batch`.
        """
        if not isinstance(other, MethodPolicy) or not self._actor.compiled:
            return False
        same = (
            self.method.config == other.method.config
            and self.options == other.options
            and self.device == other.device
            and next(self.method.parameters()).dtype == next(other.method.parameters()).dtype
        )
        if not same:
            return False
        self._actor.update(other.method)
        self._prepared.cache_clear()
        self.name, self.config, self.stats, self.imagines = other.name, other.config, other.stats, other.imagines
        self.action_noise, self.video_noise = other.action_noise, other.video_noise
        self.observations = other.observations
        # Callers may still hold `other`. What it has on the device goes now.
        del other._actor
        other._prepared.cache_clear()
        other.method.to("meta")
        return True

    # --- acting -------------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> PolicySpec:
        """Inputs and outputs of the policy."""
        embodiments = {
            name: EmbodimentSpec(
                state={part.name: (part.start, part.end) for part in stats.parts("state")},
                action={part.name: (part.start, part.end) for part in stats.parts("action")},
                views=self.observations.views_of(name),
                recorded_sizes=self.observations.sizes_of(name),
            )
            for name, stats in self.stats.items()
        }
        return PolicySpec(
            name=self.name,
            horizon=self.config.method.shapes.horizon,
            frame_size=self.frame_size,
            embodiments=embodiments,
            imagines=self.imagines,
            past=self.past,
            action_noise=self.action_noise,
            video_noise=self.video_noise,
        )

    @property
    def past(self) -> tuple[int, ...]:
        """Control steps before the present one whose observations it reads, in order."""
        return self.observations.past

    def episode(self, seed: int) -> torch.Generator:
        """Make the generator of an episode's noise."""
        return torch.Generator(device="cpu").manual_seed(seed)

    def reset(self, seed: int) -> None:
        """Start an episode. All noise until the next reset follows from `seed`."""
        self._episode = self.episode(seed)

    def act(self, observation: Observation, *, continuation: Continuation | None = None) -> ActionChunk:
        """Compute the next chunk of actions in the robot's units.

        With `continuation` it continues the chunk in execution.
        """
        request = PolicyRequest(observation=observation, episode=self._episode, continuation=continuation)
        return self.act_batch([request])[0]

    def act_and_imagine(self, observation: Observation) -> ActionChunk:
        """Compute the chunk of `act`, bit for bit, and the predicted video from the same noise."""
        request = PolicyRequest(observation=observation, episode=self._episode, imagine=self.imagines)
        return self.act_batch([request])[0]

    @torch.no_grad()
    def act_batch(self, requests: Sequence[PolicyRequest]) -> list[ActionChunk]:
        """Compute one chunk for each request, in one batch. Each chunk's timings are those of the batch.

        Raises ValueError, before any noise is drawn, for an observation that does not fit.
        """
        watch = Stopwatch(self.device)
        texts = [self.observations.instruction(request.observation) for request in requests]
        if self.instructions is not None:
            for text in texts:
                self._prepared(text)
        watch.lap("text")
        inputs = self.encode([request.observation for request in requests])
        continuation = self._continuation(requests)
        watch.lap("codec")
        rows = [self._draw(1, request.episode) for request in requests]
        noise = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        prepared = [None if self.instructions is None else self._prepared(text) for text in texts]
        actions = self._actor.act(inputs, noise, prepared, continuation=continuation, lap=watch.lap)
        chunks = [
            self.unnormalize(row[None], request.observation.embodiment)[0]
            for row, request in zip(actions, requests, strict=True)
        ]
        watch.lap("action")
        imagining = [row for row, request in enumerate(requests) if request.imagine]
        imagined: dict[int, np.ndarray] = {}
        if imagining:
            videos = self.imagine(inputs.rows(imagining), {name: value[imagining] for name, value in noise.items()})
            imagined = dict(zip(imagining, videos, strict=True))
            watch.lap("imagine")
        return [
            ActionChunk(actions=chunk, timings=watch.laps, imagined=imagined.get(row))
            for row, chunk in enumerate(chunks)
        ]

    @torch.no_grad()
    def imagine(
        self, inputs: PolicyInputs, noise: Noise, *, steps: int = _IMAGINE_STEPS
    ) -> UInt8[np.ndarray, "B F H W 3"]:
        """Predict videos (`Imagines.imagine`) and decode them at the method's frame size.

        Raises ValueError for a method that predicts no video.
        """
        if not isinstance(self.method, Imagines) or self.observations.codec is None:
            raise ValueError(f"{self.name}: the method {self.config.method.kind} predicts no video")
        codec = self.observations.codec
        with autocast_to_weights(self.method):
            latents = self.method.imagine(inputs, noise, steps=steps)
        clip = bool(self.config.method.needs().clip)
        predicted = decode_frames(codec, latents, clip=clip)
        if clip:
            return predicted
        assert inputs.frames is not None  # frames that are predicted one by one, after the observation's picture
        return np.concatenate([inputs.frames[:, -1:].cpu().numpy(), predicted], axis=1)

    # --- instruments --------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec | None:
        """The frozen video codec, where the method reads latents."""
        return self.observations.codec

    @property
    def instructions(self) -> Instructions | None:
        """The tokens of instructions, where the method reads them."""
        return self.observations.instructions

    @property
    def frame_size(self) -> tuple[int, int]:
        """(H, W) to which frames are resized."""
        return self.config.method.shapes.frame_size

    def encode(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Encode observations as the method's inputs."""
        return self.observations.encode(observations)

    def noise(self, count: int, seed: int | torch.Generator) -> dict[str, Tensor]:
        """Make the starting noise of `count` chunks, for diagnostics that keep it fixed, from a seed or an `episode`.

        It is the noise of `act`, fixed or zero where the policy's is.
        """
        return self._draw(count, seed if isinstance(seed, torch.Generator) else self.episode(seed))

    def unnormalize(self, actions: Float[Tensor, "B K D"], embodiment: str) -> np.ndarray:
        """Convert the method's actions to the robot's units: (B, K, D of the embodiment) float32."""
        stats = self.observations.stats_of(embodiment)
        narrow = actions[..., : stats.width("action")].float().cpu().numpy()
        return stats.unnormalize("action", narrow).astype(np.float32)

    def normalize(self, actions: np.ndarray, embodiment: str) -> np.ndarray:
        """Convert actions (..., D of the embodiment) in the robot's units to the method's. Inverse of `unnormalize`."""
        return np.asarray(self.observations.stats_of(embodiment).normalize("action", actions), dtype=np.float32)

    def crop(self, frames: np.ndarray, embodiment: str) -> np.ndarray:
        """Crop frames (..., H, W, 3) to the region of the embodiment's source, as in training."""
        return self.observations.crop(frames, embodiment)

    def _draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.method.noise_shapes().items()
        drawn = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes}
        # All noise is drawn, so that one setting does not change the other's noise.
        if self.action_noise == "zero" and "action" in drawn:
            drawn["action"] = torch.zeros_like(drawn["action"])
        if self.video_noise == "zero":
            drawn["video"] = torch.zeros_like(drawn["video"])
        elif self.video_noise == "fixed":
            drawn["video"] = torch.randn(drawn["video"].shape[1:], generator=self.episode(0)).expand_as(drawn["video"])
        return {name: value.to(self.device) for name, value in drawn.items()}

    def _prepare_instruction(self, instruction: str) -> Any:
        assert self.instructions is not None
        return self._actor.prepare_instruction(self.instructions.tokens(instruction).to(self.device))

    def _continuation(self, requests: Sequence[PolicyRequest]) -> tuple[Tensor, Tensor] | None:
        """Convert the previous chunks to the method's units, and return them with their weights, both (B, K, D)."""
        if all(request.continuation is None for request in requests):
            return None
        shapes = self.config.method.shapes
        previous = torch.zeros(len(requests), shapes.horizon, shapes.action_dim)
        weights = torch.zeros_like(previous)
        for row, request in enumerate(requests):
            continuation = request.continuation
            if continuation is None:
                continue
            stats = self.observations.stats_of(request.observation.embodiment)
            actions = torch.as_tensor(stats.normalize("action", continuation.actions[: shapes.horizon]))
            length, width = actions.shape
            previous[row, :length, :width] = actions
            weights[row, :, :width] = continuation_weights(min(continuation.delay, length), length, shapes.horizon)[
                :, None
            ]
        return previous.to(self.device), weights.to(self.device)


class Stopwatch:
    """Measures the seconds of consecutive stages. On a GPU it waits for the end of each stage's work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Record the end of `stage`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now
