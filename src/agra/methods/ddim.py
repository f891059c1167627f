"""Diffusion with squared-cosine noise, as Diffusion Policy and UWM train and sample it, through diffusers' scheduler."""

from collections.abc import Callable
from typing import cast

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from agra.methods.method import Continuation

Predictor = Callable[[Tensor, Int[Tensor, "B"]], Tensor]
"""Predicts the noise in noisy samples (B, ...) at their diffusion steps."""


def add_noise(
    clean: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"], step: Int[Tensor, "B"], num_steps: int
) -> Float[Tensor, "B *shape"]:
    """Mix clean samples and noise at a diffusion step of each row, of `num_steps`."""
    return _scheduler(num_steps, num_steps).add_noise(clean, noise, cast(torch.IntTensor, step))


def first_step(num_steps: int, sampling_steps: int) -> int:
    """Return the diffusion step at which sampling starts from pure noise: 90 for 10 of 100."""
    return int(_scheduler(num_steps, sampling_steps).timesteps[0])


def ddim(
    predict: Predictor,
    noise: Float[Tensor, "B *shape"],
    num_steps: int,
    sampling_steps: int,
    *,
    added: Float[Tensor, "B N *shape"] | None = None,
    continuation: Continuation | None = None,
) -> Float[Tensor, "B *shape"]:
    """Denoise from `noise` in `sampling_steps` of `num_steps`. The clean estimate is clipped to [-1, 1] at every step.

    `added` is noise for each step but the last. With it the chain is DDPM's: DDIM with eta 1 whose noise follows from
    the clipped estimate. `continuation` applies to samples that are actions.
    """
    scheduler, sample = _scheduler(num_steps, sampling_steps), noise
    for index, step in enumerate(scheduler.timesteps.tolist()):
        predicted = predict(sample, torch.full((len(sample),), step, device=sample.device)).float()
        if continuation is not None:
            predicted = _held(predicted, sample, scheduler.alphas_cumprod[step].item(), *continuation)
        row = added[:, index] if added is not None and index < sampling_steps - 1 else None
        options = {"eta": 0.0 if row is None else 1.0, "use_clipped_model_output": added is not None}
        sample = scheduler.step(predicted, step, sample, variance_noise=row, return_dict=False, **options)[0]
    return sample


def _scheduler(num_steps: int, sampling_steps: int) -> DDIMScheduler:
    """Squared-cosine noise, prediction of the noise, clean samples clipped to [-1, 1]."""
    scheduler = DDIMScheduler(
        num_train_timesteps=num_steps,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(sampling_steps)
    return scheduler


def _held(predicted: Tensor, sample: Tensor, kept: float, previous: Tensor, weights: Tensor) -> Tensor:
    """The predicted noise, moved by `weights` towards the noise that leads from `previous` to `sample`.

    `kept` is alpha-bar.

    The equations of real-time chunking are those of flow matching, so this stands in for them.
    """
    return predicted + weights * ((sample - kept**0.5 * previous) / (1 - kept) ** 0.5 - predicted)
