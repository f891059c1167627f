"""The world action model as a method: the pass that the head reads, the pass that is aligned, three losses (Eqs. 7,
18).

The denoising pass runs at a sampled noise level, for the video loss. The conditioning pass runs at level exactly 1
(`WAMConfig.guidance_noise_level`), as at inference. `guidance_pass` is the pass that the action head reads,
`aligned_pass` the pass whose hidden states are aligned with the teacher (A.3).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agra.alignment.loss import AlignmentConfig, Projectors, alignment_loss, cosine_gain, spatially_normalized
from agra.alignment.teacher import TeacherConfig, reference_frames, teacher_shape
from agra.batch import Batch, PolicyInputs
from agra.flow import beta_levels, euler, interpolate, logit_normal_levels, uniform_levels, velocity
from agra.methods.method import (
    Actor,
    Continuation,
    LossDenominators,
    Losses,
    Method,
    MethodConfig,
    Needs,
    Noise,
    Shapes,
)
from agra.rng import noise_like
from agra.stages import Stage
from agra.wam.codec import CodecConfig
from agra.wam.model import WAM, WAMConfig
from agra.wam.text import TextConfig
from agra.wam.video_dit import VideoDiTConfig


class Pass(StrEnum):
    """The two forward passes of the video DiT in a training step."""

    DENOISING = "denoising"
    CONDITIONING = "conditioning"


class NoiseLevels(StrEnum):
    """Distribution of the denoising pass's noise level (docs/paper.md #12)."""

    LOGIT_NORMAL = "logit_normal"
    UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the losses, and the roles of the two passes. The defaults are those of AGRA-ActionCondPass (C.3).

    | guidance_pass | aligned_pass | variant of Table 2 |
    |---|---|---|
    | conditioning | conditioning | AGRA (ActionCondPass) |
    | conditioning | denoising | AGRA-VideoPass |
    | denoising | denoising | AGRA-SharedDenoisingPass |
    """

    guidance_pass: Pass = Pass.CONDITIONING  # pass whose hidden states the action head reads
    aligned_pass: Pass = Pass.CONDITIONING  # pass whose hidden states are aligned with the teacher
    video_weight: float = 1.0  # of the video loss (Eq. 9). 0 turns it off
    action_weight: float = 1.0  # of the action loss (Eq. 13). 0 turns it off
    alignment_weight: float = 0.01  # of the alignment loss (Eq. 6). 0 turns it off
    noise_levels: NoiseLevels = NoiseLevels.LOGIT_NORMAL  # distribution of the denoising pass's noise level
    noise_shift: float = 5.0  # shift of logit_normal. A larger one gives noisier levels, 1 leaves them unchanged
    action_draws: int = 1
    """Noise draws of the action loss for each sample. Not in the paper. They share the video pass, so they cost
    little."""
    video_batch_fraction: float = 1.0
    """Fraction of the batch that runs through the denoising pass. Not in the paper. It saves time on small machines."""

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"method.objective.{name}_weight: expected at least 0, got {weight}")
        if self.guidance_pass is Pass.DENOISING and self.aligned_pass is Pass.CONDITIONING:
            raise ValueError(
                "method.objective: with guidance_pass=denoising there is no conditioning pass to align; set"
                " aligned_pass=denoising"
            )
        if self.action_draws < 1:
            raise ValueError(f"method.objective.action_draws: expected at least 1, got {self.action_draws}")
        if not 0 < self.video_batch_fraction <= 1:
            raise ValueError(
                f"method.objective.video_batch_fraction: expected a number in (0, 1], got {self.video_batch_fraction}"
            )
        if self.video_batch_fraction < 1 and Pass.DENOISING in (self.guidance_pass, self.aligned_pass):
            raise ValueError(
                "method.objective.video_batch_fraction: must be 1 where guidance or alignment reads the denoising pass"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses by name."""
        return {"video": self.video_weight, "action": self.action_weight, "alignment": self.alignment_weight}


