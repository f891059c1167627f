"""A stand-in for a method whose action and attention depend on exactly one hidden token."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from agra.batch import PolicyInputs
from agra.diagnostics.diagnosis import diagnose
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.record import Diagnosis, write_diagnosis
from agra.diagnostics.report.page import PolicyEntry
from agra.diagnostics.samples.probe_sample import ProbeSample
from agra.flow import euler
from agra.methods.method import Method
from agra.types import REGIMES
from agra.wam.codec import to_frames

GRID = (3, 4, 5)
TARGET = (1, 2, 3)
WIDTH, HORIZON, ACTION, HEADS, FRAMES = 6, 4, 3, 2, 5


class PlainMethod(Method):
    """A method without any capability beside acting: it reads the state and the image's mean."""

    config = SimpleNamespace(kind="plain", aligned_layers=())

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def loss(self, batch, denominators=None):
        raise NotImplementedError

    def parts(self):
        return {"all": self}

    def blocks(self):
        return []

    def noise_shapes(self):
        return {"action": (HORIZON, ACTION)}

    def act(self, inputs, noise, *, steps=None, continuation=None):
        mean = inputs.state.mean(dim=1) + inputs.latents.mean(dim=(1, 2, 3, 4))
        return self.weight * (noise["action"] + mean[:, None, None])


class TokenReader(Method):
    """Hidden states are fixed functions of the observation. The action reads token TARGET alone. Attention is not shown."""

    config = SimpleNamespace(kind="token reader", aligned_layers=(2,))
    read_layers = (0, 2)
    token_grid = GRID

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.read = nn.Parameter(torch.randn(WIDTH, HORIZON * ACTION, generator=generator))
        t, h, w = TARGET
        self.target = (t * GRID[1] + h) * GRID[2] + w
        self.hidden_calls = 0

    def loss(self, batch, denominators=None):
        raise NotImplementedError

    def parts(self):
        return {"all": self}

    def blocks(self):
        return []

    def noise_shapes(self):
        return {"video": (2, *GRID), "action": (HORIZON, ACTION)}

    def hidden(self, inputs, noise, *, layers=()):
        self.hidden_calls += 1
        base = inputs.latents.mean(dim=(1, 2, 3, 4))
        positions = torch.arange(np.prod(GRID)).view(GRID)[..., None] + torch.arange(WIDTH)
        return {
            layer: torch.sin(positions * (1 + layer) + base[:, None, None, None, None])
            + noise["video"].mean(dim=(1, 2, 3, 4))[:, None, None, None, None]
            for layer in sorted({*self.read_layers, *layers})
        }

    def tokens_read(self, hidden):
        """The part of the hidden states that moves the action, (B, WIDTH)."""
        return sum(hidden[layer].flatten(1, 3)[:, self.target] for layer in self.read_layers)

    def act_on(self, hidden, inputs, noise, *, steps=None):
        push = (self.tokens_read(hidden) @ self.read).view(-1, HORIZON, ACTION) + inputs.state.mean(dim=1)[
            :, None, None
        ]
        return euler(lambda actions, level: actions + push, noise["action"], steps or 4)

    def act(self, inputs, noise, *, steps=None, continuation=None):
        return self.act_on(self.hidden(inputs, noise), inputs, noise, steps=steps)


class OneTokenMethod(TokenReader):
    """A token reader with every capability. All attention is on token TARGET, and the predicted video is static."""

    config = SimpleNamespace(kind="one token", aligned_layers=(2,))

    def visit_attention(self, hidden, inputs, noise, visit, *, steps=None):
        count, tokens = len(inputs), int(np.prod(GRID))
        weights = torch.zeros(count, HEADS, 1 + HORIZON, tokens)
        weights[:, :, 0, 0] = 1  # the state token reads another token, and must not count
        weights[:, :, 1:, self.target] = 1
        for _ in range(steps or 4):
            visit([weights] * len(self.read_layers))
        return self.act_on(hidden, inputs, noise, steps=steps)

    def text_attention(self, inputs, noise, *, layers):
        """Token 1 is read at TARGET alone, the others everywhere."""
        weights = torch.full((1, *GRID, inputs.instruction.shape[1]), 0.1)
        weights[..., 1] = 0
        weights[0, *TARGET, 1] = 1
        return dict.fromkeys(layers, weights)

    def imagine(self, inputs, noise, *, steps):
        return inputs.latents


