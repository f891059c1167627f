"""The frozen video codec: frames <-> normalised latents.                                            C.1; Wan 2.1

Both codecs are causal with a time stride of 4 and a space stride of 8: latent frame 0 covers frame 0 alone, latent
frame t >= 1 covers frames 4t-3..4t, so 1 + 4k frames become 1 + k latent frames and the latent of an observation needs
no future. Frames are uint8 RGB (..., T, H, W, 3) outside, video is float (B, 3, T, H, W) in [-1, 1] inside.
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
from agra.weights import frozen, weights_digest
from agra.wam.patch_pca import MAX_CHANNELS, SPACE_STRIDE, TIME_STRIDE, PatchPCACodec, check_latents, check_video

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


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
        """Normalised latents of video in [-1, 1], on the codec's device whatever the video's.

        Safe to call from several threads. The latents of a clip do not depend on the other clips of the batch.
        """
        ...

    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Video in [-1, 1] of normalised latents, on the codec's device. Safe to call from several threads."""
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
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision in which Wan runs, bfloat16 as in Cosmos's own pipeline; latents are float32 either way."""

    def __post_init__(self) -> None:
        if self.kind not in ("wan", "patch_pca"):
            raise ValueError(f'CodecConfig.kind: expected "wan" or "patch_pca", got {self.kind!r}')
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'CodecConfig.dtype: expected "float32" or "bfloat16", got {self.dtype!r}')
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"CodecConfig.channels: expected 1 to {MAX_CHANNELS}, got {self.channels}")


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


def latent_shape(config: CodecConfig, frame_size: tuple[int, int], num_frames: int) -> tuple[int, int, int, int]:
    """(C, T, h, w) of the latents of `num_frames` frames of `frame_size` (H, W)."""
    height, width = frame_size
    return config.channels, (num_frames - 1) // TIME_STRIDE + 1, height // SPACE_STRIDE, width // SPACE_STRIDE


def to_video(frames: np.ndarray | Tensor, size: tuple[int, int]) -> Float[Tensor, "B 3 T h w"]:
    """Frames uint8 (..., T, H, W, 3) as video in [-1, 1] of `size` (h, w), leading axes flattened to B.

    Bilinear and antialiased where the size changes, exact where it doesn't.
    """
    if not isinstance(frames, Tensor):
        frames = torch.from_numpy(np.array(frames))  # a copy: decoded frames may be read-only or flipped views
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


class WanCodec(nn.Module):
    """Wan 2.1's causal VAE through diffusers, in the normalisation that Cosmos-Predict2.5 was trained in.

    Latents are (mode - mean) / std of the posterior, never a sample. Mean and std are read from the VAE's own config:
    diffusers pipelines have changed their meaning between releases.

    `AutoencoderKLWan` keeps its causal cache on itself, so one lock admits one call at a time. Clips go through it
    `CHUNK` at a time, the last chunk padded: the kernels then see one shape, a clip's latents are the same bits in any
    batch, and memory does not grow with the batch. Single frames, which a policy waits for, are not padded.
    """

    CHUNK = 8

    def __init__(self, vae: "AutoencoderKLWan") -> None:
        super().__init__()
        self._lock = Lock()
        config: Any = vae.config
        if config.scale_factor_temporal != TIME_STRIDE:
            raise ValueError(f"expected a VAE of time stride {TIME_STRIDE}, got {config.scale_factor_temporal}")
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ValueError(f"the VAE's config needs a mean and a std for each of its {config.z_dim} latent channels")
        self.vae = frozen(vae)
        self.channels: int = config.z_dim
        self.time_stride = TIME_STRIDE
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
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        with loading("Wan video codec", source=source, revision=revision, subfolder=subfolder):
            vae = AutoencoderKLWan.from_pretrained(source, subfolder=subfolder, revision=revision, torch_dtype=dtype)
        return cls(vae)

    @property
    def key(self) -> dict[str, Any]:
        """Kind, channels and a hash of the weights, mean and std."""
        return {"kind": "wan", "channels": self.channels, "weights": self._digest}

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self)

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T h w"]:
        """(mode - mean) / std, float32."""
        check_video(video, self.space_stride)
        mode = self._in_chunks(lambda clips: self.vae.encode(clips, return_dict=False)[0].mode(), video)
        return (mode.float() - self.get_buffer("mean")) / self.get_buffer("std")

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Video in [-1, 1], float32."""
        check_latents(latents, self.channels)
        mean = self.get_buffer("mean")
        raw = latents.to(mean.device, torch.float32) * self.get_buffer("std") + mean
        return self._in_chunks(lambda rows: self.vae.decode(rows, return_dict=False)[0].float().clamp(-1, 1), raw)

    def _in_chunks(self, run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`run` on `CHUNK` rows at a time, on the VAE's device and in its type, one thread at a time."""
        results = []
        with self._lock:
            for chunk in rows.split(self.CHUNK):
                chunk = chunk.to(self.vae.device, self.vae.dtype)
                missing = self.CHUNK - len(chunk) if rows.shape[2] > 1 else 0
                padded = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
                results.append(run(padded)[: len(chunk)])
        return torch.cat(results)
