import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file

from agra.wam.codec import (
    CodecConfig,
    PatchPCACodec,
    SDXLCodec,
    WanCodec,
    latent_shape,
    load_codec,
    to_frames,
    to_video,
)

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [2.0, 0.5, 1.5, 3.0]


def smooth_video(count=4, frames=9, size=(32, 48), seed=0):
    """Drifting blobs, video with low-rank patches as in real frames."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 3, 4, generator=generator)
    return F.interpolate(coarse, size=(frames, *size), mode="trilinear").clamp(-1, 1)


def psnr(a, b):
    return float(10 * torch.log10(4 / ((a - b) ** 2).mean()))


@pytest.fixture(scope="module")
def codec():
    return PatchPCACodec.fit([smooth_video(seed=0), smooth_video(seed=1)], channels=24)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=MEAN, latents_std=STD)
    folder = tmp_path_factory.mktemp("wan")
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def wan(wan_folder):
    return load_codec(CodecConfig(source=str(wan_folder), channels=4, dtype="float32"))


# Frames and video


def test_frames_survive_the_way_to_video_and_back():
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 24, 3), dtype=np.uint8)
    video = to_video(frames, (16, 24))
    assert video.shape == (2, 3, 5, 16, 24)
    assert video.min() >= -1
    assert video.max() <= 1
    np.testing.assert_array_equal(to_frames(video), frames)
    torch.testing.assert_close(video[1, 2, 3, 4, 5], torch.tensor(frames[1, 3, 4, 5, 2] / 127.5 - 1).float())


def test_read_only_and_flipped_frames_are_accepted():
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    frames.setflags(write=False)
    np.testing.assert_array_equal(to_frames(to_video(frames[:, ::-1], (16, 16)))[0], frames[:, ::-1])


def test_resizing_is_antialiased():
    """A one-pixel checkerboard turns grey. Without the wide filter it would alias."""
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(checkerboard[None, :, :, None], 3, axis=-1)
    assert to_video(frames, (20, 20)).abs().max() < 0.2


@pytest.mark.parametrize(
    "bad", [np.zeros((5, 16, 16, 3)), np.zeros((16, 16, 3), np.uint8), np.zeros((5, 3, 16, 16), np.uint8)]
)
def test_frames_of_another_type_or_shape_are_refused(bad):
    with pytest.raises(ValueError, match=r"frames: expected \(\.\.\., T, H, W, 3\) uint8"):
        to_video(bad, (16, 16))


# Patch PCA


def test_patch_pca_shapes_and_causality(codec):
    video = smooth_video(frames=17, seed=2)
    latents = codec.encode(video)
    assert latents.shape == (4, 24, 5, 4, 6)
    assert torch.equal(codec.encode(video[:, :, :1]), latents[:, :, :1])
    changed = video.clone()
    changed[:, :, 9:13] = 0  # latent frame 3 covers frames 9..12
    differs = (codec.encode(changed) != latents).any((0, 1, 3, 4)).tolist()
    assert differs == [False, False, False, True, False]


def test_patch_pca_latents_lie_where_their_patch_is(codec):
    video = smooth_video(seed=2)
    changed = video.clone()
    changed[:, :, :, 8:16, 40:48] = 0  # patch row 1, column 5
    differs = (codec.encode(changed) != codec.encode(video)).any(1).any(0).any(0)
    assert differs.nonzero().tolist() == [[1, 5]]


def test_patch_pca_reconstructs_held_out_video(codec):
    video = smooth_video(seed=3)
    assert psnr(codec.decode(codec.encode(video)), video) > 30


def test_patch_pca_is_whitened_on_its_training_video():
    video = smooth_video(count=8)
    latents = PatchPCACodec.fit(video.split(1), channels=6).encode(video)[:, :, 1:]
    rows = latents.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(6), atol=2e-3, rtol=0)
    torch.testing.assert_close(rows.mean(0), torch.zeros(6), atol=1e-4, rtol=0)


def test_patch_pca_equals_svd_in_one_piece():
    """The streamed fit spans the subspace of an SVD of all patches, cut by unfold."""
    video = smooth_video(count=6)
    codec = PatchPCACodec.fit(video.split(2), channels=5)
    frames = video[:, :, ::4].transpose(1, 2).flatten(0, 1)
    rows = F.unfold(frames, 8, stride=8).transpose(1, 2).flatten(0, 1)
    rows = rows - rows.mean(0)
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    overlap = (directions[:5].float() @ codec.first_basis).abs()
    torch.testing.assert_close(overlap, torch.eye(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(codec.first_scale, (values[:5] / len(rows) ** 0.5).float(), rtol=1e-4, atol=0)


def test_patch_pca_with_all_components_of_a_frame_loses_nothing():
    video = torch.rand(12, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = PatchPCACodec.fit([video.expand(-1, -1, 5, -1, -1)], channels=192)
    torch.testing.assert_close(codec.decode(codec.encode(video)), video, atol=1e-4, rtol=0)


def test_patch_pca_fit_is_deterministic_and_signs_are_fixed():
    first, second = (PatchPCACodec.fit([smooth_video()], channels=8) for _ in range(2))
    assert first.key == second.key
    largest = first.group_basis.gather(0, first.group_basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    assert first.key != PatchPCACodec.fit([smooth_video(seed=1)], channels=8).key


def test_still_video_does_not_blow_up():
    codec = PatchPCACodec.fit([torch.zeros(1, 3, 5, 16, 16)], channels=4)
    assert codec.encode(torch.full((1, 3, 5, 16, 16), 0.01)).isfinite().all()


def test_patch_pca_survives_save_and_load(codec, tmp_path):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    loaded = load_codec(CodecConfig(kind="patch_pca", channels=24), path)
    video = smooth_video(seed=4)
    assert torch.equal(loaded.encode(video), codec.encode(video))
    assert loaded.key == codec.key
    assert list(tmp_path.iterdir()) == [path]  # no temporary file left


def test_damaged_and_foreign_files_are_refused(codec, tmp_path):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for damage in (whole[: len(whole) // 2], bytes(flipped), b"no safetensors"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged patch PCA codec"):
            PatchPCACodec.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected a fitted patch PCA codec"):
        PatchPCACodec.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        PatchPCACodec.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 32, 32), "use 13 or 17"),
        ((1, 3, 0, 32, 32), "use 1 or 5"),
        ((1, 3, 5, 32, 30), "multiples of 8"),
        ((3, 5, 32, 32), r"video: expected \(B, 3, T, H, W\) float"),
    ],
)
def test_video_that_does_not_fit_is_refused(codec, wan, shape, message):
    for any_codec in (codec, wan):
        with pytest.raises(ValueError, match=message):
            any_codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        PatchPCACodec.fit([torch.zeros(shape)])


def test_fit_needs_video():
    with pytest.raises(ValueError, match="at least one piece of 5 frames"):
        PatchPCACodec.fit([])


# Wan


def test_wan_is_causal(wan):
    """Latent 0 of 17 frames equals the encoding of frame 0 alone, and latent 1 needs only frames 0..4."""
    video = smooth_video(count=2, frames=17)
    latents = wan.encode(video)
    assert latents.shape == (2, 4, 5, 4, 6)
    torch.testing.assert_close(wan.encode(video[:, :, :1]), latents[:, :, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(wan.encode(video[:, :, :5]), latents[:, :, :2], atol=1e-5, rtol=0)


def test_wan_latents_are_the_normalised_mode(wan, wan_folder):
    """(z - mean) / std of the posterior's mean, the first half of the VAE's moments, and its inverse."""
    vae = AutoencoderKLWan.from_pretrained(wan_folder, subfolder="vae")
    video = smooth_video(count=1)
    with torch.no_grad():
        mode = vae._encode(video)[:, :4]
        for channel in range(4):
            expected = (mode[:, channel] - MEAN[channel]) / STD[channel]
            torch.testing.assert_close(wan.encode(video)[:, channel], expected, atol=1e-6, rtol=1e-5)
        decoded = vae.decode(mode).sample.clamp(-1, 1)
    torch.testing.assert_close(wan.decode(wan.encode(video)), decoded, atol=1e-4, rtol=0)
    assert torch.equal(wan.encode(video), wan.encode(video))  # nothing is sampled


def test_wan_is_frozen_and_identified_by_its_weights(wan, wan_folder):
    assert not any(parameter.requires_grad for parameter in wan.parameters())
    assert not wan.vae.training
    same, other = (WanCodec.from_pretrained(str(wan_folder)) for _ in range(2))
    with torch.no_grad():
        other.get_buffer("std").mul_(2)
    assert same.key == wan.key
    assert other.key != wan.key


def test_wan_in_bfloat16_stays_close(wan, wan_folder):
    half = load_codec(CodecConfig(source=str(wan_folder), channels=4, dtype="bfloat16"))
    latents = half.encode(smooth_video(count=1))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, wan.encode(smooth_video(count=1)), atol=0.1, rtol=0)


def test_the_real_wan_has_its_known_size():
    """Built without weights: Wan 2.1's VAE with 16 channels, strides 4 and 8, and 127 M parameters."""
    with torch.device("meta"):
        codec = WanCodec(AutoencoderKLWan())
    assert (codec.channels, codec.time_stride, codec.space_stride) == (16, 4, 8)
    assert sum(parameter.numel() for parameter in codec.parameters()) == 126_892_531


