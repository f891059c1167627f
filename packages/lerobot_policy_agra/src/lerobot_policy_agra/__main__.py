"""Write the folder that `lerobot-rollout --policy.path` and `lerobot-eval --policy.path` take.

Usage: python -m lerobot_policy_agra FOLDER --server=ws://HOST:PORT|--checkpoint=FOLDER [--camera=NAME] ...
"""

import sys
from pathlib import Path

import draccus

from lerobot_policy_agra.configuration_agra import AgraConfig
from lerobot_policy_agra.processor_agra import make_agra_pre_post_processors


def main(arguments: list[str]) -> None:
    """Write the config and both processors as JSON. The flags are the fields of `AgraConfig`."""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    folder = Path(arguments[0])
    config = draccus.parse(AgraConfig, args=arguments[1:])
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for pipeline in make_agra_pre_post_processors(config):
        pipeline.save_pretrained(folder)
    print(f"{folder}: config and processors of a policy at {config.source}")


if __name__ == "__main__":
    main(sys.argv[1:])
