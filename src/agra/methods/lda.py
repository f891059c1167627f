"""LDA (Lyu et al., arXiv 2602.12215), trained from scratch: one transformer that is policy, dynamics and video model.

A step has four tasks, a quarter of the batch each. The policy predicts actions without a future frame. Inverse dynamics
predicts them between two frames. Forward dynamics predicts the future frame's latents under given actions. Visual
forecasting predicts them without actions. Learned stand-ins replace what a task lacks. Frames are latents of a frozen
visual encoder, or of the video codec as an ablation. The original is pre-trained, which docs/methods.md explains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from agra.alignment.teacher import TeacherConfig, teacher_shape
from agra.batch import Batch, PolicyInputs
from agra.flow import beta_levels, continue_chunk, euler, interpolate, velocity
from agra.methods.method import Continuation, LossDenominators, Losses, Method, MethodConfig, Needs, Noise, Shapes
from agra.rng import noise_like, sample_shard
from agra.wam.action_dit import ActionEncoder, EmbodimentMLP
from agra.wam.codec import CodecConfig, latent_shape
from agra.wam.text import TextConfig
from agra.wam.two_stream import TwoStreamConfig, TwoStreamDiT, TwoStreamOutput

_STEPS = 4
"""Euler steps of an answer."""


class Task(IntEnum):
    """The tasks, in the order of the quarters of a batch. The numbers are rows of the learned task vectors."""

    POLICY = 0
    INVERSE_DYNAMICS = 1
    FORWARD_DYNAMICS = 2
    VISUAL_FORECASTING = 3


@dataclass(frozen=True, kw_only=True)
class LDAConfig(MethodConfig):
    """Sizes and latents. The defaults are LDA's with 8 layers on GR1."""

    kind: Literal["lda_scratch"] = "lda_scratch"
    latents: Literal["dino", "vae"] = "dino"
    """Latents of frames: patch features of `visual_encoder`, or patches of `video_codec`'s latents."""
    visual_encoder: TeacherConfig = field(
        default_factory=lambda: TeacherConfig(source="facebook/dinov2-with-registers-small", input_size=(196, 196))
    )
    feature_grid: tuple[int, int] = (14, 14)
    """(H, W) to which the visual encoder's patch features are interpolated."""
    video_codec: CodecConfig = field(
        default_factory=lambda: CodecConfig(
            kind="sdxl", source="stabilityai/sdxl-vae", revision=None, channels=4, dtype="float32"
        )
    )
    latent_patch: int = 2
    """Side of the square patches of codec latents."""
    frame_size: tuple[int, int] = (224, 224)
    """(H, W) of the frames that the codec encodes."""
    text_encoder: TextConfig = field(
        default_factory=lambda: TextConfig(
            kind="qwen3_vl", source="Qwen/Qwen3-VL-4B-Instruct", revision=None, length=64
        )
    )
    network: TwoStreamConfig = field(default_factory=TwoStreamConfig)
    state_dim: int = 58
    action_dim: int = 29
    horizon: int = 16
    future_frame: int = 16
    """Control steps from the observation to the future frame, and the actions that inverse dynamics predicts."""
    num_embodiments: int = 1
    num_registers: int = 32
    max_tokens: int = 1024
    """Learned positions, shared by image tokens, state and actions."""
    state_dropout: float = 0.0
    """Probability of replacing a sample's whole state by zeros in training. The original has none."""

    def __post_init__(self) -> None:
        if self.latents not in ("dino", "vae"):
            raise ValueError(f"method.latents: expected dino or vae, got {self.latents!r}")
        if not 1 <= self.future_frame <= self.horizon:
            raise ValueError(
                f"method.future_frame: expected 1 to the horizon of {self.horizon}, because inverse dynamics predicts as"
                f" many actions, got {self.future_frame}"
            )
        side = self.video_codec.space_stride * self.latent_patch
        if self.latents == "vae" and any(size % side for size in self.frame_size):
            raise ValueError(f"method.frame_size: expected multiples of {side} pixels a patch, got {self.frame_size}")
        tokens = self.grid[0] * self.grid[1] + 1 + self.horizon
        if tokens > self.max_tokens:
            raise ValueError(f"method.max_tokens: expected at least {tokens}, got {self.max_tokens}")
        if not 0 <= self.state_dropout <= 1:
            raise ValueError(f"method.state_dropout: expected a probability, got {self.state_dropout}")

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of a frame's latents."""
        if self.latents == "dino":
            return self.feature_grid
        height, width = latent_shape(self.video_codec, self.frame_size, 1)[2:]
        return height // self.latent_patch, width // self.latent_patch

    @property
    def latent_dim(self) -> int:
        """Numbers of a frame's latents at one place of the grid."""
        if self.latents == "dino":
            return teacher_shape(self.visual_encoder).width * max(1, len(self.visual_encoder.depths))
        return self.video_codec.channels * self.latent_patch**2

    @property
    def shapes(self) -> Shapes:
        """Sizes of states, actions and the grid."""
        return Shapes(
            frame_size=self.frame_size,
            horizon=self.horizon,
            state_dim=self.state_dim,
            action_dim=self.action_dim,
            num_embodiments=self.num_embodiments,
            instruction=(self.text_encoder.length, self.network.text_dim),
            feature_grid=self.grid,
        )

    def needs(self) -> Needs:
        """Latents of the observation and of the future frame."""
        return self._needs((0, self.future_frame))

    def needs_to_act(self) -> Needs:
        """Latents of the observation."""
        return self._needs((0,))

    def _needs(self, frames: tuple[int, ...]) -> Needs:
        return Needs(features=frames) if self.latents == "dino" else Needs(frame_latents=frames)

    @property
    def codec(self) -> CodecConfig | None:
        """The video codec, where its latents are read."""
        return self.video_codec if self.latents == "vae" else None

    @property
    def text(self) -> TextConfig:
        """The text encoder."""
        return self.text_encoder

    @property
    def teacher(self) -> TeacherConfig | None:
        """The visual encoder, where its features are read."""
        return self.visual_encoder if self.latents == "dino" else None

    @property
    def frame_stride(self) -> int:
        """One, since `future_frame` counts control steps."""
        return 1

    @property
    def part_names(self) -> tuple[str, ...]:
        """The transformer, and the layers around it."""
        return "transformer", "encoders"

    @property
    def batch_multiple(self) -> int:
        """The number of tasks."""
        return len(Task)

    def build(self) -> "LDA":
        """Make the method with fresh weights."""
        return LDA(self)

    def describe(self) -> str:
        """Describe latents and size in a phrase."""
        return (
            f"LDA from scratch: four tasks on {self.latents} latents, {self.network.num_layers} layers of "
            f"{self.network.width}, future frame {self.future_frame}"
        )


