"""The embedded video codec: a closed-form, causal space-time patch PCA, fitted on training frames without a
download.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from agra.files import replacing
from agra.weights import weights_digest, write_tensors

TIME_STRIDE = 4
"""Frames of each latent frame after the first, in both codecs."""
SPACE_STRIDE = 8
"""Pixels along each side of a latent position, in both codecs."""
PATCH = SPACE_STRIDE
MAX_CHANNELS = 3 * PATCH**2
"""Number of values in a patch of one frame, which is the largest number of components."""
_FILE_FORMAT = "agra.patch_pca.1"
_ROUNDING_VARIANCE = (2 / 255) ** 2 / 12
"""Variance that rounding to 8 bits adds to a pixel in [-1, 1]."""


def check_video(video: Tensor) -> None:
    """Raise ValueError unless the video has 1 + 4k frames and the space stride divides their size."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(f"video: expected (B, 3, T, H, W) float, got {tuple(video.shape)} {video.dtype}")
    num_frames, height, width = video.shape[2:]
    if num_frames % TIME_STRIDE != 1:
        below = max(num_frames - 1, 0) // TIME_STRIDE * TIME_STRIDE + 1
        raise ValueError(
            f"video: expected 1 + {TIME_STRIDE}k frames, got {num_frames}; use {below} or {below + TIME_STRIDE}"
        )
    if height % SPACE_STRIDE or width % SPACE_STRIDE or not height or not width:
        raise ValueError(f"video: expected sides that are multiples of {SPACE_STRIDE}, got {height}x{width}")


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise ValueError unless the latents are (B, channels, T, h, w)."""
    if latents.ndim != 5 or latents.shape[1] != channels:
        raise ValueError(f"latents: expected (B, {channels}, T, h, w), got {tuple(latents.shape)}")


class _Moments:
    """Running mean and covariance of rows, by the pairwise update of Chan, Golub and LeVeque (1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.scatter: Tensor | float = 0.0

    def add(self, rows: Float[Tensor, "N D"]) -> None:
        """Add N rows. Products are computed in the rows' precision, sums in float64."""
        mean = rows.mean(0)
        centred = rows - mean
        scatter, delta = (centred.T @ centred).double(), mean.double() - self.mean
        total = self.count + len(rows)
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * len(rows) / total)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def principal(self, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (D,), leading directions (D, channels) and their standard deviations (channels,), float32."""
        assert isinstance(self.scatter, Tensor)
        assert isinstance(self.mean, Tensor)
        values, vectors = torch.linalg.eigh(self.scatter.cpu() / self.count)
        basis = vectors.flip(1)[:, :channels]
        # An eigenvector's sign is arbitrary. Make its largest entry positive.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        # Directions weaker than the rounding noise carry no image content, so they are not scaled to unit variance.
        deviation = values.flip(0)[:channels].clamp_min(_ROUNDING_VARIANCE).sqrt()
        return self.mean.cpu().float(), basis.float(), deviation.float()


class PatchPCACodec(nn.Module):
    """Closed-form codec: principal components of 8x8 patches, whitened channel by channel.

    A patch has 192 values in the first frame and 768 in each later group of four frames. Both kinds have their own mean
    and their own `channels` components, divided by their standard deviations over the training frames.
    """

    time_stride = TIME_STRIDE
    space_stride = SPACE_STRIDE

    def __init__(self, channels: int) -> None:
        super().__init__()
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"channels: expected 1 to {MAX_CHANNELS}, the values of a patch, got {channels}")
        self.channels = channels
        for name, length in (("first", MAX_CHANNELS), ("group", TIME_STRIDE * MAX_CHANNELS)):
            self.register_buffer(f"{name}_mean", torch.zeros(length))
            self.register_buffer(f"{name}_basis", torch.zeros(length, channels))
            self.register_buffer(f"{name}_scale", torch.ones(channels))

    @classmethod
    @torch.no_grad()
    def fit(cls, videos: Iterable[Float[Tensor, "B 3 F H W"]], *, channels: int = 24) -> Self:
        """Fit to pieces of training video in [-1, 1], which may differ in size and are read once.

        Any frame may start a window, so frames 0, 4, 8.. all count as first frames.
        Raises ValueError if there is no video or a piece does not fit the strides.
        """
        codec, first, group = cls(channels), _Moments(), _Moments()
        for video in videos:
            check_video(video)
            first.add(_patches(video[:, :, ::TIME_STRIDE], 1).flatten(0, -2))
            if video.shape[2] > 1:
                group.add(_patches(video[:, :, 1:], TIME_STRIDE).flatten(0, -2))
        if not group.count:
            raise ValueError("videos: expected at least one piece of 5 frames or more to fit the patch PCA, got none")
        for name, moments in (("first", first), ("group", group)):
            for field, value in zip(("mean", "basis", "scale"), moments.principal(channels), strict=True):
                codec.get_buffer(f"{name}_{field}").copy_(value)
        return codec

    @property
    def key(self) -> dict[str, Any]:
        """Kind, channels and a hash of the fitted components."""
        return {"kind": "patch_pca", "channels": self.channels, "weights": self._digest}

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self)

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "B 3 F H W"]) -> Float[Tensor, "B C T h w"]:
        """Return whitened components, one vector for each 8x8 patch of frame 0 and of each later group of four
        frames.
        """
        check_video(video)
        video = video.to(self.get_buffer("first_mean").device)
        latents = [self._project("first", _patches(video[:, :, :1], 1))]
        if video.shape[2] > 1:
            latents.append(self._project("group", _patches(video[:, :, 1:], TIME_STRIDE)))
        return torch.cat(latents, dim=1).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Return the nearest video in [-1, 1] that the components can express."""
        check_latents(latents, self.channels)
        rows = latents.to(self.get_buffer("first_mean").device).movedim(1, -1)
        video = [_unpatch(self._expand("first", rows[:, :1]), 1)]
        if latents.shape[2] > 1:
            video.append(_unpatch(self._expand("group", rows[:, 1:]), TIME_STRIDE))
        return torch.cat(video, dim=2).clamp(-1, 1)

    def _project(self, name: str, rows: Tensor) -> Tensor:
        mean, basis, scale = (self.get_buffer(f"{name}_{field}") for field in ("mean", "basis", "scale"))
        return (rows - mean) @ basis / scale

    def _expand(self, name: str, rows: Tensor) -> Tensor:
        mean, basis, scale = (self.get_buffer(f"{name}_{field}") for field in ("mean", "basis", "scale"))
        return (rows * scale) @ basis.T + mean

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        with replacing(Path(path)) as temporary:
            write_tensors(temporary, tensors, metadata={"format": _FILE_FORMAT, "weights": self._digest})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a file of `save`. Raises FileNotFoundError, or ValueError if the file is damaged or of another kind."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected a fitted patch PCA codec (`agra prepare` fits one)"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FILE_FORMAT:
                    raise ValueError(
                        f"{path}: expected a fitted patch PCA codec (format {_FILE_FORMAT}), got format "
                        f"{metadata.get('format')}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            codec = cls(len(tensors["first_scale"]))
            codec.load_state_dict(tensors)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged patch PCA codec ({str(error).splitlines()[0]})") from error
        if codec.key["weights"] != metadata.get("weights"):
            raise ValueError(f"{path}: damaged patch PCA codec (the components do not match the stored hash)")
        return codec


def _patches(video: Float[Tensor, "B 3 F H W"], depth: int) -> Float[Tensor, "B T h w D"]:
    """Cut video into patches of `depth` frames and 8x8 pixels, each a row in the order (channel, frame, y, x)."""
    batch, _, num_frames, height, width = video.shape
    split = video.float().reshape(batch, 3, num_frames // depth, depth, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _unpatch(rows: Float[Tensor, "B T h w D"], depth: int) -> Float[Tensor, "B 3 F H W"]:
    """Invert `_patches`."""
    split = rows.unflatten(-1, (3, depth, PATCH, PATCH)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return split.flatten(6).flatten(4, 5).flatten(2, 3)