class StandInText:
    def words(self, instruction):
        return [(word, (place,)) for place, word in enumerate(instruction.split()[:3])]


class StandInPolicy:
    """The part of `MethodPolicy` that a diagnosis uses."""

    name = "stand-in"
    frame_size = (16, 20)
    past = ()
    action_noise = "random"
    video_noise = "random"
    instructions = SimpleNamespace(encoder=StandInText())

    def __init__(self, method):
        self.method, self.options = method.eval(), {}
        self.config = SimpleNamespace(method=method.config)

    def encode(self, observations):
        frames = torch.stack([torch.from_numpy(o.frame).float() / 255 for o in observations])
        count = len(observations)
        return PolicyInputs(
            latents=frames.permute(0, 3, 1, 2)[:, :, None],
            instruction=torch.zeros(count, 4, 2),
            state=torch.stack([torch.from_numpy(o.state) for o in observations]),
            embodiment=torch.zeros(count, dtype=torch.long),
        )

    def noise(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = self.method.noise_shapes()
        return {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}

    def imagine(self, inputs, noise, *, steps):
        latents = self.method.imagine(inputs, noise, steps=steps)
        return to_frames(2 * latents.expand(-1, -1, FRAMES, -1, -1) - 1)

    def unnormalize(self, actions, embodiment):
        return actions.numpy()

    def normalize(self, actions, embodiment):
        return actions

    def crop(self, frames, embodiment):
        return frames


@pytest.fixture
def method():
    return OneTokenMethod().eval()


@pytest.fixture
def policy(method):
    return StandInPolicy(method)


@pytest.fixture
def token_policy():
    """A policy whose method reads token grids and has no other capability."""
    return StandInPolicy(TokenReader())


@pytest.fixture
def plain_policy():
    """A policy whose method has none of the capabilities that instruments use."""
    return StandInPolicy(PlainMethod())


@pytest.fixture
def target():
    return TARGET


@pytest.fixture
def make_sample():
    """Frames of 16 x 20 pixels (4 x 4 a token), the mask on the target's spatial cell in every latent frame."""

    def make(trial="trial-0", step=0, regime="in_distribution", seed=0, masked=True, recorded=True):
        random = np.random.default_rng(seed)
        masks = np.zeros((GRID[0], 16, 20), dtype=bool)
        if masked:
            masks[:, 4 * TARGET[1] : 4 * TARGET[1] + 4, 4 * TARGET[2] : 4 * TARGET[2] + 4] = True
        frames = random.integers(0, 256, (GRID[0], 16, 20, 3), dtype=np.uint8)
        video = np.broadcast_to(frames[:1], (FRAMES, 16, 20, 3)).copy()
        video[-1] = random.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        optional = {
            "video": video,
            "actions": random.normal(size=(6, ACTION)).astype(np.float32),
            "position": random.random(2),
        }
        return ProbeSample(
            trial=trial,
            step=step,
            regime=regime,
            instruction="put the banana in the box",
            embodiment="hands",
            state=random.normal(size=4).astype(np.float32),
            frames=frames,
            masks=masks,
            **(optional if recorded else {}),
        )

    return make


@pytest.fixture
def write_policy(policy, make_sample, tmp_path):
    """Write the files of a policy: a log, results of 10 trials of each regime, a diagnosis and a config."""
    samples = [make_sample(trial=f"t{i}", seed=i, regime=REGIMES[i % 4]) for i in range(6)]

    def write(name, *, wins=3, teacher=None, policy=policy):
        folder = tmp_path / name
        policy.name = name
        diagnose(policy, samples, folder / "diagnosis", teacher=teacher, teacher_name="pixels",
                 config=DiagnosisConfig(background_sets=2, gallery=2), progress=False)  # fmt: skip
        log = [
            {"step": s, "loss": 1 / s, "action_loss": 0.5 / s, "samples_per_second": 30.0} for s in range(10, 200, 10)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log) + '{"step": 2')
        header = {"policy": name, "simulator": "tabletop", "trials_sha256": "x", "protocol": {}, "max_steps": 9,
                  "num_trials": 40, "regimes": {r: {"played": 10, "full": 10} for r in REGIMES}}  # fmt: skip
        rows = [{"trial": f"{r}-{i}", "regime": r, "task": "t", "seed": i, "instruction": "go", "success": i < wins,
                 "progress": {"grasped": i < wins + 2}, "steps": 5, "calls": 1, "wall_s": 0.1,
                 "policy_ms": {"mean": 1.0, "p50": 1.0, "p95": 1.0}} for r in REGIMES for i in range(10)]  # fmt: skip
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
        config = {"method": {"kind": "wam", "model": {"codec": {"kind": "patch_pca"}}}, "name": name}
        (folder / "config.json").write_text(json.dumps(config))
        return PolicyEntry(
            name=name,
            description=f"The arm {name} <b>",
            training_logs={"joint": folder / "metrics.jsonl"},
            results=folder / "results.jsonl",
            diagnosis=folder / "diagnosis",
            config=folder / "config.json",
        )

    return write