@dataclass(frozen=True, kw_only=True)
class WAMMethodConfig(MethodConfig):
    """A WAM with its alignment and its losses. The defaults are AGRA-DinoL8."""

    kind: Literal["wam"] = "wam"
    model: WAMConfig = field(default_factory=WAMConfig)
    alignment: AlignmentConfig | None = field(default_factory=AlignmentConfig)
    """None is the baseline WAM, without alignment and teacher."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        if self.alignment is not None:
            last = self.model.video_dit.num_layers - 1
            invalid = [layer for layer in self.alignment.layers if not 0 <= layer <= last]
            if invalid:
                raise ValueError(f"method.alignment.layers: expected layers of 0..{last}, got {invalid}")

    @property
    def aligns(self) -> bool:
        """True where the stage computes the alignment loss."""
        return self.alignment is not None and self.objective.alignment_weight > 0

    @property
    def pass_layers(self) -> dict[Pass, tuple[int, ...]]:
        """The passes of a training step, and the video layers whose hidden states each pass returns (Table 2)."""
        objective, layers = self.objective, {}
        if objective.video_weight > 0:
            layers[Pass.DENOISING] = set()
        if objective.action_weight > 0:
            layers.setdefault(objective.guidance_pass, set()).update(self.model.bridge.layers)
        if self.aligns:
            layers.setdefault(objective.aligned_pass, set()).update(self.aligned_layers)
        return {name: tuple(sorted(numbers)) for name, numbers in layers.items()}

    @property
    def shapes(self) -> Shapes:
        """Sizes of the frames, the action head and the video DiT's token grid."""
        head = self.model.action_dit
        return Shapes(
            frame_size=self.model.frame_size,
            horizon=head.horizon,
            state_dim=head.state_dim,
            action_dim=head.action_dim,
            num_embodiments=head.num_embodiments,
            instruction=(self.model.text.length, self.model.video_dit.text_dim),
            feature_grid=self.model.token_grid[1:],
        )

    @property
    def part_names(self) -> tuple[str, ...]:
        """The networks, and the projectors where the stage aligns."""
        bridge = ("bridge",) if self.model.bridge.has_weights else ()
        return ("video_dit", *bridge, "action_dit", *(("projectors",) if self.aligns else ()))

    @property
    def public_model(self) -> str | None:
        """The video model of the codec, where that is Cosmos's."""
        return self.codec.source if self.codec.kind == "wan" else None

    @property
    def codec(self) -> CodecConfig:
        """The video codec."""
        return self.model.codec

    @property
    def text(self) -> TextConfig:
        """The text encoder."""
        return self.model.text

    @property
    def text_projection(self) -> VideoDiTConfig | None:
        """The video DiT with its projection of Cosmos's tokens."""
        projects = self.text.kind == "cosmos_reason" and self.model.video_dit.text_projection_dim is not None
        return self.model.video_dit if projects else None

    @property
    def teacher(self) -> TeacherConfig | None:
        """The alignment's teacher."""
        return None if self.alignment is None else self.alignment.teacher

    @property
    def aligned_layers(self) -> tuple[int, ...]:
        """The alignment's video layers."""
        return () if self.alignment is None else self.alignment.layers

    @property
    def aligns_patches(self) -> bool:
        """False for iREPA's normalised targets and for the class token."""
        alignment = self.alignment
        return alignment is not None and not alignment.spatial_normalization and alignment.teacher.token == "patches"

    @property
    def grid_frames(self) -> tuple[int, ...]:
        """The reference frames of the latent frames (Eq. 3)."""
        return reference_frames(self.model.latent_shape[1], self.model.codec.time_stride)

    @property
    def trains_actions(self) -> bool:
        """True where the stage computes the action loss."""
        return self.objective.action_weight > 0

    @property
    def batch_multiple(self) -> int:
        """The smallest number of samples that `video_batch_fraction` divides without remainder."""
        return Fraction(self.objective.video_batch_fraction).limit_denominator(1000).denominator

    def needs(self) -> Needs:
        """Return the latents of the window, and the targets at every latent frame's reference frame (Eq. 3)."""
        return Needs(clip=self.model.num_frames, targets=self.grid_frames if self.aligns else ())

    def needs_to_act(self) -> Needs:
        """Return the observation's latent frame."""
        return Needs(clip=1)

    def at_stage(self, stage: Stage) -> Self:
        """Set the losses of C.3: video alone in the adapt stage, actions alone in the finetune stage."""
        weights = {
            Stage.ADAPT: {"video_weight": 1.0, "action_weight": 0.0, "alignment_weight": 0.0},
            Stage.JOINT: {},
            Stage.FINETUNE: {"video_weight": 0.0, "alignment_weight": 0.0},
        }
        return replace(self, objective=replace(self.objective, **weights[stage]))

    def frozen_at(self, stage: Stage) -> tuple[str, ...]:
        """Freeze the action head's parts in the adapt stage, and the video DiT in the finetune stage."""
        head = tuple(part for part in self.part_names if part in ("bridge", "action_dit"))
        return {Stage.ADAPT: head, Stage.JOINT: (), Stage.FINETUNE: ("video_dit",)}[stage]

    def check(self, stage: Stage, frozen: Sequence[str]) -> None:
        """Check that adapt trains the video DiT on the video loss alone, and that finetune does not train it."""
        off = {
            Stage.ADAPT: ("action_weight", "alignment_weight"),
            Stage.JOINT: (),
            Stage.FINETUNE: ("video_weight", "alignment_weight"),
        }
        for weight in off[stage]:
            if getattr(self.objective, weight) != 0:
                raise ValueError(
                    f"method.objective.{weight}: must be 0 in the {stage} stage, got {getattr(self.objective, weight)}"
                )
        if not self.pass_layers:
            raise ValueError("method.objective: no loss has a weight above 0")
        if stage is Stage.FINETUNE and "video_dit" not in frozen:
            raise ValueError("stage.frozen: the finetune stage keeps the video DiT as it is; add video_dit")
        if stage is Stage.ADAPT and "video_dit" in frozen:
            raise ValueError("stage.frozen: the adapt stage trains the video DiT alone; remove video_dit")

    def build(self) -> "WAMMethod":
        """Make the WAM and its projectors with fresh weights."""
        return WAMMethod(self)

    def to_act(self) -> Self:
        """Return the config without the alignment, and so without projectors."""
        return replace(self, alignment=None)

    def describe(self) -> str:
        """Describe the alignment in a phrase."""
        if not self.aligns or self.alignment is None:
            return "World action model without alignment"
        layers, teacher = ", ".join(map(str, self.alignment.layers)), self.alignment.teacher.kind.replace("_", " ")
        return (
            f"World action model with AGRA: video layer {layers} aligned with {teacher} on the "
            f"{self.objective.aligned_pass} pass, weight {self.objective.alignment_weight:g}"
        )


