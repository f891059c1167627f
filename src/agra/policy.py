"""WAMPolicy: a checkpoint that acts. Normalise, condition, act, un-normalise.                              A.2; C.1"""

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from agra.config import RunConfig
from agra.data.normalize import NormStats
from agra.flow import continuation_weights
from agra.instructions import FILE as INSTRUCTIONS
from agra.instructions import Instructions, StoredInstructions
from agra.observations import ObservationEncoder, PolicyInputs
from agra.precision import Precision, allow_tensor_cores, compute_dtype, local_device
from agra.training import checkpoint
from agra.training.lora import merged
from agra.training.stages import Stage
from agra.types import (
    ActionChunk,
    BatchPolicy,
    Continuation,
    EmbodimentSpec,
    Observation,
    PolicyRequest,
    PolicySpec,
)
from agra.wam.codec import Codec, load_codec, to_frames
from agra.wam.fast import FastWAM, compiled_graphs, padded_size
from agra.wam.model import WAM
from agra.wam.text import TextEncoder, load_text_encoder


def _projection(config: RunConfig, model: WAM) -> nn.Module | None:
    """Cosmos's frozen text projection, where tokens were cached after it."""
    reads_cosmos = config.model.text.kind == "cosmos_reason" and config.model.video_dit.text_projection_dim is not None
    return model.video_dit.transformer.crossattn_proj if reads_cosmos else None


