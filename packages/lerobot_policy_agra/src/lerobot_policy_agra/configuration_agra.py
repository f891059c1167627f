"""Settings of the policy `agra`."""

from dataclasses import dataclass
from typing import NoReturn

from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig


@PreTrainedConfig.register_subclass("agra")
@dataclass
class AgraConfig(PreTrainedConfig):
    """Server or checkpoint of the policy, and how its observations are named here.

    `checkpoint` is a folder of `agra train` or `agra export`, or the name of a bundled policy. It is loaded into this
    process on `device`, and `server` is not used. Without it the policy is a client of `server`.

    `camera` names the camera, such as ego_view for `observation.images.ego_view`. Several, separated by commas, are
    those of `--data.camera` and `--data.extra-cameras` in training, in that order. None takes the only camera.
    `embodiment` is needed for a policy with several. `n_action_steps` actions of each chunk are executed, as
    `agra evaluate --execute-steps`. `seed` is the first episode's where the environment gives none, and each further
    episode adds one. `timeout` is in seconds. The server's key is read from the variable AGRA_API_KEY and is in no file.
    """

    server: str = "ws://127.0.0.1:8000"
    checkpoint: str | None = None
    camera: str | None = None
    embodiment: str | None = None
    n_action_steps: int = 8
    seed: int = 1000
    timeout: float = 10.0
    device: str | None = "cpu"  # of the checkpoint. A server has its own.
    push_to_hub: bool = False
    rtc_config: RTCConfig | None = None  # set by lerobot-rollout

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_action_steps < 1:
            raise ValueError(f"n_action_steps: expected at least 1, got {self.n_action_steps}")

    @property
    def source(self) -> str:
        """The checkpoint, or the server's address."""
        return self.checkpoint or self.server

    @property
    def observation_delta_indices(self) -> None:
        """None: one observation at a time."""

    @property
    def action_delta_indices(self) -> None:
        """None: not trained by LeRobot."""

    @property
    def reward_delta_indices(self) -> None:
        """None: no rewards."""

    def get_optimizer_preset(self) -> NoReturn:
        """Refuse training."""
        raise ValueError(
            "the policy agra is not trained by lerobot-train: "
            "run agra train RECIPE --data.path DATASET, which reads the same dataset, "
            "then agra serve its output or --policy.checkpoint=OUTPUT"
        )

    def get_scheduler_preset(self) -> None:
        """None: not trained by LeRobot."""

    def validate_features(self) -> None:
        """Check nothing: the widths are compared with the policy's, the camera is chosen at each request."""
