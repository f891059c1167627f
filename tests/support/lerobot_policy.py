"""The policy `agra` of LeRobot, asked for actions. Runs in LeRobot's own environment, `make env-lerobot`.

Usage: lerobot_policy.py ADDRESS OBSERVATIONS ANSWERS. OBSERVATIONS is an npz with `frames` (N, H, W, 3) uint8 and
`states` (N, S). ANSWERS is the JSON of what the policy returned.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot_policy_agra import AgraConfig
from lerobot_policy_agra.modeling_agra import AgraPolicy


def main(address, source, target):
    arrays = np.load(source)
    frames = torch.from_numpy(arrays["frames"]).permute(0, 3, 1, 2).float() / 255
    states = torch.from_numpy(arrays["states"])

    def batch(*rows, **cameras):
        rows = list(rows)
        images = {
            f"observation.images.{name}": frames[[row + shift for row in rows]] for name, shift in cameras.items()
        }
        return {"observation.state": states[rows], "task": ["go"] * len(rows), **images}

    def refusal(function, *arguments):
        try:
            function(*arguments)
        except ValueError as error:
            return str(error)
        raise AssertionError("expected a ValueError")

    answers = {}
    config = AgraConfig(server=address, camera="top", n_action_steps=2, seed=70)
    policy = AgraPolicy(config)
    before, after = make_pre_post_processors(policy_cfg=config)
    given = torch.tensor([[1.0, 5.0], [0.0, 6.0]])
    answers["steps"] = []
    for step in (0, 2, 4):
        observation = before({**batch(step, step + 1, top=0, other=3), "observation.trial_seed": given})
        answers["steps"].append(after(policy.select_action(observation)).tolist())
    policy.reset()
    policy.select_action(batch(1, 0, top=0))
    answers["wrong rows"] = refusal(policy.select_action, batch(0, top=0))

    policy.reset()
    chunk = policy.predict_action_chunk(batch(0, top=0))
    padded = torch.cat([chunk[0, 2:], torch.zeros(7, chunk.shape[2])])
    policy.predict_action_chunk(batch(0, top=0), inference_delay=9, prev_chunk_left_over=padded)
    policy.predict_action_chunk(batch(0, top=0), inference_delay=1, prev_chunk_left_over=chunk[0, 1:3])
    policy.predict_action_chunk(batch(0, top=0), inference_delay=1, prev_chunk_left_over=torch.zeros_like(padded))
    answers["chunk"] = chunk[0].tolist()
    answers["rtc"] = policy.supports_rtc()

    several = AgraPolicy(AgraConfig(server=address))
    answers["ambiguous"] = refusal(several.select_action, batch(0, top=0, other=3))
    answers["only"] = several.select_action(batch(0, front=0)).tolist()
    both = AgraPolicy(AgraConfig(server=address, camera="top,other"))
    answers["both"] = both.select_action(batch(0, top=0, other=3)).tolist()
    answers["features"] = {
        k: list(v.shape) for k, v in (both.config.input_features | both.config.output_features).items()
    }
    wide = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(12,))}
    answers["width"] = refusal(AgraPolicy, AgraConfig(server=address, output_features=wide))
    answers["robot"] = refusal(AgraPolicy, AgraConfig(server=address, embodiment="so101"))
    answers["training"] = refusal(config.get_optimizer_preset)
    folder = Path(target).parent / "saved"
    both.save_pretrained(folder)
    answers["saved"] = sorted(path.name for path in folder.iterdir())
    answers["reread"] = AgraPolicy.from_pretrained(folder).config.camera
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
