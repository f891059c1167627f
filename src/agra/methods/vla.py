"""A vision-language-action model of GR00T-N1.6's shape: an action head over frozen vision and text tokens.

The head is GR00T-N1.6's: sub-blocks alternate cross-attention and self-attention over [state | actions]. Every second
cross-attention reads the instruction alone, the others read the observed frame alone. There is no video and no
self-attention over the tokens. In GR00T-N1.6 one vision-language model computes all tokens and is tuned in part. Here
two frozen encoders compute them, each followed by a linear layer. docs/methods.md names what else differs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from agra.alignment.teacher import TeacherConfig, teacher_shape
from agra.batch import Batch, PolicyInputs
from agra.flow import beta_levels, continue_chunk, euler, interpolate, velocity
from agra.hub import model_folder
from agra.methods.method import Continuation, LossDenominators, Losses, Method, MethodConfig, Needs, Noise, Shapes
from agra.rng import noise_like
from agra.wam.action_dit import ActionDiT, ActionDiTConfig
from agra.wam.groot import load_groot_head
from agra.wam.text import TextConfig

PATCHES = 0
"""Number of the only token grid: the observed frame's patches."""
STEPS = 4
"""Euler steps of an answer."""


def published_head() -> ActionDiTConfig:
    """GR00T-N1.6's head for one embodiment: 32 sub-blocks of 32 x 48, states and actions padded to 128."""
    return ActionDiTConfig(num_blocks=16, state_dim=128, action_dim=128)


# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VLAConfig(MethodConfig):
    """Frozen encoders and the head. The head's defaults are GR00T-N1.6's."""

    kind: Literal["vla"] = "vla"
    vision_encoder: TeacherConfig = field(
        default_factory=lambda: TeacherConfig(
            kind="siglip", source="google/siglip-so400m-patch14-224", input_size=(224, 224)
        )
    )
    feature_grid: tuple[int, int] = (16, 16)
    """(H, W) of the vision tokens. The encoder's patch features are interpolated to it."""
    text_encoder: TextConfig = field(default_factory=lambda: TextConfig(kind="minilm", length=32))
    text_dim: int = 384
    action_dit: ActionDiTConfig = field(default_factory=published_head)
    action_draws: int = 1
    """Noise draws of the loss for each sample. They share the tokens. GR00T-N1.6 has one."""

    def __post_init__(self) -> None:
        head = self.action_dit
        if head.self_attention_first or head.time_grows_with_noise or head.future_tokens:
            raise ValueError(
                "method.action_dit: GR00T-N1.6's head has cross-attention first, time that grows with the data, and no"
                " future tokens"
            )
        if head.num_blocks < 2:
            raise ValueError(
                f"method.action_dit.num_blocks: expected at least 2, of which one reads text and one the frame, got"
                f" {head.num_blocks}"
            )
        if self.vision_encoder.depths:
            raise ValueError(
                "method.vision_encoder.depths: expected none; a VLA reads one block, method.vision_encoder.layer"
            )
        if self.action_draws < 1:
            raise ValueError(f"method.action_draws: expected at least 1, got {self.action_draws}")

    @property
    def shapes(self) -> Shapes:
        """Sizes of the head and of the tokens."""
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

    def needs(self) -> Needs:
        """The observed frame's features, and the instruction."""
        return Needs(features=(0,))

    def needs_to_act(self) -> Needs:
        """Content of an observation, equal to `needs`."""
        return self.needs()

    @property
    def text(self) -> TextConfig:
        """The text encoder."""
        return self.text_encoder

    @property
    def teacher(self) -> TeacherConfig:
        """The vision encoder."""
        return self.vision_encoder

    @property
    def part_names(self) -> tuple[str, ...]:
        """The projected tokens and the head."""
        return "context", "action_dit"

    def build(self) -> "VLA":
        """The head with fresh weights."""
        return VLA(self)

    def describe(self) -> str:
        """The encoders, and the number of sub-blocks."""
        return (
            f"VLA of GR00T-N1.6's shape: {2 * self.action_dit.num_blocks} sub-blocks on frozen"
            f" {self.vision_encoder.kind.replace('_', ' ')} patches and {self.text_encoder.kind} tokens"
        )