@dataclass(frozen=True, kw_only=True)
class VideoPasses:
    """Results of a training step's passes."""

    hidden: Mapping[Pass, Mapping[int, Float[Tensor, "B T H W D"]]]
    """Hidden states by pass and video layer."""
    losses: Mapping[str, Float[Tensor, ""]]
    """The video loss, where the denoising pass ran."""


class WAMMethod(Method):
    """A WAM with the projectors of its alignment."""

    def __init__(self, config: WAMMethodConfig) -> None:
        super().__init__()
        self.config = config
        self.wam = WAM(config.model)
        self.projectors: Projectors | None = None
        """None where the stage does not align."""
        if config.aligns and config.alignment is not None:
            teacher = config.alignment.teacher
            width = teacher_shape(teacher).width * max(1, len(teacher.depths))
            self.projectors = Projectors(config.model.video_dit.width, width, config.alignment)

    # --- the objective ------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """Compute the losses whose weight is above zero, and their weighted sum (Eqs. 7, 18).

        Without `denominators` the batch is a whole step.
        """
        objective, passes = self.config.objective, self.video_passes(batch)
        denominators = denominators or self.denominators(batch)
        terms, figures = dict(passes.losses), {}
        if objective.action_weight > 0:
            guidance = self.wam.guide(passes.hidden[objective.guidance_pass])
            terms["action"] = self.action_loss(batch, guidance, denominators["actions"])
        if self.projectors is not None:
            hidden = passes.hidden[objective.aligned_pass]
            alignment = self.alignment_loss(batch, hidden, denominators["targets"])
            terms["alignment"], figures["alignment_cosine_gain"] = alignment
        weighted = [weight * terms[name] for name, weight in objective.weights.items() if weight > 0 and name in terms]
        zero = torch.zeros((), device=batch.state.device)
        return Losses(total=sum(weighted, start=zero), terms=terms, figures=figures)

    def video_passes(self, batch: Batch) -> VideoPasses:
        """Run the passes that the stage needs: the denoising pass (Eqs. 8, 9), the conditioning pass (Eqs. 16, 19), or
        both as one forward.

        The video loss is that of the future latent frames, since the observation's velocity is known (#13).
        """
        assert batch.latents is not None
        assert batch.instruction is not None
        latents, text, layers = batch.latents, batch.instruction, self.config.pass_layers
        if Pass.DENOISING not in layers:
            noise = noise_like(latents)
            hidden = self.wam.condition(latents[:, :, :1], noise, text, layers=layers[Pass.CONDITIONING])
            return VideoPasses(hidden={Pass.CONDITIONING: hidden}, losses={})

        count = max(1, round(self.config.objective.video_batch_fraction * len(batch)))
        level = self._noise_levels(count).to(latents.device)
        noise = noise_like(latents[:count])
        if Pass.CONDITIONING in layers:
            denoised, conditioned = self.wam.denoise_and_condition(
                latents,
                noise,
                level,
                noise_like(latents),
                text,
                layers=layers[Pass.DENOISING],
                condition_layers=layers[Pass.CONDITIONING],
            )
            hidden = {Pass.DENOISING: denoised.hidden, Pass.CONDITIONING: conditioned}
        else:
            denoised = self.wam.denoise(latents[:count], noise, level, text[:count], layers=layers[Pass.DENOISING])
            hidden = {Pass.DENOISING: denoised.hidden}
        assert denoised.velocity is not None
        error = (denoised.velocity - velocity(latents[:count], noise))[:, :, 1:]
        return VideoPasses(hidden=hidden, losses={"video": error.float().square().mean()})

    def action_loss(
        self, batch: Batch, guidance: Sequence[Float[Tensor, "B N D"]], denominator: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Compute the action head's squared velocity error (Eqs. 11, 13), summed over the actions that the mask keeps
        and divided by `denominator` of them. All `action_draws` of a sample share its guidance."""
        draws = self.config.objective.action_draws
        actions, mask, state, embodiment = (
            x.repeat_interleave(draws, dim=0) for x in (batch.actions, batch.action_mask, batch.state, batch.embodiment)
        )
        noise = noise_like(actions)
        level = beta_levels(len(actions)).to(actions.device)
        noisy = interpolate(actions, noise, level)
        predicted = self.wam.action_dit(noisy, state, level, guidance, embodiment).velocity
        error = (predicted - velocity(actions, noise)).float().square()
        return (error * mask).sum() / (denominator * draws)

    def alignment_loss(
        self, batch: Batch, hidden: Mapping[int, Float[Tensor, "B T H W D"]], denominator: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Compute the alignment loss (Eq. 6) and the cosine's gain over the mean target, over the samples with targets.

        Both are scaled by the number of these samples over `denominator`.
        """
        pairs, scale = self.aligned_pairs(batch, hidden), batch.num_targets / denominator
        loss = torch.stack([alignment_loss(projected, targets) for projected, targets in pairs]).mean()
        gain = torch.stack([cosine_gain(projected, targets) for projected, targets in pairs]).mean().detach()
        return loss * scale, gain * scale

    def aligned_pairs(
        self, batch: Batch, hidden: Mapping[int, Float[Tensor, "B T H W D"]]
    ) -> list[tuple[list[Float[Tensor, "R F H W P"]], Float[Tensor, "R F H W P"]]]:
        """Pair projected hidden states (Eq. 5) with their targets (Eqs. 3, 4), of the R samples with targets.

        There is one pair for all aligned layers, or one for each layer where each is aligned with a depth of its own.
        In a batch without targets the first sample stands in, so that all processes run the same operations.
        """
        assert self.projectors is not None
        assert self.config.alignment is not None
        if batch.targets is None:
            raise ValueError("alignment: the batch holds no teacher targets; prepare them with `agra prepare`")
        config = self.config.alignment
        frames = slice(0 if config.include_observation else 1, None if config.include_future else 1)
        rows: Any = slice(None)
        if batch.target_rows is not None:
            rows = batch.target_rows if len(batch.target_rows) else slice(1)
        states = {layer: hidden[layer][rows, frames] for layer in config.layers}
        targets = batch.targets[rows, frames]
        if config.teacher.token == "class":  # the mean of a frame's tokens against the frame's one target
            states = {layer: state.mean(dim=(2, 3), keepdim=True) for layer, state in states.items()}
            targets = targets[:, :, :1, :1]
        if config.spatial_normalization:
            targets = spatially_normalized(targets)
        projected = self.projectors.project(states)
        if not config.teacher.depths:
            return [(projected, targets)]
        return [([z], y) for z, y in zip(projected, targets.chunk(len(projected), dim=-1), strict=True)]

    def counts(self, batch: Batch) -> dict[str, float]:
        """Count the actions to learn and the samples with targets."""
        return super().counts(batch) | {"targets": float(batch.num_targets)}

    def denominators(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss denominators of a whole step, on its device. Every one is at least 1."""
        targets = torch.full((), max(1, batch.num_targets), device=batch.state.device)
        return {"actions": batch.action_mask.sum().clamp(min=1), "targets": targets}

    def _noise_levels(self, count: int) -> Float[Tensor, "count"]:
        if self.config.objective.noise_levels is NoiseLevels.UNIFORM:
            return uniform_levels(count)
        return logit_normal_levels(count, shift=self.config.objective.noise_shift)

    # --- the model's parts --------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """Return the video DiT, the bridge where it has weights, the action DiT, and the projectors where the stage
        aligns.
        """
        wam = self.wam
        bridge: dict[str, nn.Module] = {"bridge": wam.bridge} if self.config.model.bridge.has_weights else {}
        parts = {"video_dit": wam.video_dit, **bridge, "action_dit": wam.action_dit}
        return parts if self.projectors is None else {**parts, "projectors": self.projectors}

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks of all three networks."""
        wam = self.wam
        return [*wam.video_dit.transformer.transformer_blocks, *wam.bridge.blocks, *wam.action_dit.blocks]

    def always_frozen(self) -> list[nn.Module]:
        """Return Cosmos's text projection, so that projected instruction tokens can be cached."""
        projects = self.config.model.video_dit.text_projection_dim is not None
        return [self.wam.video_dit.transformer.crossattn_proj] if projects else []

    def text_projection(self) -> nn.Module | None:
        """Return Cosmos's text projection, where the tokens are projected."""
        return None if self.config.text_projection is None else self.wam.video_dit.transformer.crossattn_proj

    def shared_parts(self, parts: Mapping[str, nn.Module], earlier: WAMMethodConfig) -> dict[str, nn.Module]:
        """Select all networks, and the projectors of layers that both configs align with the same teacher and shape."""
        shared = {name: module for name, module in parts.items() if name != "projectors"}
        alignment = self.config.alignment
        if "projectors" not in parts or alignment is None or earlier.alignment is None:
            return shared
        kinds = [(a.teacher, a.projector, a.spatial_normalization) for a in (earlier.alignment, alignment)]
        if kinds[0] == kinds[1]:
            assert self.projectors is not None
            for layer in sorted(set(earlier.alignment.layers) & set(alignment.layers)):
                shared[f"projectors.{layer}"] = self.projectors[str(layer)]
        return shared

    def load_public(self, source: str | Path) -> None:
        """Load the video DiT of Cosmos-Predict2.5 from a folder or a hub id, OWNER/NAME or OWNER/NAME@REVISION.

        Raises FileNotFoundError with the remedy, and ValueError for a revision that does not match the config.
        """
        local, model = Path(source).is_dir(), self.config.model
        name, _, revision = (str(source), "", "") if local else str(source).partition("@")
        revision = revision or model.codec.revision or ""
        level, pre = model.condition_noise_level, revision.endswith("pre-trained")
        if not local and (pre or revision.endswith("post-trained")) and pre != (level is None):
            raise ValueError(
                f"{name}: revision {revision} needs method.model.condition_noise_level {None if pre else 1e-4}, got "
                f"{level}; use --with cosmos_pre_trained for the pre-trained revision"
            )
        self.wam.video_dit.load_pretrained(name, revision=revision or None)

    # --- acting -------------------------------------------------------------------------------------------------------

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the video's and the actions' noise."""
        head = self.config.model.action_dit
        return {"video": self.config.model.latent_shape, "action": (head.horizon, head.action_dim)}

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Run the conditioning pass once, then `steps` Euler steps of the action head under its guidance (A.2)."""
        guidance = self.wam.guide(self.hidden(inputs, noise))
        return self.wam.act(
            guidance, inputs.state, inputs.embodiment, noise["action"], steps=steps or 4, continuation=continuation
        )

    def actor(self, **options: Any) -> Actor:
        """Prepare the fast path, or with `fast=False` the forward passes of training.

        Options: `action_steps`, `compiled`, and the approximation `pool_future` (`agra.wam.fast`).
        """
        # Imported here: training needs neither of the actors.
        from agra.methods.wam_actor import make_actor

        return make_actor(self, **options)

    def imagine(self, inputs: PolicyInputs, noise: Noise, *, steps: int) -> Float[Tensor, "B C T h w"]:
        """Predict the video as latents (Eqs. 8, 9)."""
        assert inputs.latents is not None
        assert inputs.instruction is not None
        return self.wam.imagine(inputs.latents, noise["video"], inputs.instruction, steps=steps)

    # --- instruments --------------------------------------------------------------------------------------------------

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The bridged video layers."""
        return self.wam.bridged_layers

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(T, H, W) of the hidden states."""
        return self.config.model.token_grid

    def hidden(
        self, inputs: PolicyInputs, noise: Noise, *, layers: Sequence[int] = ()
    ) -> dict[int, Float[Tensor, "B T H W D"]]:
        """Compute the hidden states of the conditioning pass."""
        assert inputs.latents is not None
        assert inputs.instruction is not None
        return self.wam.condition(inputs.latents, noise["video"], inputs.instruction, layers=layers)

    def act_on(
        self,
        hidden: Mapping[int, Float[Tensor, "B T H W D"]],
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Run the bridge and the action head on `hidden`."""
        guidance = self.wam.guide(hidden)
        return self.wam.act(guidance, inputs.state, inputs.embodiment, noise["action"], steps=steps or 4)

    def visit_attention(
        self,
        hidden: Mapping[int, Float[Tensor, "B T H W D"]],
        inputs: PolicyInputs,
        noise: Noise,
        visit: Callable[[Sequence[Float[Tensor, "B heads Q N"]]], None],
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Act as `act_on`, and call `visit` with every Euler step's cross-attention."""
        guidance, head = self.wam.guide(hidden), self.wam.action_dit

        def predict(actions: Tensor, level: Tensor) -> Tensor:
            output = head(actions, inputs.state, level, guidance, inputs.embodiment, return_attention=True)
            assert output.attention is not None
            visit(output.attention)
            return output.velocity

        return euler(predict, noise["action"], steps or 4)

    def text_attention(
        self, inputs: PolicyInputs, noise: Noise, *, layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "B T H W L"]]:
        """Return the attention of each video token to each instruction token in the conditioning pass (Fig. 14)."""
        assert inputs.latents is not None
        assert inputs.instruction is not None
        return self.wam.text_attention(inputs.latents, noise["video"], inputs.instruction, layers=layers)