# SDXL


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, scaling_factor=0.13025,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sdxl")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(sdxl_folder):
    return load_codec(CodecConfig(kind="sdxl", source=str(sdxl_folder), channels=4, dtype="float32"))


def test_sdxl_encodes_every_frame_alone_as_the_scaled_mode(sdxl, sdxl_folder):
    vae, video = AutoencoderKL.from_pretrained(sdxl_folder), smooth_video(count=2, frames=3)
    latents = sdxl.encode(video)
    assert latents.shape == (2, 4, 3, 4, 6)
    assert latent_shape(CodecConfig(kind="sdxl", channels=4), (32, 48), 3) == latents.shape[1:]
    with torch.no_grad():
        for row in range(2):
            for frame in range(3):
                moments = vae.quant_conv(vae.encoder(video[row : row + 1, :, frame]))
                torch.testing.assert_close(latents[row, :, frame], moments[0, :4] * 0.13025, atol=1e-6, rtol=1e-5)
                decoded = vae.decode(moments[:, :4]).sample.clamp(-1, 1)
                torch.testing.assert_close(sdxl.decode(latents)[row, :, frame], decoded[0], atol=1e-5, rtol=0)
    assert torch.equal(sdxl.encode(video[1:, :, 2:])[0, :, 0], latents[1, :, 2])  # bit for bit in any batch
    assert not any(parameter.requires_grad for parameter in sdxl.parameters())


