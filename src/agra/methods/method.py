"""The protocol of a method: the samples that it needs, its loss, its actions, and its parts.

Trainer, sharding, checkpoints, policies, planner and instruments use a method through this protocol alone. A method is
one file beside it, listed in `agra.methods.table`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agra.alignment.teacher import TeacherConfig
from agra.batch import Batch, PolicyInputs
from agra.precision import autocast_to_weights
from agra.stages import Stage
from agra.wam.codec import CodecConfig
from agra.wam.text import TextConfig
from agra.wam.video_dit import VideoDiTConfig


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Content of a sample, besides state, actions and embodiment.

    Frames are counted at the source's frame stride: 0 is the observation, 1 the next frame of the window, -1 the frame
    before the observation. Empty fields are not read.
    """

    clip: int = 0
    """Frames 0 to clip - 1, encoded together by the video codec: `Batch.latents`."""
    frame_latents: tuple[int, ...] = ()
    """Frames that the video codec encodes one by one: `Batch.frame_latents`."""
    frames: tuple[int, ...] = ()
    """Frames as pictures of the method's frame size: `Batch.frames`."""
    states: tuple[int, ...] = ()
    """Frames whose states are read as well: `Batch.states`. No frame is later than the observation."""
    features: tuple[int, ...] = ()
    """Frames whose teacher features are an input: `Batch.features`."""
    targets: tuple[int, ...] = ()
    """Frames whose teacher features are a target of training: `Batch.targets`."""
    targets_inside: bool = False
    """Leave out the targets of windows whose last target frame lies past the episode's end (`Batch.target_rows`)."""
    instruction: bool = True
    """Instruction tokens: `Batch.instruction`."""

    @property
    def last_frame(self) -> int:
        """The latest frame, 0 or above."""
        return max((0, self.clip - 1, *self.frame_latents, *self.frames, *self.features, *self.targets))


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes that the data and a method agree on."""

    frame_size: tuple[int, int]
    """(H, W) to which frames are resized."""
    horizon: int
    """K, actions of a chunk."""
    state_dim: int
    """S, padded to the widest embodiment."""
    action_dim: int
    """D, padded to the widest embodiment."""
    num_embodiments: int
    instruction: tuple[int, int] = (0, 0)
    """(L, E), tokens of an instruction and their width."""
    feature_grid: tuple[int, int] = (1, 1)
    """(H, W) to which the teacher's features are interpolated."""


