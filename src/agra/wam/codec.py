"""The frozen codec, between frames and normalised latents: Wan 2.1 (C.1), a patch PCA, or SDXL's image VAE.

The first two are causal with a time stride of 4 and a space stride of 8. Latent frame 0 covers frame 0 alone, latent
frame t >= 1 covers frames 4t-3..4t. 1 + 4k frames therefore become 1 + k latent frames, and the latent of an
observation needs no future frame. SDXL's encodes every frame alone. Frames are uint8 RGB (..., T, H, W, 3) outside, video is float (B, 3, T, H, W) in
[-1, 1] inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from agra.hub import loading
from agra.wam.patch_pca import MAX_CHANNELS, SPACE_STRIDE, TIME_STRIDE, PatchPCACodec, check_latents, check_video
from agra.weights import frozen, weights_digest

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


class Codec(Protocol):
    """A frozen network that encodes video as latents and decodes it again."""

    channels: int
    time_stride: int
    space_stride: int

    @property
    def key(self) -> dict[str, Any]:
        """JSON-serialisable identity of settings and weights for caches. Equal keys give equal latents."""
        ...

    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T h w"]:
        """Encode video in [-1, 1], on any device, as normalised latents on the codec's device.

        Safe to call from several threads. The latents of a clip do not depend on the other clips of the batch.
        """
        ...

    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Decode normalised latents to video in [-1, 1] on the codec's device. Safe to call from several threads."""
        ...


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Choice of the codec. The defaults are the paper's."""

    kind: Literal["wan", "patch_pca", "sdxl"] = "wan"  # Wan 2.1's VAE, a patch PCA fitted on the data, or SDXL's VAE
    source: str = "nvidia/Cosmos-Predict2.5-2B"
    """Hub id or local folder: with a subfolder `vae` (kind wan), or of the VAE itself (kind sdxl)."""
    revision: str | None = "diffusers/base/post-trained"  # of a hub id
    channels: int = 16
    """Latent channels: 16 for Wan 2.1, 4 for SDXL, and the number of fitted components for a patch PCA."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision in which a VAE runs, bfloat16 as in Cosmos's own pipeline. Latents are always float32."""

    def __post_init__(self) -> None:
        if self.kind not in ("wan", "patch_pca", "sdxl"):
            raise ValueError(f'CodecConfig.kind: expected "wan", "patch_pca" or "sdxl", got {self.kind!r}')
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'CodecConfig.dtype: expected "float32" or "bfloat16", got {self.dtype!r}')
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"CodecConfig.channels: expected 1 to {MAX_CHANNELS}, got {self.channels}")

    @property
    def time_stride(self) -> int:
        """Frames of each latent frame after the first, as `Codec.time_stride`."""
        return 1 if self.kind == "sdxl" else TIME_STRIDE

    @property
    def space_stride(self) -> int:
        """Pixels along each side of a latent position, as `Codec.space_stride`."""
        return SPACE_STRIDE


def load_codec(config: CodecConfig, path: Path | str | None = None) -> "PatchPCACodec | WanCodec | SDXLCodec":
    """Load the codec of `config`, frozen. `path` is the fitted file of a patch PCA. Other kinds take none.

    Raises FileNotFoundError with the remedy if weights are missing or gated, ValueError if they do not fit.
    """
    if config.kind != "patch_pca":
        if path is not None:
            raise ValueError(f"path: expected None, because a VAE is read from CodecConfig.source, got {path}")
        vae = WanCodec if config.kind == "wan" else SDXLCodec
        codec = vae.from_pretrained(config.source, revision=config.revision, dtype=getattr(torch, config.dtype))
    elif path is None:
        raise ValueError("path: expected the fitted file of the patch_pca codec, got None")
    else:
        codec = PatchPCACodec.load(path)
    if codec.channels != config.channels:
        raise ValueError(f"CodecConfig.channels: expected {codec.channels} for the loaded codec, got {config.channels}")
    return codec


