"""A stand-in for the world action model whose action and attention hang on exactly one known hidden token."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from agra.diagnostics.probe import ProbeSample
from agra.flow import euler

GRID = (3, 4, 5)
TARGET = (1, 2, 3)
WIDTH, HORIZON, ACTION, HEADS, FRAMES = 6, 4, 3, 2, 5


@dataclass
class ActionOutput:
    velocity: torch.Tensor
    attention: tuple[torch.Tensor, ...] | None


class OneTokenWAM(nn.Module):
    """Hidden states are fixed functions of the observation; velocity and attention read token TARGET alone."""

    bridged_layers = (0, 2)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.read = nn.Parameter(torch.randn(WIDTH, HORIZON * ACTION, generator=generator))
        t, h, w = TARGET
        self.target = (t * GRID[1] + h) * GRID[2] + w
        self.condition_calls = 0

    def condition(self, observation_latent, noise, instruction, *, layers=()):
        self.condition_calls += 1
        base = observation_latent.mean(dim=(1, 2, 3, 4))
        wanted = sorted({*self.bridged_layers, *layers})
        positions = torch.arange(np.prod(GRID)).view(GRID)[..., None] + torch.arange(WIDTH)
        return {
            layer: torch.sin(positions * (1 + layer) + base[:, None, None, None, None])
            + noise.mean(dim=(1, 2, 3, 4), keepdim=True)
            for layer in wanted
        }

    def guide(self, hidden):
        return tuple(hidden[layer].flatten(1, 3) for layer in self.bridged_layers)

    def action_dit(self, noisy_actions, state, noise_level, guidance, embodiment, return_attention=False):
        token = sum(g[:, self.target] for g in guidance)
        velocity = noisy_actions + (token @ self.read).view(-1, HORIZON, ACTION) + state.mean(dim=1)[:, None, None]
        attention = None
        if return_attention:
            weights = torch.zeros(len(state), HEADS, 1 + HORIZON, guidance[0].shape[1])
            weights[:, :, 0, 0] = 1  # the state token looks elsewhere, and must not count
            weights[:, :, 1:, self.target] = 1
            attention = tuple(weights for _ in guidance)
        return ActionOutput(velocity, attention)

    def text_attention(self, observation_latent, noise, instruction, *, layers):
        """Token 1 is read at TARGET alone, the others everywhere."""
        weights = torch.full((1, *GRID, instruction.shape[1]), 0.1)
        weights[..., 1] = 0
        weights[0, *TARGET, 1] = 1
        return dict.fromkeys(layers, weights)

    def imagine(self, observation_latent, noise, instruction, *, steps):
        """Expects that nothing moves; StandInCodec makes FRAMES frames of one."""
        return observation_latent

    def act(self, guidance, state, embodiment, noise, *, steps=4):
        return euler(lambda x, level: self.action_dit(x, state, level, guidance, embodiment).velocity, noise, steps)


class StandInCodec:
    def decode(self, latents):
        return 2 * latents.expand(-1, -1, FRAMES, -1, -1) - 1


class StandInText:
    def words(self, instruction):
        return [(word, (place,)) for place, word in enumerate(instruction.split()[:3])]


class StandInPolicy:
    """What `diagnose` asks of a policy."""

    name = "stand-in"
    action_steps = 4
    frame_size = (16, 20)
    codec, text = StandInCodec(), StandInText()
    config = SimpleNamespace(alignment=SimpleNamespace(layers=(2,)))

    def __init__(self, model) -> None:
        self.model = model.eval()

    def prepare(self, observations):
        frames = torch.stack([torch.from_numpy(o.frame).float() / 255 for o in observations])
        latent = frames.permute(0, 3, 1, 2)[:, :, None]
        state = torch.stack([torch.from_numpy(o.state) for o in observations])
        count = len(observations)
        return SimpleNamespace(
            observation_latent=latent,
            instruction=torch.zeros(count, 4, 2),
            state=state,
            embodiment=torch.zeros(count, dtype=torch.long),
        )

    def video_noise(self, count, seed):
        return torch.randn(count, 2, *GRID, generator=torch.Generator().manual_seed(seed))

    def action_noise(self, count, seed):
        return torch.randn(count, HORIZON, ACTION, generator=torch.Generator().manual_seed(seed))

    def unnormalize(self, actions, embodiment):
        return actions.numpy()

    def normalize(self, actions, embodiment):
        return actions

    def seen(self, frames, embodiment):
        return frames


@pytest.fixture
def wam():
    return OneTokenWAM().eval()


@pytest.fixture
def policy(wam):
    return StandInPolicy(wam)


@pytest.fixture
def target():
    return TARGET


@pytest.fixture
def make_sample():
    """Frames of 16 x 20 pixels (4 x 4 a token), the mask on the target's spatial cell in every latent frame."""

    def make(trial="trial-0", step=0, regime="in_distribution", seed=0, masked=True, known=True):
        random = np.random.default_rng(seed)
        masks = np.zeros((GRID[0], 16, 20), dtype=bool)
        if masked:
            masks[:, 4 * TARGET[1] : 4 * TARGET[1] + 4, 4 * TARGET[2] : 4 * TARGET[2] + 4] = True
        frames = random.integers(0, 256, (GRID[0], 16, 20, 3), dtype=np.uint8)
        video = np.broadcast_to(frames[:1], (FRAMES, 16, 20, 3)).copy()
        video[-1] = random.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        more = {
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
            **(more if known else {}),
        )

    return make