class MethodConfig(ABC):
    """Settings of a method: the base of a frozen dataclass with a field `kind`, its name in `agra.methods.table`.

    Subclasses define the abstract members. The defaults of the other members fit a method without stages, frozen
    networks or token grids.
    """

    kind: str
    """The method's name."""

    # --- data ---------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Sizes of its inputs and actions."""

    @abstractmethod
    def needs(self) -> Needs:
        """Content of a training sample."""

    @abstractmethod
    def needs_to_act(self) -> Needs:
        """Content of an observation."""

    @property
    def public_model(self) -> str | None:
        """Hub id of the public model whose weights a first stage can take (`--init-from`)."""
        return None

    @property
    def codec(self) -> CodecConfig | None:
        """The frozen video codec whose latents it reads."""
        return None

    @property
    def text(self) -> TextConfig | None:
        """The frozen text encoder whose tokens it reads."""
        return None

    @property
    def text_projection(self) -> VideoDiTConfig | None:
        """The video DiT whose frozen text projection is applied to the tokens before they are cached."""
        return None

    @property
    def teacher(self) -> TeacherConfig | None:
        """The frozen visual encoder whose features it reads or is aligned with, at any stage."""
        return None

    @property
    def frame_stride(self) -> int | None:
        """The only frame stride that the method allows, where it counts frames as control steps."""
        return None

    # --- training -----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def part_names(self) -> tuple[str, ...]:
        """Names of `Method.parts`."""

    @abstractmethod
    def build(self) -> "Method":
        """Make the method with fresh weights."""

    def at_stage(self, stage: Stage) -> Self:
        """Return the config with a stage's losses. Raises ValueError for a stage that the method does not have."""
        if stage is not Stage.JOINT:
            raise ValueError(f"{self.kind}: expected the joint stage, the only one of this method, got {stage}")
        return self

    def frozen_at(self, stage: Stage) -> tuple[str, ...]:
        """List the parts that a stage keeps frozen by default."""
        return ()

    def check(self, stage: Stage, frozen: Sequence[str]) -> None:
        """Raise ValueError where the losses do not belong to a stage with these frozen parts."""
        self.at_stage(stage)

    @property
    def trains_actions(self) -> bool:
        """True where the stage's losses train an action head."""
        return True

    @property
    def clips_actions(self) -> bool:
        """True where the method clips actions to [-1, 1]. Their normalisation must then map them into that range."""
        return False

    @property
    def batch_multiple(self) -> int:
        """Divisor of the size of every micro-batch."""
        return 1

    # --- token grids --------------------------------------------------------------------------------------------------

    @property
    def aligned_layers(self) -> tuple[int, ...]:
        """Numbers of the token grids that training aligns with the teacher."""
        return ()

    @property
    def aligns_patches(self) -> bool:
        """True where the targets of the aligned layers are the teacher's patch features, neither changed nor pooled."""
        return bool(self.aligned_layers)

    @property
    def grid_frames(self) -> tuple[int, ...]:
        """The frame shown at each time position of a token grid. (0,) is the observation alone."""
        return (0,)

    @property
    def imagined_frames(self) -> tuple[int, ...]:
        """The frames of the video that the method predicts (`Imagines`), the observation first."""
        return tuple(range(max(1, self.needs().clip)))

    # --- acting -------------------------------------------------------------------------------------------------------

    @property
    def acts_on_average(self) -> bool:
        """True where a policy acts on the averaged weights of a run that keeps them (`StageConfig.ema_decay`)."""
        return False

    def to_act(self) -> Self:
        """Return the config without the parts that only training needs."""
        return self

    def describe(self) -> str:
        """Describe the method in a phrase for model cards and reports."""
        return self.kind


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a batch, as far as the stage computes them."""

    total: Float[Tensor, ""]
    terms: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Unweighted losses by name: video, action, alignment, dynamics."""
    figures: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Other figures to log, by their names in the log."""

    @property
    def row(self) -> dict[str, Tensor]:
        """All values by their names in the log."""
        return {"loss": self.total} | {f"{name}_loss": term for name, term in self.terms.items()} | dict(self.figures)


LossDenominators = Mapping[str, Float[Tensor, ""]]
"""Loss denominators, averaged over ranks and micro-batches, so that the mean of the shard losses equals the full-batch
loss. The keys are those of `Method.counts`."""
Noise = Mapping[str, Tensor]
"""Starting noise of a response by name, one row for each observation, in the shapes of `Method.noise_shapes`."""
Continuation = tuple[Float[Tensor, "B K D"], Float[Tensor, "B K D"]]
"""Actions of the chunk in execution, and the weight of each number (`agra.flow.continuation_weights`)."""
Lap = Callable[[str], None]
"""Records the end of a stage of a response, by its name."""


class Method(nn.Module, ABC):
    """A trainable policy. Its forward pass computes the losses of a training step."""

    config: Any

    @abstractmethod
    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """Compute all losses whose weight is above zero.

        A `batch` that is a part of a step comes with `denominators`.
        """

    def forward(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """Call `loss` through the root module, where sharding hooks in."""
        return self.loss(batch, denominators)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Count the numbers that each masked loss of a batch averages over, by name. The batch must be on the CPU."""
        return {"actions": batch.action_mask.sum().item()}

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Return the modules that have their own learning rate, gradient norm and file.

        Each parameter is in exactly one.
        """

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the repeated modules in the order in which they run: the units of sharding, checkpointing and
        compilation.
        """

    def always_frozen(self) -> list[nn.Module]:
        """Return the modules that no stage trains, such as a projection whose results are cached."""
        return []

    def shared_parts(self, parts: Mapping[str, nn.Module], earlier: Any) -> dict[str, nn.Module]:
        """Select the `parts` that can start from a checkpoint made with the method config `earlier`. All by default.

        A part may be returned in pieces, as `<part>.<name of the piece>`.
        """
        return dict(parts)

    def text_projection(self) -> nn.Module | None:
        """Return the module that `MethodConfig.text_projection` describes."""
        return None

    def update_averages(self, *, restart: bool = False) -> None:
        """Update the averages of trained weights that the loss reads. They have no gradients. By default there are none.

        The trainer calls this after every step of the optimiser, when the weights may be shards. With `restart` the
        averages become the present weights. That is called once, after the initial weights have been loaded.
        """
        return

    @abstractmethod
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one observation's starting noise, by name, in the order in which they are drawn."""

    @abstractmethod
    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Compute a chunk of normalised actions for each observation, in `steps` denoising steps."""

    def actor(self, **options: Any) -> "Actor":
        """Prepare the method for acting in a policy. Raises ValueError for options that the method does not have."""
        if options.get("compiled") or options.get("pool_future", 1) != 1:
            raise ValueError(f"{self.config.kind}: the options compiled and pool_future do not apply to this method")
        return PlainActor(self, steps=options.get("action_steps"))


class Actor(Protocol):
    """Inference of a method with fixed weights."""

    compiled: bool

    def prepare_instruction(self, tokens: Float[Tensor, "L E"]) -> Any:
        """Compute the part of a response that follows from the instruction alone."""
        ...

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        instructions: Sequence[Any],
        *,
        continuation: Continuation | None = None,
        lap: Lap = lambda stage: None,
    ) -> Float[Tensor, "B K D"]:
        """Act as `Method.act`, with the prepared instruction of each observation."""
        ...

    def update(self, weights: Method) -> None:
        """Copy the weights of another method of the same config, in place."""
        ...

    def compile(self) -> None:
        """Compile the modules that act, where the options enable it. Responses before this call are uncompiled."""
        ...

    def batch_sizes(self, max_batch: int) -> list[int]:
        """List the batch sizes in which up to `max_batch` observations run."""
        ...


class PlainActor:
    """Acts with `Method.act`, without preparation."""

    compiled = False

    def __init__(self, method: Method, *, steps: int | None = None) -> None:
        self.method, self.steps = method, steps

    def prepare_instruction(self, tokens: Float[Tensor, "L E"]) -> None:
        """Return nothing: `Method.act` reads the tokens themselves."""

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        instructions: Sequence[Any],
        *,
        continuation: Continuation | None = None,
        lap: Lap = lambda stage: None,
    ) -> Float[Tensor, "B K D"]:
        """Run `Method.act`, under autocast where the weights are bfloat16."""
        with autocast_to_weights(self.method):
            actions = self.method.act(inputs, noise, steps=self.steps, continuation=continuation)
        lap("action")
        return actions

    @torch.no_grad()
    def update(self, weights: Method) -> None:
        """Copy the other method's parameters."""
        self.method.load_state_dict(weights.state_dict())

    def compile(self) -> None:
        """Do nothing."""

    def batch_sizes(self, max_batch: int) -> list[int]:
        """Return one size, since all sizes run alike."""
        return [1]


