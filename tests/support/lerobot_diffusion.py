"""LeRobot's Diffusion Policy on given weights and inputs. Runs in LeRobot's own environment, `make env-lerobot`.

Usage: lerobot_diffusion.py INPUT OUTPUT, both safetensors. The input's metadata holds the settings. Its tensors are the
weights of a `DiffusionModel` under LeRobot's names, and the inputs under `input/`.
"""

import json
import sys

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel
from safetensors import safe_open
from safetensors.torch import save_file


def main(source, target):
    with safe_open(source, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inputs = {name: tensors.pop(name).clone() for name in list(tensors) if name.startswith("input/")}
    frames = inputs["input/frames"]  # (N, 3, H, W), normalised
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (settings.pop("state_dim"),)),
            "observation.image": PolicyFeature(FeatureType.VISUAL, tuple(frames.shape[1:])),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, tuple(inputs["input/actions"].shape[2:]))},
        device="cpu",
        pretrained_backbone_weights=None,
        use_group_norm=True,
        use_separate_rgb_encoder_per_camera=False,
        noise_scheduler_type="DDIM",
        **settings,
    )
    model = DiffusionModel(config).eval()
    missing = model.load_state_dict(tensors, strict=False)
    assert missing.missing_keys == ["rgb_encoder.pool.pos_grid"], missing
    assert not missing.unexpected_keys, missing
    condition = inputs["input/condition"]
    with torch.no_grad():
        answers = {
            "features": model.rgb_encoder(frames),
            "noise": model.unet(inputs["input/actions"], inputs["input/step"], global_cond=condition),
            "chunk": model.conditional_sample(len(condition), condition, noise=inputs["input/actions"]),
        }
    save_file({name: value.contiguous() for name, value in answers.items()}, target)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
