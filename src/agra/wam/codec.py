"""The frozen video codec: frames <-> normalised latents.                                     C.1; Wan 2.1

Both codecs are causal with a time stride of 4 and a space stride of 8: latent frame 0 covers frame 0 alone, latent
frame t >= 1 covers frames 4t-3..4t, so 1 + 4k frames become 1 + k latent frames and the latent of an observation needs
no future. Frames are uint8 RGB (..., T, H, W, 3) outside, video is float (B, 3, T, H, W) in [-1, 1] inside.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agra.pretrained import frozen, loading, weights_digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_PATCH = 8
_STRIDE = 4
_FILE_FORMAT = "agra.patch_pca.1"
_ROUNDING_VARIANCE = (2 / 255) ** 2 / 12
"""Variance that rounding to 8 bits adds to a pixel in [-1, 1]."""


class Codec(Protocol):
    """What turns video into latents and back; `key` identifies settings and weights, for caches."""

    channels: int
    time_stride: int
    space_stride: int

    @property
    def key(self) -> dict[str, Any]:
        """JSON-serialisable identity; equal keys give equal latents."""
        ...

    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T h w"]:
        """Normalised latents of video in [-1, 1]."""
        ...

    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Video in [-1, 1] of normalised latents."""
        ...


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Which codec; the defaults are the paper's."""

    kind: Literal["wan", "patch_pca"] = "wan"
    source: str = "nvidia/Cosmos-Predict2.5-2B"
    """Hub id or local folder with a subfolder `vae` (kind wan)."""
    revision: str | None = "diffusers/base/post-trained"
    channels: int = 16
    """Latent channels: 16 for Wan 2.1; a fitted patch PCA has as many as it was fitted with."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which Wan runs; latents are float32 either way."""

    def __post_init__(self) -> None:
        if self.kind not in ("wan", "patch_pca"):
            raise ValueError(f'CodecConfig.kind: expected "wan" or "patch_pca", got {self.kind!r}')
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'CodecConfig.dtype: expected "float32" or "bfloat16", got {self.dtype!r}')
        if not 1 <= self.channels <= 3 * _PATCH**2:
            raise ValueError(f"CodecConfig.channels: expected 1 to {3 * _PATCH**2}, got {self.channels}")


def load_codec(config: CodecConfig, path: Path | str | None = None) -> "PatchPCACodec | WanCodec":
    """The codec that `config` names, frozen; `path` is the fitted file of a patch PCA and belongs to that kind alone.

    Raises FileNotFoundError with the remedy where weights are missing or gated, ValueError where they don't fit.
    """
    if config.kind == "wan":
        if path is not None:
            raise ValueError(f"the Wan codec is loaded from CodecConfig.source, not from a file: got {path}")
        codec = WanCodec.from_pretrained(config.source, revision=config.revision, dtype=getattr(torch, config.dtype))
    elif path is None:
        raise ValueError("the patch_pca codec is fitted on training frames: give the path of its fitted file")
    else:
        codec = PatchPCACodec.load(path)
    if codec.channels != config.channels:
        raise ValueError(f"CodecConfig.channels is {config.channels}, but the loaded codec has {codec.channels}")
    return codec


