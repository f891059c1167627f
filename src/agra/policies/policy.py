"""A trained method as a policy: observations in, chunks of actions in the robot's units out (A.2, C.1)."""

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
from agra.config import RunConfig
from agra.data.normalization.normalize import NormStats
from agra.flow import continuation_weights
from agra.methods.method import Imagines, Method, Noise
from agra.policies.instructions import Instructions
from agra.policies.observations import ObservationEncoder
from agra.precision import Precision, allow_tensor_cores, compute_dtype, local_device
from agra.types import (
    ActionChunk,
    BatchPolicy,
    Continuation,
    EmbodimentSpec,
    Observation,
    PolicyRequest,
    PolicySpec,
)
from agra.wam.codec import Codec, to_frames

_IMAGINE_STEPS = 6


class MethodPolicy:
    """An `agra.types.Policy`, and a `BatchPolicy`, around a trained method.

    It computes in the precision of its training: on a GPU the weights are bfloat16, and the rest runs in TF32. Noise comes
    from a generator that `reset` seeds: the same seed and observations give the same actions.
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
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
        imagines: bool = True,
        **options: Any,
    ) -> None:
        """Takes `method` over: it is moved, cast and frozen. `precision` is the training's by default.

        `options` go to `Method.actor`: for a WAM `action_steps`, `fast`, `compiled` and `pool_future`. Raises ValueError for
        options that the method does not have.
        """
        self.name, self.config, self.stats = name, config, stats
        self.device = local_device(device)
        self.observations = ObservationEncoder(config, codec, instructions, stats, teacher=teacher, device=self.device)
        allow_tensor_cores(self.device)
        dtype = compute_dtype(self.device, precision or config.stage.precision)
        self.method = method.to(self.device, dtype).eval().requires_grad_(False)
        self.imagines = imagines and isinstance(method, Imagines)
        self.options = options
        self._actor = self.method.actor(**options)
        self._prepared = lru_cache(maxsize=8)(self._prepare_instruction)
        self._warm_graphs: int | None = None
        self.reset(0)

    # --- what a server does before it answers, and between two answers ------------------------------------------------

    def warm_up(self, max_batch: int) -> None:
        """Load what is loaded late, and answer a blank observation in every compiled batch size up to `max_batch`.

        Call it in the thread that will answer, since CUDA graphs belong to their thread. Afterwards `recompiles` counts
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
        """A black frame, the mean state of the first embodiment, and a known instruction if there is one."""
        embodiment, stats = next(iter(self.stats.items()))
        known = () if self.instructions is None else self.instructions.known
        return Observation(
            frame=np.zeros((*self.frame_size, 3), np.uint8),
            state=np.asarray(stats.state["mean"], np.float32),
            instruction=next(iter(known), "warm up"),
            embodiment=embodiment,
        )

    @property
    def recompiles(self) -> int:
        """Graphs compiled since `warm_up`. More than 0 means that an answer has waited for the compiler."""
        return 0 if self._warm_graphs is None else self._compiled_graphs() - self._warm_graphs

    def _compiled_graphs(self) -> int:
        """Graphs that torch has compiled in this process."""
        if not self._actor.compiled:
            return 0
        # Imported here: it takes a second, and uncompiled policies do not need it.
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def adopt(self, other: BatchPolicy) -> bool:
        """Take over another policy in place where that keeps compiled graphs valid: same method, options and device.

        Returns False, with nothing changed, where it cannot or where nothing is compiled. Call it between two answers only.
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
        self.observations = other.observations
        return True

    # --- answers ------------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> PolicySpec:
        """Inputs and outputs of the policy."""
        embodiments = {
            name: EmbodimentSpec(
                state={part.name: (part.start, part.end) for part in stats.parts("state")},
                action={part.name: (part.start, part.end) for part in stats.parts("action")},
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
        )

    @property
    def past(self) -> tuple[int, ...]:
        """Control steps before the present one whose observations it reads, in order."""
        return self.observations.past

    def episode(self, seed: int) -> torch.Generator:
        """The generator of an episode's noise."""
        return torch.Generator(device="cpu").manual_seed(seed)

    def reset(self, seed: int) -> None:
        """Start an episode: every random number until the next reset follows from `seed`."""
        self._episode = self.episode(seed)

    def act(self, observation: Observation, *, continuation: Continuation | None = None) -> ActionChunk:
        """The next chunk of actions, in the robot's units. With `continuation` it continues the chunk in execution."""
        request = PolicyRequest(observation=observation, episode=self._episode, continuation=continuation)
        return self.act_batch([request])[0]

    def act_and_imagine(self, observation: Observation) -> ActionChunk:
        """The answer of `act`, bit for bit, and the predicted video from the same noise."""
        request = PolicyRequest(observation=observation, episode=self._episode, imagine=self.imagines)
        return self.act_batch([request])[0]

    @torch.no_grad()
    def act_batch(self, requests: Sequence[PolicyRequest]) -> list[ActionChunk]:
        """One chunk for each request, all computed together. Each chunk's timings are those of the batch.

        Raises ValueError, before any noise is drawn, where an observation does not fit.
        """
        watch = Stopwatch(self.device)
        if self.instructions is not None:
            for request in requests:
                self._prepared(request.observation.instruction)
        watch.lap("text")
        inputs = self.encode([request.observation for request in requests])
        continuation = self._continuation(requests)
        watch.lap("codec")
        rows = [self._draw(1, request.episode) for request in requests]
        noise = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        prepared = [
            None if self.instructions is None else self._prepared(request.observation.instruction)
            for request in requests
        ]
        actions = self._actor.act(inputs, noise, prepared, continuation=continuation, lap=watch.lap)
        answers = [
            self.unnormalize(row[None], request.observation.embodiment)[0]
            for row, request in zip(actions, requests, strict=True)
        ]
        watch.lap("action")
        asking = [row for row, request in enumerate(requests) if request.imagine]
        imagined: dict[int, np.ndarray] = {}
        if asking:
            videos = self.imagine(inputs.rows(asking), {name: value[asking] for name, value in noise.items()})
            imagined = dict(zip(asking, videos, strict=True))
            watch.lap("imagine")
        return [
            ActionChunk(actions=answer, timings=watch.laps, imagined=imagined.get(row))
            for row, answer in enumerate(answers)
        ]

    @torch.no_grad()
    def imagine(
        self, inputs: PolicyInputs, noise: Noise, *, steps: int = _IMAGINE_STEPS
    ) -> UInt8[np.ndarray, "B F H W 3"]:
        """The predicted videos (`Imagines.imagine`), decoded at the method's frame size.

        Raises ValueError where the method predicts none.
        """
        if not isinstance(self.method, Imagines) or self.observations.codec is None:
            raise ValueError(f"{self.name}: the method {self.config.method.kind} predicts no video")
        latents = self.method.imagine(inputs, noise, steps=steps)
        return to_frames(self.observations.codec.decode(latents))

    # --- what instruments use -----------------------------------------------------------------------------------------

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
        """Observations as the method takes them."""
        return self.observations.encode(observations)

    def noise(self, count: int, seed: int) -> dict[str, Tensor]:
        """Starting noise of `count` answers, for diagnostics that hold it fixed."""
        return self._draw(count, torch.Generator().manual_seed(seed))

    def unnormalize(self, actions: Float[Tensor, "B K D"], embodiment: str) -> np.ndarray:
        """A method's actions in the robot's units, (B, K, the embodiment's own D) float32."""
        stats = self.observations.stats_of(embodiment)
        narrow = actions[..., : stats.width("action")].float().cpu().numpy()
        return stats.unnormalize("action", narrow).astype(np.float32)

    def normalize(self, actions: np.ndarray, embodiment: str) -> np.ndarray:
        """Actions (..., the embodiment's own D) in the robot's units as a method predicts them. Inverse of `unnormalize`."""
        return np.asarray(self.observations.stats_of(embodiment).normalize("action", actions), dtype=np.float32)

    def crop(self, frames: np.ndarray, embodiment: str) -> np.ndarray:
        """Frames (..., H, W, 3) as training saw them: cropped as the embodiment's source says."""
        return self.observations.crop(frames, embodiment)

    def _draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.method.noise_shapes().items()
        drawn = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes}
        return {name: value.to(self.device) for name, value in drawn.items()}

    def _prepare_instruction(self, instruction: str) -> Any:
        assert self.instructions is not None
        return self._actor.prepare_instruction(self.instructions.tokens(instruction).to(self.device))

    def _continuation(self, requests: Sequence[PolicyRequest]) -> tuple[Tensor, Tensor] | None:
        """The previous chunks in the method's units, and the weight of each number: (B, K, D) twice."""
        if all(request.continuation is None for request in requests):
            return None
        shapes = self.config.method.shapes
        previous = torch.zeros(len(requests), shapes.horizon, shapes.action_dim)
        weights = torch.zeros_like(previous)
        for row, request in enumerate(requests):
            given = request.continuation
            if given is None:
                continue
            stats = self.observations.stats_of(request.observation.embodiment)
            kept = torch.as_tensor(stats.normalize("action", given.actions[: shapes.horizon]))
            previous[row, : len(kept), : kept.shape[1]] = kept
            held = continuation_weights(min(given.delay, len(kept)), len(kept), shapes.horizon)
            weights[row, :, : kept.shape[1]] = held[:, None]
        return previous.to(self.device), weights.to(self.device)


class Stopwatch:
    """Seconds of consecutive stages. On a GPU each stage is waited for, so that its work counts as its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Note that `stage` ends now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now