# --- capabilities that a method may have ------------------------------------------------------------------------------


@runtime_checkable
class Imagines(Protocol):
    """A method that predicts video."""

    def imagine(self, inputs: PolicyInputs, noise: Noise, *, steps: int) -> Float[Tensor, "B C T h w"]:
        """Predict the video's latents. The first ones are the observation's.

        A method without a clip returns one latent for each of `MethodConfig.imagined_frames` after the observation.
        """
        ...


@runtime_checkable
class ReadsTokens(Protocol):
    """A method whose action head reads grids of tokens, which instruments can read and replace.

    Grids are numbered. A WAM's numbers are its video layers.
    """

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Numbers of the grids that the action head reads, once for each block that reads."""
        ...

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(T, H, W) of every grid."""
        ...

    def hidden(
        self, inputs: PolicyInputs, noise: Noise, *, layers: Sequence[int] = ()
    ) -> dict[int, Float[Tensor, "B T H W E"]]:
        """Compute the grids that the action head reads, and those of `layers`."""
        ...

    def act_on(
        self, hidden: Mapping[int, Float[Tensor, "B T H W E"]], inputs: PolicyInputs, noise: Noise, *, steps: int | None
    ) -> Float[Tensor, "B K D"]:
        """Compute the actions that follow from `hidden`."""
        ...


@runtime_checkable
class Attends(Protocol):
    """A method with attention over its token grids."""

    def visit_attention(
        self,
        hidden: Mapping[int, Float[Tensor, "B T H W E"]],
        inputs: PolicyInputs,
        noise: Noise,
        visit: Callable[[Sequence[Float[Tensor, "B heads Q N"]]], None],
        *,
        steps: int | None,
    ) -> Float[Tensor, "B K D"]:
        """Act as `act_on`, and call `visit` with each denoising step's weights by block.

        The last K queries are the actions.
        """
        ...


@runtime_checkable
class AttendsToText(Protocol):
    """A method whose token grids read the instruction."""

    def text_attention(
        self, inputs: PolicyInputs, noise: Noise, *, layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "B T H W L"]]:
        """Return the attention of every token of `layers` to each instruction token."""
        ...


def observation_inputs(batch: Batch, config: MethodConfig) -> PolicyInputs:
    """Reduce training windows to their observations, as a policy encodes them."""
    needs, acting = config.needs(), config.needs_to_act()

    def pick(values: Tensor | None, frames: Sequence[int], selected: Sequence[int]) -> Tensor | None:
        if values is None or not selected:
            return None
        return values[:, [frames.index(frame) for frame in selected]]

    latents = batch.latents[:, :, :1] if batch.latents is not None and acting.clip else None
    return PolicyInputs(
        state=batch.state,
        embodiment=batch.embodiment,
        instruction=batch.instruction if acting.instruction else None,
        latents=latents,
        frame_latents=pick(batch.frame_latents, needs.frame_latents, acting.frame_latents),
        frames=pick(batch.frames, needs.frames, acting.frames),
        features=pick(batch.features, needs.features, acting.features),
        states=pick(batch.states, needs.states, acting.states),
    )