# --- the method -------------------------------------------------------------------------------------------------------


class TokenContext(nn.Module):
    """Frozen tokens to contexts of the head: a linear layer for each encoder, then one LayerNorm for both."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        width = config.action_dit.guidance_dim
        self.vision = nn.Linear(teacher_shape(config.vision_encoder).width, width)
        self.text = nn.Linear(config.text_dim, width)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, patches: Float[Tensor, "B 1 H W P"], instruction: Float[Tensor, "B L E"]
    ) -> tuple[Float[Tensor, "B N G"], Float[Tensor, "B L G"]]:
        """Project both. Patches are flattened row-major."""
        return self.norm(self.vision(patches.flatten(1, 3))), self.norm(self.text(instruction))


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Context of each cross-attention block."""

    tokens: tuple[Float[Tensor, "B N G"], ...]
    masks: tuple[Bool[Tensor, "B N"] | None, ...]
    """False at the instruction's padding. None reads all tokens."""


class VLA(Method):
    """The action head over two kinds of tokens, trained on the error of the velocity alone."""

    config: VLAConfig

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        self.config = config
        self.context = TokenContext(config)
        self.action_dit = ActionDiT(config.action_dit)

    def parts(self) -> dict[str, nn.Module]:
        """The projected tokens and the head."""
        return {"context": self.context, "action_dit": self.action_dit}

    def blocks(self) -> list[nn.Module]:
        """The head's sub-blocks."""
        return list(self.action_dit.blocks)

    def contexts(self, patches: Float[Tensor, "B 1 H W P"], instruction: Float[Tensor, "B L E"]) -> Contexts:
        """Choose the tokens of each cross-attention block.

        Sub-blocks with a number divisible by 4 read the instruction. The other even ones read the frame.
        """
        image, text = self.context(patches, instruction)
        padding = instruction.any(dim=-1)
        reads_text = [index % 4 == 0 for index in range(0, 2 * self.config.action_dit.num_blocks, 2)]
        return Contexts(
            tokens=tuple(text if reads else image for reads in reads_text),
            masks=tuple(padding if reads else None for reads in reads_text),
        )

    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """The squared error of the velocity, averaged over the actions that the mask keeps and over the draws."""
        assert batch.features is not None
        assert batch.instruction is not None
        draws, contexts = self.config.action_draws, self.contexts(batch.features, batch.instruction)
        actions, mask, state, embodiment = (
            x.repeat_interleave(draws, dim=0) for x in (batch.actions, batch.action_mask, batch.state, batch.embodiment)
        )
        noise = noise_like(actions)
        level = noise_levels(len(actions)).to(actions.device)
        noisy = interpolate(actions, noise, level)
        predicted = self.action_dit(noisy, state, level, contexts.tokens, embodiment, masks=contexts.masks).velocity
        error = (predicted - velocity(actions, noise)).float().square() * mask
        count = batch.action_mask.sum().clamp(min=1) if denominators is None else denominators["actions"]
        loss = error.sum() / (count * draws)
        return Losses(total=loss, terms={"action": loss})

    def load_public(self, source: str | Path) -> None:
        """Start from GR00T-N1.6's action head: a folder or a hub id, OWNER/NAME or OWNER/NAME@REVISION.

        Every embodiment starts from that of GR1 there. Raises the errors of `load_groot_n16`.
        """
        name, _, revision = (str(source), "", "") if Path(source).is_dir() else str(source).partition("@")
        load_groot_n16(self, name, revision=revision or None)

    # --- acting -------------------------------------------------------------------------------------------------------

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """The noise that a chunk starts from."""
        return {"action": (self.config.action_dit.horizon, self.config.action_dit.action_dim)}

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Integrate from noise to actions in four Euler steps, or `steps`."""
        predict = self._velocity(self.hidden(inputs, noise), inputs)
        if continuation is not None:
            predict = continue_chunk(predict, *continuation)
        return euler(predict, noise["action"], steps or STEPS)

    def _velocity(
        self,
        hidden: Mapping[int, Tensor],
        inputs: PolicyInputs,
        visit: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity of noisy actions at a level. `visit` gets the attention of the blocks that read the frame."""
        assert inputs.instruction is not None
        contexts = self.contexts(hidden[PATCHES], inputs.instruction)

        def predict(actions: Tensor, level: Tensor) -> Tensor:
            output = self.action_dit(
                actions,
                inputs.state,
                level,
                contexts.tokens,
                inputs.embodiment,
                masks=contexts.masks,
                return_attention=visit is not None,
            )
            if visit is not None:
                assert output.attention is not None
                visit([weights for weights, mask in zip(output.attention, contexts.masks, strict=True) if mask is None])
            return output.velocity

        return predict

    # --- instruments --------------------------------------------------------------------------------------------------

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The patches, once for each block that reads the frame."""
        return (PATCHES,) * (self.config.action_dit.num_blocks // 2)

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(1, H, W) of the patches."""
        return (1, *self.config.feature_grid)

    def hidden(
        self, inputs: PolicyInputs, noise: Noise, *, layers: Sequence[int] = ()
    ) -> dict[int, Float[Tensor, "B 1 H W P"]]:
        """Return the frozen patches, which are the input. Raises ValueError for other numbers in `layers`."""
        if unknown := sorted(set(layers) - {PATCHES}):
            raise ValueError(f"layers: a VLA has one token grid, number {PATCHES}, got {unknown}")
        assert inputs.features is not None
        return {PATCHES: inputs.features}

    def act_on(
        self,
        hidden: Mapping[int, Float[Tensor, "B 1 H W P"]],
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Act on other patches."""
        return euler(self._velocity(hidden, inputs), noise["action"], steps or STEPS)

    def visit_attention(
        self,
        hidden: Mapping[int, Float[Tensor, "B 1 H W P"]],
        inputs: PolicyInputs,
        noise: Noise,
        visit: Callable[[Sequence[Float[Tensor, "B heads Q N"]]], None],
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Act as `act_on`, and call `visit` with the attention to the patches. Attention to text is left out."""
        return euler(self._velocity(hidden, inputs, visit), noise["action"], steps or STEPS)


def noise_levels(count: int) -> Float[Tensor, "count"]:
    """Draw GR00T-N1.6's levels in [0.001, 1]: 1 - tau, where tau = 0.999 (1 - b), b ~ Beta(1.5, 1).

    N1.5's time is (0.999 - b) / 0.999 (`agra.flow.beta_levels`).
    """
    return 1 - 0.999 * (1 - beta_levels(count, scale=1.0))


# --- released weights -------------------------------------------------------------------------------------------------


def load_groot_n16(
    method: VLA, source: str, *, revision: str | None = None, embodiments: Sequence[str] = ("gr1",)
) -> tuple[str, ...]:
    """Copy GR00T-N1.6's action head from a folder or a hub id. The projections of the tokens stay as they are.

    `embodiments` are names in its embodiment_id.json: one for each embodiment here, or one for all. Returns the names
    of its head's tensors without counterpart here. Raises FileNotFoundError if a file is missing, ValueError for an
    unknown embodiment or other shapes.
    """
    path = model_folder("GR00T-N1.6", source=source, revision=revision) / "embodiment_id.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the file that numbers GR00T-N1.6's embodiments")
    rows = json.loads(path.read_text(encoding="utf-8"))
    if unknown := [name for name in embodiments if name not in rows]:
        raise ValueError(f"{path}: no embodiment {unknown[0]!r}; expected some of {', '.join(sorted(rows))}")
    return load_groot_head(
        nn.ModuleDict({"norm": method.context.norm}),
        method.action_dit,
        source,
        revision=revision,
        rows=[rows[name] for name in embodiments],
    )