class WAMPolicy:
    """An `agra.types.Policy`, and a `BatchPolicy`, around a trained WAM: `act` runs one conditioning pass and a few Euler steps.

    It computes in the precision of its training: on a GPU the weights are bfloat16, and TF32 serves where float32 remains.
    With `fast` nothing is computed twice (`agra.wam.fast`, also for `compiled` and the approximation `pool_future`); the
    results are the same up to rounding. The video noise of the unseen latent frames and the action noise come from a
    generator that `reset` seeds: the same seed and observations give the same actions.
    """

    def __init__(
        self,
        *,
        name: str,
        config: RunConfig,
        model: WAM,
        codec: Codec,
        instructions: Instructions,
        stats: Mapping[str, NormStats],
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
        action_steps: int = 4,
        fast: bool = True,
        pool_future: int = 1,
        compiled: bool = False,
        imagines: bool = True,
    ) -> None:
        """`precision` is the training's by default. Takes `model` over: it is moved, cast and frozen."""
        self.name, self.config, self.stats = name, config, stats
        self.device = local_device(device)
        self.observations = ObservationEncoder(config, codec, instructions, stats, device=self.device)
        allow_tensor_cores(self.device)
        dtype = compute_dtype(self.device, precision or config.stage.precision)
        self.model = model.to(self.device, dtype).eval().requires_grad_(False)
        self.action_steps, self.imagines = action_steps, imagines
        if not fast and (compiled or pool_future != 1):
            raise ValueError("compiled and pool_future belong to the fast path")
        self._fast = (
            FastWAM(self.model, action_steps=action_steps, pool_future=pool_future, compiled=compiled) if fast else None
        )
        self._keys_values = lru_cache(maxsize=8)(self._project)
        self._warm_graphs: int | None = None
        self.reset(0)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        device: torch.device | str = "cpu",
        known_instructions: bool = False,
        **options: Any,
    ) -> "WAMPolicy":
        """Rebuild a policy from a checkpoint folder, or from its run's folder (the newest checkpoint), alone.

        The text encoder is loaded at the first instruction that the checkpoint does not know; with `known_instructions`
        never. `options` are the initialiser's `precision`, `action_steps`, `fast`, `pool_future`, `compiled` and `imagines`.

        Raises FileNotFoundError where there is none, ValueError where a file is damaged or the checkpoint is one of the
        adapt stage, whose action head has not been trained.
        """
        folder = checkpoint.resolve(path)
        checkpoint.verify(folder, without=(checkpoint.OPTIMIZER,))
        config = checkpoint.read_config(folder)
        if config.stage.name is Stage.ADAPT:
            raise ValueError(f"{folder}: a checkpoint of the adapt stage cannot act; take one of joint or finetune")
        with torch.device("meta"):
            model = WAM(config.model)
        model.to_empty(device="cpu")
        with merged(model, config.stage.lora):
            checkpoint.load_weights(model, folder)
        codec_file, tokens_file = folder / "codec.safetensors", folder / INSTRUCTIONS
        codec = load_codec(config.model.codec, codec_file if codec_file.is_file() else None)
        known = StoredInstructions(tokens_file) if tokens_file.is_file() else None
        if known_instructions and not known:
            raise ValueError(
                f"{tokens_file}: missing, so no instruction is known; load the policy with its text encoder"
            )
        projection = deepcopy(_projection(config, model))  # in float32, as tokens were made for training

        def load_encoder() -> TextEncoder:
            return load_text_encoder(config.model.text, projection).to(local_device(device))

        return cls(
            name=name or Path(path).name,
            config=config,
            model=model,
            codec=codec.to(local_device(device)),
            instructions=Instructions(None if known_instructions else load_encoder, known),
            stats=NormStats.load_all(folder / "norm_stats.json"),
            device=device,
            **options,
        )

    @property
    def codec(self) -> Codec:
        """The frozen video codec."""
        return self.observations.codec

    @property
    def instructions(self) -> Instructions:
        """The tokens of instructions."""
        return self.observations.instructions

    @property
    def text(self) -> TextEncoder:
        """The text encoder, loaded at its first use."""
        return self.instructions.encoder

    # --- what a server does before it answers, and between two answers ------------------------------------------------

    def warm_up(self, max_batch: int) -> None:
        """Load what is loaded late and answer a blank observation in every batch size up to `max_batch`.

        Call it in the thread that will answer: CUDA graphs belong to their thread. Afterwards `recompiles` counts from 0.
        """
        self.instructions.load()
        embodiment, stats = next(iter(self.stats.items()))
        height, width = self.config.model.frame_size
        blank = Observation(
            frame=np.zeros((height, width, 3), np.uint8),
            state=np.asarray(stats.state["mean"], np.float32),
            instruction=next(iter(self.instructions.known), "warm up"),
            embodiment=embodiment,
        )
        compiled = self._fast is not None and self._fast.compiled
        sizes = sorted({padded_size(count) for count in range(1, max_batch + 1)}) if compiled else [1]
        for size in sizes:
            for _ in range(
                3 if compiled else 1
            ):  # a CUDA graph is recorded at the second call and replayed at the third
                self.act_batch([PolicyRequest(observation=blank, episode=self.episode(0)) for _ in range(size)])
        self._warm_graphs = compiled_graphs()

    @property
    def recompiles(self) -> int:
        """Graphs compiled since `warm_up`. More than 0 means that an answer has waited for the compiler."""
        return 0 if self._warm_graphs is None else compiled_graphs() - self._warm_graphs

    def adopt(self, other: BatchPolicy) -> bool:
        """Become `other` in place where that keeps compiled graphs valid: the same model, options and device.

        False, and nothing changed, where it cannot or where nothing is compiled. Between two answers only.
        """
        if not isinstance(other, WAMPolicy) or self._fast is None or other._fast is None or not self._fast.compiled:
            return False
        same = (
            other._fast.compiled
            and self.config.model == other.config.model
            and self.device == other.device
            and next(self.model.parameters()).dtype == next(other.model.parameters()).dtype
            and (self.action_steps, self._fast.pool_future) == (other.action_steps, other._fast.pool_future)
        )
        if not same:
            return False
        self._fast.update(other.model)
        self._keys_values.cache_clear()
        self.name, self.config, self.stats, self.imagines = other.name, other.config, other.stats, other.imagines
        self.observations = other.observations
        return True

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and answers."""
        embodiments = {
            name: EmbodimentSpec(
                state={part.name: (part.start, part.end) for part in stats.parts("state")},
                action={part.name: (part.start, part.end) for part in stats.parts("action")},
            )
            for name, stats in self.stats.items()
        }
        head = self.config.model.action_dit
        return PolicySpec(
            name=self.name,
            horizon=head.horizon,
            frame_size=self.config.model.frame_size,
            embodiments=embodiments,
            imagines=self.imagines,
        )

    def episode(self, seed: int) -> torch.Generator:
        """What an episode's noise is drawn from."""
        return torch.Generator(device="cpu").manual_seed(seed)

    def reset(self, seed: int) -> None:
        """Start an episode: every random number until the next reset follows from `seed`."""
        self._episode = self.episode(seed)

    def act(self, observation: Observation, *, continuation: Continuation | None = None) -> ActionChunk:
        """The next chunk of actions, in the robot's units; with `continuation` it goes on with the one being executed."""
        request = PolicyRequest(observation=observation, episode=self._episode, continuation=continuation)
        return self.act_batch([request])[0]

    def act_and_imagine(self, observation: Observation) -> ActionChunk:
        """The answer of `act`, the same bits, and the video that the model expects from the same noise."""
        request = PolicyRequest(observation=observation, episode=self._episode, imagine=self.imagines)
        return self.act_batch([request])[0]

    @torch.no_grad()
    def act_batch(self, requests: Sequence[PolicyRequest]) -> list[ActionChunk]:
        """One chunk a request, all computed together; each chunk's timings are those of the batch.

        Raises ValueError, before any noise is drawn, where an observation does not fit.
        """
        watch = Stopwatch(self.device)
        instructions = [request.observation.instruction for request in requests]
        for instruction in instructions:
            (self.instructions.tokens if self._fast is None else self._keys_values)(instruction)
        watch.lap("text")
        inputs = self.prepare([request.observation for request in requests])
        continuation = self._continuation(requests)
        watch.lap("codec")
        noises = [self._draw(1, request.episode) for request in requests]
        video_noise, action_noise = (torch.cat(noise) for noise in zip(*noises, strict=True))
        if self._fast is None:
            hidden = self.model.condition(inputs.observation_latent, video_noise, inputs.instruction)
        else:
            known = [self._keys_values(instruction) for instruction in instructions]
            self._fast.begin()
            hidden = self._fast.condition(inputs.observation_latent, video_noise, known)
        watch.lap("video")
        guidance = (self.model if self._fast is None else self._fast).guide(hidden)
        watch.lap("bridge")
        head = (guidance, inputs.state, inputs.embodiment, action_noise)
        if self._fast is None:
            actions = self.model.act(*head, steps=self.action_steps, continuation=continuation)
        else:
            actions = self._fast.act(*head, continuation=continuation)
        answers = [
            self.unnormalize(row[None], request.observation.embodiment)[0]
            for row, request in zip(actions, requests, strict=True)
        ]
        watch.lap("action")
        asking = [row for row, request in enumerate(requests) if request.imagine]
        imagined: dict[int, np.ndarray] = {}
        if asking:
            imagined = dict(zip(asking, self.imagine(inputs.rows(asking), video_noise[asking]), strict=True))
            watch.lap("imagine")
        return [
            ActionChunk(actions=answer, timings=watch.laps, imagined=imagined.get(row))
            for row, answer in enumerate(answers)
        ]

    @torch.no_grad()
    def imagine(
        self, inputs: PolicyInputs, noise: Float[Tensor, "B C T h w"], *, steps: int = 6
    ) -> UInt8[np.ndarray, "B F H W 3"]:
        """The videos that the model expects (`WAM.imagine`), decoded at its own size."""
        latents = self.model.imagine(inputs.observation_latent, noise, inputs.instruction, steps=steps)
        return to_frames(self.codec.decode(latents))

    def prepare(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Observations to model inputs: resize and encode frames, look up instructions, normalise states."""
        return self.observations.encode(observations)

    def video_noise(self, count: int, seed: int) -> Float[Tensor, "B C T h w"]:
        """The conditioning pass's noise, for diagnostics that hold it fixed."""
        return self._draw(count, torch.Generator().manual_seed(seed))[0]

    def action_noise(self, count: int, seed: int) -> Float[Tensor, "B K D"]:
        """The action head's starting noise, for diagnostics that hold it fixed."""
        return self._draw(count, torch.Generator().manual_seed(seed))[1]

    def unnormalize(self, actions: Float[Tensor, "B K D"], embodiment: str) -> np.ndarray:
        """Model output to the robot's units, (B, K, the embodiment's own D) float32."""
        stats = self.observations.stats_of(embodiment)
        own = actions[..., : stats.width("action")].float().cpu().numpy()
        return stats.unnormalize("action", own).astype(np.float32)

    def normalize(self, actions: np.ndarray, embodiment: str) -> np.ndarray:
        """Actions (..., the embodiment's own D) in the robot's units as the model predicts them; inverse of `unnormalize`."""
        return np.asarray(self.observations.stats_of(embodiment).normalize("action", actions), dtype=np.float32)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        head = self.config.model.action_dit
        video = torch.randn(count, *self.config.model.latent_shape, generator=generator)
        action = torch.randn(count, head.horizon, head.action_dim, generator=generator)
        return video.to(self.device), action.to(self.device)

    @property
    def frame_size(self) -> tuple[int, int]:
        """(H, W) of the frames that the model sees."""
        return self.config.model.frame_size

    def seen(self, frames: np.ndarray, embodiment: str) -> np.ndarray:
        """Frames (..., H, W, 3) as training saw them: cropped as the embodiment's source says."""
        return self.observations.crop(frames, embodiment)

    def _project(self, instruction: str) -> tuple[tuple[Tensor, Tensor], ...]:
        assert self._fast is not None
        return self._fast.instruction(self.instructions.tokens(instruction).to(self.device))

    def _continuation(self, requests: Sequence[PolicyRequest]) -> tuple[Tensor, Tensor] | None:
        """The old chunks as the model sees actions, and how much each number counts: (B, K, D) twice."""
        if all(request.continuation is None for request in requests):
            return None
        head = self.config.model.action_dit
        previous = torch.zeros(len(requests), head.horizon, head.action_dim)
        weights = torch.zeros_like(previous)
        for row, request in enumerate(requests):
            given = request.continuation
            if given is None:
                continue
            stats = self.observations.stats_of(request.observation.embodiment)
            kept = torch.as_tensor(stats.normalize("action", given.actions[: head.horizon]))
            previous[row, : len(kept), : kept.shape[1]] = kept
            held = continuation_weights(min(given.delay, len(kept)), len(kept), head.horizon)
            weights[row, :, : kept.shape[1]] = held[:, None]
        return previous.to(self.device), weights.to(self.device)


class Stopwatch:
    """Seconds of consecutive stages; on a GPU each stage is waited for, so that its work counts as its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Note that `stage` ends now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self._last = now
