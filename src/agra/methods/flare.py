"""FLARE (Zheng et al., arXiv 2505.15659): future tokens inside an action head, aligned with the future observation.

An encoder turns patch features and the instruction into a few tokens, which the action head attends to. Learned future
tokens run through the head beside state and actions. In training their states at three quarters of the depth, through
an MLP, point towards an embedding of the observation at the end of the chunk. That embedding is the encoder's, by an
exponential average of its weights (`average`), or the frozen vision encoder's (`frozen`). `none` is the same policy
without the loss. The future tokens remain at inference. docs/methods.md names what differs from the original.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from agra.alignment.loss import alignment_loss, cosine_gain
from agra.alignment.teacher import TeacherConfig, teacher_shape
from agra.batch import Batch, PolicyInputs
from agra.flow import beta_levels, continue_chunk, euler, interpolate, velocity
from agra.methods.method import Continuation, LossDenominators, Losses, Method, MethodConfig, Needs, Noise, Shapes
from agra.rng import noise_like
from agra.stages import Stage
from agra.wam.action_dit import ActionDiT, ActionDiTConfig
from agra.wam.bridge import Attention, BridgeConfig, FeedForward, SelfAttentionBlock, grid_sinusoid
from agra.wam.text import TextConfig

SIGLIP2 = TeacherConfig(kind="siglip", source="google/siglip2-large-patch16-256", input_size=(256, 256))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the observation encoder. Layers, queries and sizes of the inputs are the paper's, the width is not known."""

    num_layers: int = 4  # self-attention blocks over patches and instruction
    num_heads: int = 16  # attention heads. Their number times head_dim is the width
    head_dim: int = 64  # width of an attention head
    num_queries: int = 32  # tokens into which patches and instruction are summarised

    @property
    def width(self) -> int:
        """Width of the blocks and of the tokens."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class FLAREConfig(MethodConfig):
    """Networks, target and weight of the alignment. The defaults are the paper's where it names them."""

    kind: Literal["flare"] = "flare"
    target: Literal["average", "frozen", "none"] = "average"
    """Embedding of the future observation: by the averaged encoder, by the frozen vision encoder, or no alignment."""
    vision_encoder: TeacherConfig = SIGLIP2
    feature_grid: tuple[int, int] = (16, 16)
    """(H, W) of the patch features that the encoder reads."""
    text_encoder: TextConfig = field(default_factory=lambda: TextConfig(kind="minilm", length=32))
    text_dim: int = 384
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    action_dit: ActionDiTConfig = field(
        default_factory=lambda: ActionDiTConfig(num_blocks=4, guidance_dim=1024, future_tokens=32)
    )
    aligned_after: int = 6
    """Sub-blocks of the action head before the aligned states: three quarters of them."""
    future_frame: int = 16
    """Frame of the target, in frames at the data's stride. It should show the end of the chunk."""
    target_grid: tuple[int, int] = (8, 8)
    """(H, W) to which the frozen target's features are pooled, one cell for each future token."""
    average_decay: float = 0.995
    """Decay of the encoder's average at every step."""
    alignment_weight: float = 0.2
    action_draws: int = 1
    """Noise draws of the losses for each sample. Not in the paper. They share the encoder's pass."""

    def __post_init__(self) -> None:
        if self.target not in ("average", "frozen", "none"):
            raise ValueError(f"method.target: expected average, frozen or none, got {self.target!r}")
        head = self.action_dit
        if head.guidance_dim != self.encoder.width:
            raise ValueError(
                f"method.action_dit.guidance_dim: expected {self.encoder.width}, the encoder's width, got"
                f" {head.guidance_dim}"
            )
        tokens = {"average": self.encoder.num_queries, "frozen": prod(self.target_grid)}.get(self.target)
        if tokens is not None and head.future_tokens != tokens:
            raise ValueError(
                f"method.action_dit.future_tokens: expected {tokens}, one for each token of the target, got"
                f" {head.future_tokens}"
            )
        if not 1 <= self.aligned_after <= 2 * head.num_blocks:
            raise ValueError(
                f"method.aligned_after: expected 1 to {2 * head.num_blocks} sub-blocks, got {self.aligned_after}"
            )
        if not 0 <= self.average_decay <= 1:
            raise ValueError(f"method.average_decay: expected a number in [0, 1], got {self.average_decay}")
        for name in ("action_draws", "future_frame"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def shapes(self) -> Shapes:
        """Sizes of the patch features, states and actions."""
        head = self.action_dit
        return Shapes(
            frame_size=self.vision_encoder.input_size,
            horizon=head.horizon,
            state_dim=head.state_dim,
            action_dim=head.action_dim,
            num_embodiments=head.num_embodiments,
            instruction=(self.text_encoder.length, self.text_dim),
            feature_grid=self.feature_grid,
        )

    @property
    def aligns(self) -> bool:
        """True where the loss has an alignment."""
        return self.target != "none"

    def needs(self) -> Needs:
        """Return the patch features of the observation, and those of the future frame where the loss aligns."""
        if not self.aligns:
            return self.needs_to_act()
        return replace(self.needs_to_act(), targets=(self.future_frame,), targets_inside=True)

    def needs_to_act(self) -> Needs:
        """Return the patch features of the observation."""
        return Needs(features=(0,))

    @property
    def text(self) -> TextConfig:
        """The frozen text encoder."""
        return self.text_encoder

    @property
    def teacher(self) -> TeacherConfig:
        """The frozen vision encoder."""
        return self.vision_encoder

    @property
    def part_names(self) -> tuple[str, ...]:
        """The encoder and the head, and in training the MLP of the alignment and the encoder's average."""
        average = ("target_encoder",) if self.target == "average" else ()
        return ("encoder", "action_dit", *(("projector",) if self.aligns else ()), *average)

    def at_stage(self, stage: Stage) -> Self:
        """Turn the alignment off in the adapt stage, which trains the action-aware embedding of `average`."""
        if stage is not Stage.ADAPT:
            return super().at_stage(stage)
        if self.target == "frozen":
            raise ValueError("flare: target=frozen has no adapt stage, since its target is the frozen vision encoder")
        return replace(self, target="none")

    def check(self, stage: Stage, frozen: Sequence[str]) -> None:
        """Check that the adapt stage has no alignment."""
        if self.at_stage(stage) != self:
            raise ValueError(f"method.target: must be none in the {stage} stage, got {self.target}")

    def build(self) -> "FLARE":
        """Make the networks with fresh weights."""
        return FLARE(self)

    def to_act(self) -> Self:
        """Return the config without the alignment, and so without its MLP and the average."""
        return replace(self, target="none")

    def describe(self) -> str:
        """Describe the target in a phrase."""
        target = {
            "average": "the encoder's average",
            "frozen": f"the frozen {self.vision_encoder.kind.replace('_', ' ')}",
        }
        if not self.aligns:
            return "FLARE's policy without its alignment"
        return (
            f"FLARE: {self.action_dit.future_tokens} future tokens aligned with {target[self.target]}, weight"
            f" {self.alignment_weight:g}"
        )


class QueryReader(nn.Module):
    """Reads tokens into learned queries: cross-attention and feed-forward, pre-norm, then a final norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.width
        self.queries = nn.Parameter(torch.empty(config.num_queries, width))
        nn.init.normal_(self.queries, std=0.02)
        self.norm1, self.norm_tokens = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, width, config.num_heads, config.head_dim, 0.0)
        self.norm2, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ff = FeedForward(width, 0.0)

    def forward(
        self, tokens: Float[Tensor, "B N W"], *, return_attention: bool = False
    ) -> tuple[Float[Tensor, "B M W"], Float[Tensor, "B heads M N"] | None]:
        """Return the queries' tokens, and on request the attention weights."""
        queries = self.queries.expand(len(tokens), -1, -1)
        attended, context, weights = self.norm1(queries), self.norm_tokens(tokens), None
        if return_attention:
            update, weights = self.attn.with_weights(attended, context)
        else:
            update = self.attn(attended, context)
        x = queries + update
        return self.norm_out(x + self.ff(self.norm2(x))), weights


class ObservationTokens(nn.Module):
    """The observation encoder: patches and instruction, fused by self-attention, read into M tokens."""

    def __init__(self, config: FLAREConfig) -> None:
        super().__init__()
        shape, vision_width = config.encoder, teacher_shape(config.vision_encoder).width
        self.vision = nn.Sequential(nn.LayerNorm(vision_width), nn.Linear(vision_width, shape.width))
        self.text = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, shape.width))
        self.positions = nn.Parameter(grid_sinusoid((1, *config.feature_grid), shape.width)[0])
        block = BridgeConfig(num_heads=shape.num_heads, head_dim=shape.head_dim, dropout=0.0)
        self.blocks = nn.ModuleList(SelfAttentionBlock(block) for _ in range(shape.num_layers))
        self.reader = QueryReader(shape)

    def forward(
        self, patches: Float[Tensor, "B H W P"], instruction: Float[Tensor, "B L E"], *, return_attention: bool = False
    ) -> tuple[Float[Tensor, "B M W"], Float[Tensor, "B heads M N"] | None]:
        """Encode observations. On request return the queries' attention to the H * W patches and L text tokens."""
        patches, instruction = patches.to(self.positions.dtype), instruction.to(self.positions.dtype)
        x = torch.cat([(self.vision(patches) + self.positions).flatten(1, 2), self.text(instruction)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.reader(x, return_attention=return_attention)


class FLARE(Method):
    """The encoder, the action head with its future tokens, and in training the MLP and the target of the alignment."""

    config: FLAREConfig

    def __init__(self, config: FLAREConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ObservationTokens(config)
        self.action_dit = ActionDiT(config.action_dit)
        self.projector: nn.Sequential | None = None
        self.target_encoder: ObservationTokens | None = None
        """The average of the encoder. None for the other targets."""
        if config.aligns:
            width, frozen = config.action_dit.width, config.target == "frozen"
            target_width = teacher_shape(config.vision_encoder).width if frozen else config.encoder.width
            self.projector = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, target_width))
        if config.target == "average":
            self.target_encoder = ObservationTokens(config).requires_grad_(False)
            self.update_averages(restart=True)

    def parts(self) -> dict[str, nn.Module]:
        """Return the networks by name."""
        return {name: self.get_submodule(name) for name in self.config.part_names}

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the encoder and of the head. The average is a unit of its own (`always_frozen`)."""
        return [*self.encoder.blocks, self.encoder.reader, *self.action_dit.blocks]

    def always_frozen(self) -> list[nn.Module]:
        """Return the encoder's average, which has no gradient."""
        return [] if self.target_encoder is None else [self.target_encoder]

    def shared_parts(self, parts: Mapping[str, nn.Module], earlier: FLAREConfig) -> dict[str, nn.Module]:
        """Select the encoder alone of an action-aware embedding, a model without alignment, for `average`."""
        embedding = self.config.target == "average" and not earlier.aligns
        changed = () if earlier.target == self.config.target else ("projector",)
        return {n: part for n, part in parts.items() if (n == "encoder" if embedding else n not in changed)}

    @torch.no_grad()
    def update_averages(self, *, restart: bool = False) -> None:
        """Move the target encoder by 1 - `average_decay` towards the encoder, or with `restart` all the way.

        Raises ValueError for an encoder with adapters, whose weights the average would not follow.
        """
        if self.target_encoder is None:
            return
        averages, weights = (dict(m.named_parameters()) for m in (self.target_encoder, self.encoder))
        if averages.keys() != weights.keys():
            raise ValueError("stage.lora.layers: flare's target follows the encoder's weights; adapt action_dit alone")
        fraction = 1.0 if restart else 1 - self.config.average_decay
        for name, average in averages.items():
            average.lerp_(weights[name], fraction)

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """Compute the squared velocity error of the kept actions and the alignment, and their weighted sum."""
        config, draws = self.config, self.config.action_draws
        denominators = denominators or self.denominators(batch)
        actions, mask, state, embodiment = (
            x.repeat_interleave(draws, dim=0) for x in (batch.actions, batch.action_mask, batch.state, batch.embodiment)
        )
        noise = noise_like(actions)
        level = beta_levels(len(actions)).to(actions.device)
        guidance = [self.read(batch)] * config.action_dit.num_blocks
        noisy = interpolate(actions, noise, level)
        output = self.action_dit(noisy, state, level, guidance, embodiment, future_after=config.aligned_after)
        error = (output.velocity - velocity(actions, noise)).float().square() * mask
        action = error.sum() / (denominators["actions"] * draws)
        if self.projector is None:
            return Losses(total=action, terms={"action": action})
        alignment, figures = self.alignment_loss(batch, output.future, denominators["targets"])
        total = action + config.alignment_weight * alignment
        return Losses(total=total, terms={"action": action, "alignment": alignment}, figures=figures)

    def alignment_loss(
        self, batch: Batch, future: Float[Tensor, "B_draws M W"], denominator: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Compute 1 - cos between the future tokens and the target, averaged over tokens and samples with targets.

        In a batch without targets the first sample stands in, with weight 0, so that all processes run the same
        operations. The figures are the cosine's gain over the mean target, and the targets' variance (`unit_variance`).
        Validation adds the variance of the averaged encoder's targets under one instruction, which frames alone cause.
        A micro-batch of one sample has no variance, so its figures leave both out.
        """
        assert self.projector is not None
        rows: Any = slice(None)
        if batch.target_rows is not None:
            rows = batch.target_rows if len(batch.target_rows) else slice(1)
        target = self.targets(batch, rows)
        predicted = self.projector(future.unflatten(0, (-1, self.config.action_draws))[rows])
        expanded = target[:, None].expand_as(predicted)  # R draws M P
        scale = batch.num_targets / denominator
        figures = {"alignment_cosine_gain": cosine_gain([predicted], expanded).detach() * scale}
        several = len(batch) > 1  # and not `target`, whose length differs between the micro-batches of a step
        if several:
            figures["target_variance"] = unit_variance(target) * scale
        if several and self.target_encoder is not None and not self.training:
            assert batch.instruction is not None
            one = replace(batch, instruction=batch.instruction[:1].expand_as(batch.instruction))
            figures["target_frame_variance"] = unit_variance(self.targets(one, rows)) * scale
        return (1 + alignment_loss([predicted], expanded)) * scale, figures

    @torch.no_grad()
    def targets(self, batch: Batch, rows: Any = slice(None)) -> Float[Tensor, "R M P"]:
        """Embed the future frame of some samples, without gradient."""
        assert batch.targets is not None
        assert batch.instruction is not None
        patches = batch.targets[rows, 0]
        if self.target_encoder is not None:
            return self.target_encoder(patches, batch.instruction[rows])[0]
        return F.adaptive_avg_pool2d(patches.movedim(-1, 1), self.config.target_grid).flatten(2).mT

    def counts(self, batch: Batch) -> dict[str, float]:
        """Count the actions to learn and the samples with targets."""
        return super().counts(batch) | {"targets": float(batch.num_targets)}

    def denominators(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss denominators of a whole step. Every one is at least 1."""
        targets = torch.full((), max(1, batch.num_targets), device=batch.state.device)
        return {"actions": batch.action_mask.sum().clamp(min=1), "targets": targets}

    # --- acting and instruments ---------------------------------------------------------------------------------------

    def read(self, inputs: Batch | PolicyInputs) -> Float[Tensor, "B M W"]:
        """Encode the observations."""
        assert inputs.features is not None
        assert inputs.instruction is not None
        return self.encoder(inputs.features[:, 0], inputs.instruction)[0]

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the actions' noise."""
        return {"action": (self.config.action_dit.horizon, self.config.action_dit.action_dim)}

    def act(
        self, inputs: PolicyInputs, noise: Noise, *, steps: int | None = None, continuation: Continuation | None = None
    ) -> Float[Tensor, "B K D"]:
        """Encode the observation once, then run `steps` Euler steps of the head, by default 4."""
        guidance = [self.read(inputs)] * self.config.action_dit.num_blocks

        def predict(actions: Tensor, level: Tensor) -> Tensor:
            return self.action_dit(actions, inputs.state, level, guidance, inputs.embodiment).velocity

        guided = predict if continuation is None else continue_chunk(predict, *continuation)
        return euler(guided, noise["action"], steps or 4)

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The patch features, grid 0, which every cross-attention block reads through the encoder."""
        return (0,) * self.config.action_dit.num_blocks

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(1, H, W) of the patch features."""
        return (1, *self.config.feature_grid)

    def hidden(
        self, inputs: PolicyInputs, noise: Noise, *, layers: Sequence[int] = ()
    ) -> dict[int, Float[Tensor, "B T H W P"]]:
        """Return the patch features. Raises ValueError for other layers than 0."""
        if wrong := [layer for layer in layers if layer]:
            raise ValueError(f"layers: flare has one token grid, the patch features, numbered 0; got {wrong}")
        assert inputs.features is not None
        return {0: inputs.features}

    def act_on(
        self,
        hidden: Mapping[int, Float[Tensor, "B T H W P"]],
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Act on other patch features."""
        return self.act(replace(inputs, features=hidden[0]), noise, steps=steps)

    def visit_attention(
        self,
        hidden: Mapping[int, Float[Tensor, "B T H W P"]],
        inputs: PolicyInputs,
        noise: Noise,
        visit: Callable[[Sequence[Float[Tensor, "B heads Q N"]]], None],
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Act as `act_on`, and call `visit` with the attention to the patches that passes through the encoder's tokens.

        That is the head's attention to the tokens, times the mean over heads of the tokens' attention to the patches.
        The part that goes to the instruction is left out.
        """
        assert inputs.instruction is not None
        tokens, weights = self.encoder(hidden[0][:, 0], inputs.instruction, return_attention=True)
        to_patches = weights[..., : prod(self.token_grid)].mean(dim=1, keepdim=True)
        guidance = [tokens] * self.config.action_dit.num_blocks

        def predict(actions: Tensor, level: Tensor) -> Tensor:
            head = self.action_dit
            output = head(actions, inputs.state, level, guidance, inputs.embodiment, return_attention=True)
            assert output.attention is not None
            visit([block @ to_patches for block in output.attention])
            return output.velocity

        return euler(predict, noise["action"], steps or 4)


def unit_variance(tokens: Float[Tensor, "R M P"]) -> Float[Tensor, ""]:
    """Estimate the variance of tokens of length 1 from R samples: from 0, all equal, to 1. Averaged over the M tokens.

    The estimate does not depend on R in expectation. One sample gives 0.
    """
    within = 1 - F.normalize(tokens.float(), dim=-1).mean(dim=0).square().sum(dim=-1).mean()
    return within * len(tokens) / max(1, len(tokens) - 1)