def test_sdxl_is_identified_by_its_weights(sdxl, sdxl_folder):
    same, other = (SDXLCodec.from_pretrained(str(sdxl_folder)) for _ in range(2))
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert same.key == sdxl.key
    assert other.key != sdxl.key


def test_the_real_sdxl_has_its_known_size():
    with torch.device("meta"):
        codec = SDXLCodec.untrained()
    assert (codec.channels, codec.time_stride, codec.space_stride, codec.scale) == (4, 1, 8, 0.13025)
    assert sum(parameter.numel() for parameter in codec.parameters()) == 83_653_863


def test_load_codec_refuses_what_does_not_fit(wan_folder, codec, tmp_path):
    with pytest.raises(ValueError, match="channels: expected 4 for the loaded codec, got 16"):
        load_codec(CodecConfig(source=str(wan_folder)))
    with pytest.raises(ValueError, match="path: expected the fitted file"):
        load_codec(CodecConfig(kind="patch_pca"))
    with pytest.raises(ValueError, match="path: expected None"):
        load_codec(CodecConfig(source=str(wan_folder)), tmp_path / "codec.safetensors")
    with pytest.raises(FileNotFoundError, match=r"Wan video codec.*must hold vae as saved by save_pretrained") as error:
        load_codec(CodecConfig(source=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"kind": "vae"}, {"dtype": "half"}, {"channels": 0}])
def test_codec_config_is_checked(fields):
    with pytest.raises(ValueError, match=f"CodecConfig.{next(iter(fields))}"):
        CodecConfig(**fields)
