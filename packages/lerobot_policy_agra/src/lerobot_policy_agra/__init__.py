"""LeRobot policy `agra`: a client of `agra serve`. LeRobot imports this module, which registers the policy."""

from lerobot_policy_agra.configuration_agra import AgraConfig as AgraConfig
