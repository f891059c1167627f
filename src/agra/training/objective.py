"""The centre: which video pass feeds what, and the three losses.                                Eqs. 7, 18; A.3; Table 2"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agra.alignment.loss import AlignmentConfig, Projectors, alignment_loss, cosine_gain
from agra.batch import Batch
from agra.draws import noise_like
from agra.flow import beta_levels, interpolate, logit_normal_levels, uniform_levels, velocity
from agra.wam.model import WAM


class Pass(StrEnum):
    """The two forwards of the video DiT in a training step."""

    DENOISING = "denoising"  # at the sampled noise level, as the video loss needs it
    CONDITIONING = "conditioning"  # at noise level 1, as the action head meets it at inference


class NoiseLevels(StrEnum):
    """How the denoising pass's noise level is drawn (docs/paper.md #12)."""

    LOGIT_NORMAL = "logit_normal"
    UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the losses and the two passes' roles; the defaults are AGRA-ActionCondPass's, C.3.

    guidance / aligned pass: conditioning / conditioning is AGRA, conditioning / denoising is AGRA-VideoPass,
    denoising / denoising is AGRA-SharedDenoisingPass.
    """

    guidance_pass: Pass = Pass.CONDITIONING
    aligned_pass: Pass = Pass.CONDITIONING
    video_weight: float = 1.0
    action_weight: float = 1.0
    alignment_weight: float = 0.01
    noise_levels: NoiseLevels = NoiseLevels.LOGIT_NORMAL
    noise_shift: float = 5.0
    action_draws: int = 1
    """Action noise draws for each guidance. Not in the paper; cheap, since the head is small beside the video DiT."""
    video_share: float = 1.0
    """Share of the batch that takes the denoising pass. Not in the paper; saves time on small machines."""

    def __post_init__(self) -> None:
        for name in ("video_weight", "action_weight", "alignment_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"ObjectiveConfig.{name}: expected at least 0, got {getattr(self, name)}")
        if self.guidance_pass is Pass.DENOISING and self.aligned_pass is Pass.CONDITIONING:
            raise ValueError("ObjectiveConfig: with guidance_pass=denoising there is no conditioning pass to align")
        if self.action_draws < 1:
            raise ValueError(f"ObjectiveConfig.action_draws: expected at least 1, got {self.action_draws}")
        if not 0 < self.video_share <= 1:
            raise ValueError(f"ObjectiveConfig.video_share: expected a share in (0, 1], got {self.video_share}")
        if self.video_share < 1 and Pass.DENOISING in (self.guidance_pass, self.aligned_pass):
            raise ValueError(
                "ObjectiveConfig.video_share: must be 1 where guidance or alignment reads the denoising pass"
            )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What one step is made of; None where the stage does not compute it."""

    total: Float[Tensor, ""]
    video: Float[Tensor, ""] | None = None
    action: Float[Tensor, ""] | None = None
    alignment: Float[Tensor, ""] | None = None
    alignment_cosine_gain: Float[Tensor, ""] | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a step's masked losses are divided by where the step is spread over parts: the means over all parts, so that
    the mean of the parts' losses is the whole step's."""

    actions: Float[Tensor, ""]  # of action_mask.sum()
    targets: Float[Tensor, ""]  # of the number of samples that have targets


class Objective(nn.Module):
    """A WAM with the projectors of its alignment: one root, whose forward is one training step's loss."""

    def __init__(
        self, wam: WAM, config: ObjectiveConfig, alignment: AlignmentConfig | None, teacher_width: int | None
    ) -> None:
        super().__init__()
        self.config = config
        self.wam = wam
        self.aligned_layers = () if alignment is None else alignment.layers
        self.teacher_depths = () if alignment is None else alignment.teacher.depths
        self.first_aligned_frame = 0 if alignment is None or alignment.include_observation else 1
        self.projectors: Projectors | None = None
        if alignment is not None:
            num_layers = wam.config.video_dit.num_layers
            if any(not 0 <= layer < num_layers for layer in alignment.layers):
                raise ValueError(f"alignment.layers: expected 0..{num_layers - 1}, got {alignment.layers}")
            if teacher_width is None:
                raise ValueError("Objective: alignment needs the teacher's width")
            self.projectors = Projectors(wam.config.video_dit.width, teacher_width, alignment)

    def forward(self, batch: Batch, kept: Kept | None = None) -> Losses:
        """All losses whose weight is above zero, and only the passes that they need; `kept` where `batch` is a part."""
        config = self.config
        acts = config.action_weight > 0
        aligns = self.projectors is not None and config.alignment_weight > 0
        guides_from = config.guidance_pass if acts else None
        aligns_in = config.aligned_pass if aligns else None

        action_loss = align_loss = gain = None
        video_loss, hidden = self._video_passes(batch, guides_from, aligns_in)
        if guides_from is not None:
            action_loss = self.action_loss(batch, hidden[guides_from], kept)
        if aligns_in is not None:
            align_loss, gain = self._alignment(batch, hidden[aligns_in], kept)

        weighted = (
            (config.video_weight, video_loss),
            (config.action_weight, action_loss),
            (config.alignment_weight, align_loss),
        )
        total = sum(
            (weight * loss for weight, loss in weighted if loss is not None and weight > 0),
            start=torch.zeros((), device=batch.latents.device),
        )
        return Losses(
            total=total, video=video_loss, action=action_loss, alignment=align_loss, alignment_cosine_gain=gain
        )

    def _layers(self, which: Pass, guides_from: Pass | None, aligns_in: Pass | None) -> tuple[int, ...]:
        wanted = set(self.wam.bridged_layers if guides_from is which else ())
        return tuple(sorted(wanted | set(self.aligned_layers if aligns_in is which else ())))

    def _video_passes(
        self, batch: Batch, guides_from: Pass | None, aligns_in: Pass | None
    ) -> tuple[Float[Tensor, ""] | None, dict[Pass, dict[int, Tensor]]]:
        """L_vid over the future latent frames, whose velocity is not known beforehand, and what each pass's layers hold.

        Eqs. 8-9, 16; docs/paper.md #13
        """
        latents, text = batch.latents, batch.instruction
        conditions = Pass.CONDITIONING in (guides_from, aligns_in)
        aligned = self._layers(Pass.CONDITIONING, None, aligns_in)
        if self.config.video_weight == 0 and Pass.DENOISING not in (guides_from, aligns_in):
            if not conditions:
                return None, {}
            hidden = self.wam.condition(latents[:, :, :1], noise_like(latents), text, layers=aligned)
            return None, {Pass.CONDITIONING: hidden}

        count = max(1, round(self.config.video_share * len(batch)))
        if self.config.noise_levels is NoiseLevels.UNIFORM:
            level = uniform_levels(count)
        else:
            level = logit_normal_levels(count, shift=self.config.noise_shift)
        level, noise = level.to(latents.device), noise_like(latents[:count])
        layers, found = self._layers(Pass.DENOISING, guides_from, aligns_in), {}
        if conditions:
            output, found[Pass.CONDITIONING] = self.wam.denoise_and_condition(
                latents, noise, level, noise_like(latents), text, layers=layers, condition_layers=aligned
            )
        else:
            output = self.wam.denoise(latents[:count], noise, level, text[:count], layers=layers)
        found[Pass.DENOISING] = output.hidden
        assert output.velocity is not None
        error = (output.velocity - velocity(latents[:count], noise))[:, :, 1:]
        return error.float().square().mean(), found

    def action_loss(self, batch: Batch, hidden: dict[int, Tensor], kept: Kept | None = None) -> Float[Tensor, ""]:
        """L_act, averaged over the actions that the mask keeps.                                           Eqs. 11, 13"""
        draws = self.config.action_draws
        guidance = self.wam.guide(hidden)  # shared by the draws
        actions, mask, state, embodiment = (
            x.repeat_interleave(draws, dim=0) for x in (batch.actions, batch.action_mask, batch.state, batch.embodiment)
        )
        noise = noise_like(actions)
        level = beta_levels(len(actions)).to(actions.device)
        noisy = interpolate(actions, noise, level)
        predicted = self.wam.action_dit(noisy, state, level, guidance, embodiment).velocity
        error = (predicted - velocity(actions, noise)).float().square()
        return (error * mask).sum() / (mask.sum() if kept is None else kept.actions * draws)

    def _alignment(self, batch: Batch, hidden: dict[int, Tensor], kept: Kept | None) -> tuple[Tensor, Tensor | None]:
        """L_AGRA on the aligned pass, over the samples that have targets, and how much better than a constant it is.

        0 and None where none of them has.                                                                    Eqs. 5-6
        """
        if batch.targets is None:
            raise ValueError("alignment: the batch holds no teacher targets; prepare them with `agra prepare`")
        assert self.projectors is not None
        first, rows, share = self.first_aligned_frame, batch.has_targets, None
        if rows is None:
            rows = slice(None)
            share = None if kept is None else len(batch) / kept.targets
        else:
            count = rows.sum()
            if count == 0 and kept is None:
                return batch.targets.new_zeros(()), None
            if count == 0:
                rows = slice(1)  # weighs nothing; all processes take the same way
            share = None if kept is None else count / kept.targets
        projected = self.projectors.project({layer: hidden[layer][rows, first:] for layer in self.aligned_layers})
        targets = batch.targets[rows, first:]
        pairs = [(projected, targets)]
        if self.teacher_depths:  # each layer has a target of its own
            pairs = [([z], y) for z, y in zip(projected, targets.chunk(len(projected), dim=-1), strict=True)]
        loss = torch.stack([alignment_loss(z, y) for z, y in pairs]).mean()
        if share is not None:
            loss = loss * share
        with torch.no_grad():
            return loss, torch.stack([cosine_gain(z, y) for z, y in pairs]).mean()