@pytest.fixture
def pictured(policy, make_sample, tmp_path):
    """Write the diagnosis of a policy with random pictures of any size, so that every control must change some."""

    def write(name, *, samples, grid, blocks, heads, actions, frame, seed=0):
        random = np.random.default_rng(seed)
        policy.name = name
        few = [make_sample(trial=f"t{i}", seed=i, regime=REGIMES[i % 4]) for i in range(samples)]
        config = DiagnosisConfig(background_sets=1, noise_samples=1, gallery=samples, map_kinds=())
        diagnosis = diagnose(policy, few, tmp_path / f"{name}-small", config=config, progress=False)
        frames, (height, width) = 4 * (grid[0] - 1) + 1, frame

        def photos(count):
            """Smooth pictures, about as dense as a camera's."""
            coarse = random.integers(0, 256, (samples, count, height // 8, width // 8, 3)).astype(np.float32)
            fine = coarse.repeat(8, axis=2).repeat(8, axis=3) + random.normal(0, 4, (samples, count, height, width, 3))
            return fine.clip(0, 255).astype(np.uint8)

        def grids(*lead):
            return random.random((*lead, *grid)).astype(np.float32)

        masks = np.zeros((samples, grid[0], height, width), bool)
        masks[:, :, height // 4 : height // 2, width // 4 : width // 2] = True
        layers = list(range(blocks))
        arrays = {
            "attention": grids(samples, blocks), "mask": grids(samples) > 0.5, "frames": photos(grid[0]),
            "frame_masks": masks, "sensitivity_mean": grids(samples), "sensitivity_zero": grids(samples),
            "attention_by_steps": grids(samples, 4, blocks).astype(np.float16),
            "attention_by_heads": grids(samples, heads, blocks).astype(np.float16),
            "attention_by_actions": grids(samples, actions, blocks).astype(np.float16),
            "imagined": photos(frames), "recorded": photos(frames),
            **{f"text_attention_{i}": grids(blocks, 5).astype(np.float16) for i in range(samples)},
            **{f"pca_layer_{i}": (grids(samples, 3).transpose(0, 2, 3, 4, 1) * 255).astype(np.uint8) for i in layers},
        }  # fmt: skip
        header = {**diagnosis.header, "grid": list(grid), "layers": layers, "aligned_layers": [1], "bridged_layers": layers,
                  "words": [["put", "the", "red", "banana", "box"]] * samples}  # fmt: skip
        header["settings"] = {**header["settings"], "map_unit": "token"}
        rows = [{**row, "frame_size": [height + 6, width], "crop": [4, 0], "teacher_similarity_by_layer": [0.1] * blocks,
                 "alignment_cosine_by_layer": None, "probe_error_by_layer": [1.0] * blocks} for row in diagnosis.rows]  # fmt: skip
        folder = tmp_path / name
        write_diagnosis(Diagnosis(header=header, rows=rows, arrays=arrays), folder)
        return PolicyEntry(name=name, description=f"The policy {name}", diagnosis=folder)

    return write