def to_video(frames: np.ndarray | Tensor, size: tuple[int, int]) -> Float[Tensor, "B 3 T h w"]:
    """Frames uint8 (..., T, H, W, 3) as video in [-1, 1] of `size` (h, w), leading axes flattened to B.

    Bilinear and antialiased where the size changes, exact where it doesn't.
    """
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim < 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected frames (..., T, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
    *_, num_frames, height, width, _ = frames.shape
    images = frames.reshape(-1, height, width, 3).movedim(-1, 1).float()
    if (height, width) != tuple(size):
        images = F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return (images / 127.5 - 1).unflatten(0, (-1, num_frames)).transpose(1, 2).contiguous()


def to_frames(video: Float[Tensor, "B 3 T H W"]) -> np.ndarray:
    """Video in [-1, 1] as uint8 frames (B, T, H, W, 3): the inverse of `to_video` at equal size."""
    frames = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def _check_video(video: Tensor, space_stride: int) -> None:
    """Raise ValueError unless the video has 1 + 4k frames of a size that the strides divide."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(f"expected float video (B, 3, T, H, W), got {tuple(video.shape)} {video.dtype}")
    num_frames, height, width = video.shape[2:]
    if num_frames % _STRIDE != 1:
        below = max(num_frames - 1, 0) // _STRIDE * _STRIDE + 1
        raise ValueError(f"{num_frames} frames don't fit a causal codec of stride 4: use {below} or {below + _STRIDE}")
    if height % space_stride or width % space_stride or not height or not width:
        raise ValueError(f"frames of {height}x{width} don't fit: both sides must be multiples of {space_stride}")


def _check_latents(latents: Tensor, channels: int) -> None:
    """Raise ValueError unless the latents are (B, channels, T, h, w)."""
    if latents.ndim != 5 or latents.shape[1] != channels:
        raise ValueError(f"expected latents (B, {channels}, T, h, w), got {tuple(latents.shape)}")


class _Moments:
    """Mean and covariance of rows that arrive in pieces, by the pairwise update of Chan, Golub and LeVeque (1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.scatter: Tensor | float = 0.0

    def add(self, rows: Float[Tensor, "N D"]) -> None:
        """Take in N more rows; products in the rows' own precision, sums in float64."""
        mean = rows.mean(0)
        centred = rows - mean
        scatter, delta = (centred.T @ centred).double(), mean.double() - self.mean
        total = self.count + len(rows)
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * len(rows) / total)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def principal(self, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (D,), the leading directions (D, channels) and their standard deviations (channels,), float32."""
        assert isinstance(self.scatter, Tensor) and isinstance(self.mean, Tensor)
        values, vectors = torch.linalg.eigh(self.scatter.cpu() / self.count)
        basis = vectors.flip(1)[:, :channels]
        # An eigenvector's sign is arbitrary: make its largest entry positive.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        # A direction weaker than the rounding noise carries no picture: don't blow it up to unit variance.
        deviation = values.flip(0)[:channels].clamp_min(_ROUNDING_VARIANCE).sqrt()
        return self.mean.cpu().float(), basis.float(), deviation.float()


class PatchPCACodec(nn.Module):
    """Closed-form codec: principal components of 8x8 patches, whitened channel by channel.

    The first frame's patches have 192 values, those of every following group of four frames 768; each kind has its
    own mean and its own `channels` components, divided by their standard deviations over the training frames.
    """

    time_stride = _STRIDE
    space_stride = _PATCH

    def __init__(self, channels: int) -> None:
        super().__init__()
        first = 3 * _PATCH**2
        if not 1 <= channels <= first:
            raise ValueError(f"a patch has {first} values: expected 1 to {first} channels, got {channels}")
        self.channels = channels
        for name, length in (("first", first), ("group", _STRIDE * first)):
            self.register_buffer(f"{name}_mean", torch.zeros(length))
            self.register_buffer(f"{name}_basis", torch.zeros(length, channels))
            self.register_buffer(f"{name}_scale", torch.ones(channels))

    @classmethod
    @torch.no_grad()
    def fit(cls, videos: Iterable[Float[Tensor, "B 3 F H W"]], *, channels: int = 24) -> Self:
        """Fit to training video in [-1, 1], given piece by piece (sizes may differ) and read once.

        Any frame may start a window, so the frames 0, 4, 8.. all count as first frames.
        Raises ValueError where there is no video or a piece doesn't fit the strides.
        """
        codec, first, group = cls(channels), _Moments(), _Moments()
        for video in videos:
            _check_video(video, _PATCH)
            first.add(_patches(video[:, :, ::_STRIDE], 1).flatten(0, -2))
            if video.shape[2] > 1:
                group.add(_patches(video[:, :, 1:], _STRIDE).flatten(0, -2))
        if not group.count:
            raise ValueError("the patch PCA needs at least one piece of 5 frames or more to be fitted")
        for name, moments in (("first", first), ("group", group)):
            for field, value in zip(("mean", "basis", "scale"), moments.principal(channels), strict=True):
                codec.get_buffer(f"{name}_{field}").copy_(value)
        return codec

    @cached_property
    def key(self) -> dict[str, Any]:
        """Kind, channels and a hash of the fitted components."""
        return {"kind": "patch_pca", "channels": self.channels, "weights": weights_digest(self)}

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T h w"]:
        """Whitened components, one vector for each 8x8 patch of frame 0 and of every following group of four."""
        _check_video(video, _PATCH)
        latents = [self._project("first", _patches(video[:, :, :1], 1))]
        if video.shape[2] > 1:
            latents.append(self._project("group", _patches(video[:, :, 1:], _STRIDE)))
        return torch.cat(latents, dim=1).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """The nearest video in [-1, 1] that the components can express."""
        _check_latents(latents, self.channels)
        rows = latents.movedim(1, -1)
        video = [_unpatch(self._expand("first", rows[:, :1]), 1)]
        if latents.shape[2] > 1:
            video.append(_unpatch(self._expand("group", rows[:, 1:]), _STRIDE))
        return torch.cat(video, dim=2).clamp(-1, 1)

    def _project(self, name: str, rows: Tensor) -> Tensor:
        mean, basis, scale = (self.get_buffer(f"{name}_{field}") for field in ("mean", "basis", "scale"))
        return (rows - mean) @ basis / scale

    def _expand(self, name: str, rows: Tensor) -> Tensor:
        mean, basis, scale = (self.get_buffer(f"{name}_{field}") for field in ("mean", "basis", "scale"))
        return (rows * scale) @ basis.T + mean

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, partial, metadata={"format": _FILE_FORMAT})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for any other file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no fitted patch PCA codec at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FILE_FORMAT:
                    raise ValueError(f"{path}: not a fitted patch PCA codec ({_FILE_FORMAT})")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            codec = cls(len(tensors["first_scale"]))
            codec.load_state_dict(tensors)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged patch PCA codec ({str(error).splitlines()[0]})") from error
        return codec


def _patches(video: Float[Tensor, "B 3 F H W"], depth: int) -> Float[Tensor, "B T h w D"]:
    """Cut video into patches of `depth` frames and 8x8 pixels, each a row ordered (channel, frame, y, x)."""
    batch, _, num_frames, height, width = video.shape
    split = video.float().reshape(
        batch, 3, num_frames // depth, depth, height // _PATCH, _PATCH, width // _PATCH, _PATCH
    )
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _unpatch(rows: Float[Tensor, "B T h w D"], depth: int) -> Float[Tensor, "B 3 F H W"]:
    """The inverse of `_patches`."""
    split = rows.unflatten(-1, (3, depth, _PATCH, _PATCH)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return split.flatten(6).flatten(4, 5).flatten(2, 3)


class WanCodec(nn.Module):
    """Wan 2.1's causal VAE through diffusers, in the normalisation that Cosmos-Predict2.5 was trained in.

    Latents are (mode - mean) / std of the posterior, never a sample. Mean and std are read from the VAE's own config:
    diffusers pipelines have changed their meaning between releases.
    """

    def __init__(self, vae: "AutoencoderKLWan") -> None:
        super().__init__()
        config: Any = vae.config
        if config.scale_factor_temporal != _STRIDE:
            raise ValueError(f"expected a VAE of time stride {_STRIDE}, got {config.scale_factor_temporal}")
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ValueError(f"the VAE's config needs a mean and a std for each of its {config.z_dim} latent channels")
        self.vae = frozen(vae)
        self.channels: int = config.z_dim
        self.time_stride = _STRIDE
        self.space_stride: int = config.scale_factor_spatial
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config, f"latents_{name}"), dtype=torch.float32)
            self.register_buffer(name, values.view(1, -1, 1, 1, 1))

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        revision: str | None = None,
        subfolder: str = "vae",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load from a hub id or a local folder. Raises FileNotFoundError with the remedy if it cannot be had."""
        # Here and not above: the import takes seconds, and the patch PCA doesn't need it.
        from diffusers import AutoencoderKLWan

        local = Path(source).is_dir()
        with loading("Wan video codec", source=source, revision=revision, subfolder=subfolder):
            vae = AutoencoderKLWan.from_pretrained(
                source, subfolder=subfolder, revision=None if local else revision, torch_dtype=dtype
            )
        return cls(vae)

    @cached_property
    def key(self) -> dict[str, Any]:
        """Kind, channels and a hash of the weights, mean and std."""
        return {"kind": "wan", "channels": self.channels, "weights": weights_digest(self)}

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T h w"]:
        """(mode - mean) / std, float32."""
        _check_video(video, self.space_stride)
        mode = self.vae.encode(video.to(self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.get_buffer("mean")) / self.get_buffer("std")

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Video in [-1, 1], float32."""
        _check_latents(latents, self.channels)
        raw = latents.float() * self.get_buffer("std") + self.get_buffer("mean")
        return self.vae.decode(raw.to(self.vae.dtype)).sample.float().clamp(-1, 1)