class Encoders(nn.Module):
    """The layers around the transformer, the stand-ins, and the task vectors."""

    def __init__(self, config: LDAConfig) -> None:
        super().__init__()
        width, hidden, banks = config.network.width, config.network.output_dim, config.num_embodiments
        self.merge = nn.Linear(2 * config.latent_dim, width)
        self.latent_decoder = nn.Linear(hidden, config.latent_dim)
        self.state_encoder = EmbodimentMLP(banks, config.state_dim, hidden, width)
        self.action_encoder = ActionEncoder(banks, config.action_dim, width)
        self.action_decoder = EmbodimentMLP(banks, hidden, hidden, config.action_dim)
        self.positions = nn.Parameter(torch.empty(config.max_tokens, width))
        self.registers = nn.Parameter(torch.empty(config.num_registers, width))
        self.absent_future = nn.Parameter(torch.empty(config.latent_dim))
        self.absent_actions = nn.Parameter(torch.empty(config.horizon, width))
        self.tasks = nn.Parameter(torch.empty(len(Task), width))
        for learned in (self.positions, self.registers, self.absent_future, self.absent_actions, self.tasks):
            nn.init.normal_(learned, std=0.02)


class LDA(Method):
    """The transformer and the layers around it. `act` is the policy. The other tasks have methods of their names."""

    config: LDAConfig

    def __init__(self, config: LDAConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = TwoStreamDiT(config.network)
        self.encoders = Encoders(config)

    def parts(self) -> dict[str, nn.Module]:
        """Return the transformer and the layers around it."""
        return {"transformer": self.transformer, "encoders": self.encoders}

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks."""
        return [*self.transformer.blocks]

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """Compute the velocity errors of the policy (`action`), of inverse dynamics (`inverse`), and of forward dynamics
        and forecasting together (`dynamics`), and their sum.

        Raises ValueError for a batch that does not divide into four quarters.
        """
        policy, inverse, forward, forecasting = quarters(len(batch))
        acting, seeing = slice(policy.start, inverse.stop), slice(forward.start, forecasting.stop)
        latents, rows = self.latents(batch), len(batch) // len(Task)
        actions, future = batch.actions, latents[:, 1]
        level = beta_levels(len(batch)).to(actions.device)
        action_noise, future_noise = noise_like(actions[acting]), noise_like(future[seeing])
        clean = torch.zeros_like(level[forward])
        action_tokens = [
            self.encode_actions(
                interpolate(actions[acting], action_noise, level[acting]), level[acting], batch.embodiment[acting]
            ),
            self.encode_actions(actions[forward], clean, batch.embodiment[forward]),
            self.encoders.absent_actions.expand(rows, -1, -1),
        ]
        futures = [
            self.absent_future(rows),
            future[inverse],
            interpolate(future[seeing], future_noise, level[seeing]),
        ]
        tasks = torch.arange(len(Task), device=actions.device).repeat_interleave(rows)
        image = self.merge(latents[:, 0], torch.cat(futures))
        output = self.run(image, torch.cat(action_tokens), batch, level, tasks)
        predicted = self.decode_actions(output.action[acting], batch.embodiment[acting])
        action_error = (predicted - velocity(actions[acting], action_noise)).float().square()
        image_tokens = output.image[seeing].unflatten(1, self.config.grid)
        future_error = self.encoders.latent_decoder(image_tokens) - velocity(future[seeing], future_noise)
        masks = self.masks(batch)
        kept = denominators or {name: mask.sum().clamp(min=1) for name, mask in masks.items()}
        terms = {
            "action": (action_error[:rows] * masks["action"]).sum() / kept["action"],
            "inverse": (action_error[rows:, : self.config.future_frame] * masks["inverse"]).sum() / kept["inverse"],
            "dynamics": (future_error.float().square().mean(dim=(1, 2, 3)) * masks["dynamics"]).sum()
            / kept["dynamics"],
        }
        return Losses(total=sum(terms.values(), start=torch.zeros((), device=actions.device)), terms=terms)

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """Return what each loss averages over: actions of the policy (B/4, K, D), actions of inverse dynamics (B/4,
        future_frame, D), samples of the two tasks that predict the future (B/2,).

        Samples whose future frame lies past the episode's end are left out where a task sees or predicts it.
        """
        assert batch.frame_mask is not None
        policy, inverse, forward, forecasting = quarters(len(batch))
        inside = batch.frame_mask[:, 1]
        return {
            "action": batch.action_mask[policy],
            "inverse": batch.action_mask[inverse, : self.config.future_frame] & inside[inverse, None, None],
            "dynamics": inside[forward.start : forecasting.stop],
        }

    def counts(self, batch: Batch) -> dict[str, float]:
        """Count the numbers that `masks` keep."""
        return {name: float(mask.sum().item()) for name, mask in self.masks(batch).items()}

    # --- the network --------------------------------------------------------------------------------------------------

    def latents(self, inputs: Batch | PolicyInputs) -> Float[Tensor, "B F H W P"]:
        """Return the latents of the frames on the grid."""
        if self.config.latents == "dino":
            assert inputs.features is not None
            return inputs.features
        assert inputs.frame_latents is not None
        side = self.config.latent_patch
        patches = inputs.frame_latents.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # B F C H p W p
        return patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)

    def merge(self, current: Float[Tensor, "B H W P"], future: Float[Tensor, "B H W P"]) -> Float[Tensor, "B H W E"]:
        """Concatenate both frames on their channels and encode each place as an image token, without its position."""
        return self.encoders.merge(torch.cat([current, future], dim=-1))

    def absent_future(self, count: int) -> Float[Tensor, "B H W P"]:
        """Return the learned stand-in of a missing future frame, the same vector at every place."""
        return self.encoders.absent_future.expand(count, *self.config.grid, -1)

    def encode_actions(
        self, actions: Float[Tensor, "B K D"], noise_level: Float[Tensor, "B"], embodiment: Int[Tensor, "B"]
    ) -> Float[Tensor, "B K E"]:
        """Encode actions at their noise level. Level 0 is clean."""
        encoder = self.encoders.action_encoder
        time = encoder.time_features(self.transformer.bucket(noise_level))
        return encoder(actions.to(self.encoders.tasks.dtype), time, embodiment)

    def decode_actions(self, tokens: Float[Tensor, "B M O"], embodiment: Int[Tensor, "B"]) -> Float[Tensor, "B K D"]:
        """Decode the last K tokens of the action stream to velocities."""
        return self.encoders.action_decoder(tokens[:, -self.config.horizon :], embodiment)

    def run(
        self,
        image: Float[Tensor, "B *grid E"],
        action_tokens: Float[Tensor, "B K E"],
        inputs: Batch | PolicyInputs,
        noise_level: Float[Tensor, "B"],
        tasks: Int[Tensor, "B"],
        *,
        return_attention: bool = False,
    ) -> TwoStreamOutput:
        """Run the transformer on [registers | image] and [state | actions]. The registers are left out of the output's
        image tokens. `noise_level` is that of the noised stream.
        """
        assert inputs.instruction is not None
        encoders, state = self.encoders, inputs.state
        if self.training and self.config.state_dropout > 0:
            drawn = sample_shard(lambda n: torch.rand(n, 1, device=state.device), len(state))
            state = state * (drawn >= self.config.state_dropout)
        state = encoders.state_encoder(state.to(encoders.tasks.dtype).unsqueeze(1), inputs.embodiment)
        image, action = image.flatten(1, -2), torch.cat([state, action_tokens], dim=1)
        places = image.shape[1]
        image = image + encoders.positions[:places]
        action = action + encoders.positions[places : places + action.shape[1]]
        output = self.transformer(
            torch.cat([encoders.registers.expand(len(image), -1, -1), image], dim=1),
            action,
            inputs.instruction,
            noise_level,
            encoders.tasks.index_select(0, tasks),
            return_attention=return_attention,
        )
        return TwoStreamOutput(
            image=output.image[:, len(encoders.registers) :], action=output.action, attention=output.attention
        )

    # --- the four tasks -----------------------------------------------------------------------------------------------

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the policy's noise."""
        return {"action": (self.config.horizon, self.config.action_dim)}

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Solve the policy's task: a chunk of actions, without a future frame."""
        image = self.hidden(inputs, noise)[0]
        return self._denoise_actions(image, Task.POLICY, inputs, noise["action"], steps, continuation)

    def inverse_dynamics(
        self,
        inputs: PolicyInputs,
        future: Float[Tensor, "B H W P"],
        noise: Float[Tensor, "B K D"],
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B F D"]:
        """Return the normalised actions that lead from the observation to the latents `future`, `future_frame` many."""
        image = self.merge(self.latents(inputs)[:, 0], future)
        actions = self._denoise_actions(image, Task.INVERSE_DYNAMICS, inputs, noise, steps)
        return actions[:, : self.config.future_frame]

    def forward_dynamics(
        self,
        inputs: PolicyInputs,
        actions: Float[Tensor, "B K D"],
        noise: Float[Tensor, "B H W P"],
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B H W P"]:
        """Return the latents of the future frame after a chunk of normalised `actions`."""
        tokens = self.encode_actions(actions, torch.zeros_like(actions[:, 0, 0]), inputs.embodiment)
        return self._denoise_future(tokens, Task.FORWARD_DYNAMICS, inputs, noise, steps)

    def visual_forecasting(
        self, inputs: PolicyInputs, noise: Float[Tensor, "B H W P"], *, steps: int | None = None
    ) -> Float[Tensor, "B H W P"]:
        """Return the latents of the future frame that follows from observation and instruction alone."""
        tokens = self.encoders.absent_actions.expand(len(inputs), -1, -1)
        return self._denoise_future(tokens, Task.VISUAL_FORECASTING, inputs, noise, steps)

    def _denoise_actions(
        self,
        image: Tensor,
        task: Task,
        inputs: PolicyInputs,
        noise: Tensor,
        steps: int | None,
        continuation: Continuation | None = None,
        visit: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> Float[Tensor, "B K D"]:
        tasks = torch.full_like(inputs.embodiment, task)

        def predict(actions: Tensor, level: Tensor) -> Tensor:
            tokens = self.encode_actions(actions, level, inputs.embodiment)
            output = self.run(image, tokens, inputs, level, tasks, return_attention=visit is not None)
            if visit is not None and output.attention is not None:
                first = len(self.encoders.registers)
                visit([weights[..., first : first + image[0, ..., 0].numel()] for weights in output.attention])
            return self.decode_actions(output.action, inputs.embodiment)

        return euler(
            predict if continuation is None else continue_chunk(predict, *continuation), noise, steps or _STEPS
        )

    def _denoise_future(
        self, action_tokens: Tensor, task: Task, inputs: PolicyInputs, noise: Tensor, steps: int | None
    ) -> Float[Tensor, "B H W P"]:
        current, tasks = self.latents(inputs)[:, 0], torch.full_like(inputs.embodiment, task)

        def predict(future: Tensor, level: Tensor) -> Tensor:
            output = self.run(self.merge(current, future), action_tokens, inputs, level, tasks)
            return self.encoders.latent_decoder(output.image).unflatten(1, self.config.grid)

        return euler(predict, noise, steps or _STEPS)

    # --- instruments --------------------------------------------------------------------------------------------------

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Grid 0, once for each block. Every block's action tokens attend to the image stream that begins with it."""
        return (0,) * self.config.network.num_layers

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(1, H, W) of the image stream without its registers."""
        return 1, *self.config.grid

    def hidden(
        self, inputs: PolicyInputs, noise: Noise, *, layers: Sequence[int] = ()
    ) -> dict[int, Float[Tensor, "B 1 H W E"]]:
        """Return the policy's image tokens before the first block, which are all that it sees of the observation's frame.

        Raises ValueError for `layers` other than 0. Later image tokens depend on the noisy actions.
        """
        if set(layers) - {0}:
            raise ValueError(f"layers: expected 0, the image tokens before the first block, got {tuple(layers)}")
        current = self.latents(inputs)[:, 0]
        return {0: self.merge(current, self.absent_future(len(current))).unsqueeze(1)}

    def act_on(
        self,
        hidden: Mapping[int, Float[Tensor, "B 1 H W E"]],
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Act on given image tokens."""
        return self._denoise_actions(hidden[0], Task.POLICY, inputs, noise["action"], steps)

    def visit_attention(
        self,
        hidden: Mapping[int, Float[Tensor, "B 1 H W E"]],
        inputs: PolicyInputs,
        noise: Noise,
        visit: Callable[[Sequence[Float[Tensor, "B heads Q N"]]], None],
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Act as `act_on`, and call `visit` with the part of each joint attention that falls on the image tokens.

        The queries are [state | actions]. Registers, state and actions get the rest, so the weights sum to less than 1.
        """
        return self._denoise_actions(hidden[0], Task.POLICY, inputs, noise["action"], steps, visit=visit)


def quarters(count: int) -> tuple[slice, slice, slice, slice]:
    """Return the rows of each task in a batch, in the order of `Task`. Raises ValueError where they are not equal."""
    rows, rest = divmod(count, len(Task))
    if rest or not rows:
        raise ValueError(
            f"stage.batch_size: LDA trains {len(Task)} tasks on equal parts of a batch, so it needs a multiple of "
            f"{len(Task)} samples, got {count}"
        )
    policy, inverse, forward, forecasting = (slice(task * rows, (task + 1) * rows) for task in Task)
    return policy, inverse, forward, forecasting