def latent_shape(config: CodecConfig, frame_size: tuple[int, int], num_frames: int) -> tuple[int, int, int, int]:
    """Return (C, T, h, w) of the latents of `num_frames` frames of `frame_size` (H, W)."""
    height, width = (side // config.space_stride for side in frame_size)
    return config.channels, (num_frames - 1) // config.time_stride + 1, height, width


def to_video(frames: np.ndarray | Tensor, size: tuple[int, int]) -> Float[Tensor, "B 3 T h w"]:
    """Convert frames uint8 (..., T, H, W, 3) to video in [-1, 1] of `size` (h, w), leading axes flattened to B.

    Resizing is bilinear and antialiased. At equal size the conversion is exact.
    """
    if not isinstance(frames, Tensor):
        frames = torch.from_numpy(np.array(frames))  # a copy: decoded frames may be read-only or flipped views
    if frames.dtype != torch.uint8 or frames.ndim < 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames: expected (..., T, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
    *_, num_frames, height, width, _ = frames.shape
    images = frames.reshape(-1, height, width, 3).movedim(-1, 1).float()
    if (height, width) != tuple(size):
        images = F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return (images / 127.5 - 1).unflatten(0, (-1, num_frames)).transpose(1, 2).contiguous()


def to_frames(video: Float[Tensor, "B 3 T H W"]) -> np.ndarray:
    """Convert video in [-1, 1] to uint8 frames (B, T, H, W, 3), the inverse of `to_video` at equal size."""
    frames = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def decode_frames(codec: Codec, latents: Float[Tensor, "B C T h w"], *, clip: bool) -> np.ndarray:
    """Decode latents to uint8 frames (B, F, H, W, 3). Without `clip` each latent is a frame that was encoded alone."""
    if clip:
        return to_frames(codec.decode(latents))
    alone = to_frames(codec.decode(latents.transpose(1, 2).flatten(0, 1)[:, :, None]))
    return alone.reshape(len(latents), -1, *alone.shape[2:])


class WanCodec(nn.Module):
    """Wan 2.1's causal VAE from diffusers, with the latent normalisation of Cosmos-Predict2.5.

    Latents are (mode - mean) / std, with the mode of the posterior, never a sample. Mean and std come from the VAE's
    config, because the meaning of those of diffusers pipelines has changed between releases.

    `AutoencoderKLWan` keeps its causal cache in the module, so a lock admits one call at a time. Clips run in chunks of
    `CHUNK`, the last chunk padded. All kernels then see one shape, a clip's latents have the same bits in any batch,
    and memory does not grow with the batch. Single frames, which a policy encodes at inference, are not padded.
    """

    CHUNK = 8

    def __init__(self, vae: "AutoencoderKLWan") -> None:
        super().__init__()
        self._lock = Lock()
        config: Any = vae.config
        strides = config.scale_factor_temporal, config.scale_factor_spatial
        if strides != (TIME_STRIDE, SPACE_STRIDE):
            raise ValueError(
                f"VAE: expected strides of {TIME_STRIDE} in time and {SPACE_STRIDE} in space, got {strides}"
            )
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ValueError(
                f"VAE: expected a mean and a std for each of its {config.z_dim} latent channels, got "
                f"{len(config.latents_mean)} and {len(config.latents_std)}"
            )
        self.vae = frozen(vae)
        self.channels: int = config.z_dim
        self.time_stride, self.space_stride = TIME_STRIDE, SPACE_STRIDE
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
        """Load from a hub id or a local folder. Raises FileNotFoundError with the remedy if it cannot be read."""
        # Imported here because the import takes seconds and the patch PCA does not need it.
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        with loading("Wan video codec", source=source, revision=revision, subfolder=subfolder):
            vae = AutoencoderKLWan.from_pretrained(source, subfolder=subfolder, revision=revision, torch_dtype=dtype)
        return cls(vae)

    @classmethod
    def untrained(cls, channels: int, *, dtype: torch.dtype = torch.float32) -> Self:
        """Build Wan's architecture with random weights, to count and time its calls. Reads no file."""
        # Imported here because the import takes seconds and the patch PCA does not need it.
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        vae: Any = AutoencoderKLWan(z_dim=channels, **statistics)  # type: ignore[arg-type]
        # FLOPs are counted on fake parameters, which `to` cannot replace.
        return cls(vae if dtype is torch.float32 else vae.to(dtype))

    @property
    def key(self) -> dict[str, Any]:
        """Kind, channels and a hash of weights, mean and std."""
        return {"kind": "wan", "channels": self.channels, "weights": self._digest}

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self)

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T h w"]:
        """Encode as (mode - mean) / std, float32."""
        check_video(video)
        mode = self._in_chunks(lambda clips: self.vae.encode(clips, return_dict=False)[0].mode(), video)
        return (mode.float() - self.get_buffer("mean")) / self.get_buffer("std")

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Decode to video in [-1, 1], float32."""
        check_latents(latents, self.channels)
        mean = self.get_buffer("mean")
        raw = latents.to(mean.device, torch.float32) * self.get_buffer("std") + mean
        return self._in_chunks(lambda rows: self.vae.decode(rows, return_dict=False)[0].float().clamp(-1, 1), raw)

    def _in_chunks(self, run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Call `run` on `CHUNK` rows at a time, on the VAE's device and in its data type, one thread at a time."""
        results = []
        with self._lock:
            for chunk in rows.split(self.CHUNK):
                chunk = chunk.to(self.vae.device, self.vae.dtype)
                missing = self.CHUNK - len(chunk) if rows.shape[2] > 1 else 0
                padded = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
                results.append(run(padded)[: len(chunk)])
        return torch.cat(results)


class SDXLCodec(nn.Module):
    """SDXL's image VAE from diffusers. Every frame is encoded alone, as mode x scaling factor, about unit variance."""

    time_stride, space_stride = 1, SPACE_STRIDE

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        config: Any = vae.config
        self.vae: Any = frozen(vae)
        stride = 2 ** (len(config.block_out_channels) - 1)
        if stride != SPACE_STRIDE:
            raise ValueError(f"VAE: expected a stride of {SPACE_STRIDE} in space, got {stride}")
        self.channels: int = config.latent_channels
        self.scale: float = config.scaling_factor

    @classmethod
    def from_pretrained(cls, source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """Load from a hub id or a local folder. Raises FileNotFoundError with the remedy if it cannot be read."""
        # Imported here because the import takes seconds and the patch PCA does not need it.
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        with loading("SDXL image codec", source=source, revision=revision):
            return cls(AutoencoderKL.from_pretrained(source, revision=revision, torch_dtype=dtype))

    @classmethod
    def untrained(cls, *, dtype: torch.dtype = torch.float32) -> Self:
        """Build SDXL's architecture with random weights, to count and time its calls. Reads no file."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        settings: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "scaling_factor": 0.13025,
        }
        vae: Any = AutoencoderKL(**settings)
        return cls(vae if dtype is torch.float32 else vae.to(dtype))

    @property
    def key(self) -> dict[str, Any]:
        """Kind, channels, scaling factor and a hash of the weights."""
        return {"kind": "sdxl", "channels": self.channels, "scale": self.scale, "weights": self._digest}

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self)

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C F h w"]:
        """Encode every frame as mode x scaling factor, float32."""
        check_video(video[:, :, :1])
        return self._by_frame(lambda x: self.vae.encode(x, return_dict=False)[0].mode().float() * self.scale, video)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Decode every frame to [-1, 1], float32."""
        check_latents(latents, self.channels)
        return self._by_frame(
            lambda x: self.vae.decode(x, return_dict=False)[0].float().clamp(-1, 1), latents / self.scale
        )

    def _by_frame(self, run: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
        """Call `run` on each frame, so that its result does not depend on the other frames of a batch."""
        frames = video.transpose(1, 2).flatten(0, 1).to(self.vae.device, self.vae.dtype)
        return torch.cat([run(frame) for frame in frames.split(1)]).unflatten(0, (len(video), -1)).transpose(1, 2)
