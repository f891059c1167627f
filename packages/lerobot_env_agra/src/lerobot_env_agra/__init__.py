"""LeRobot environment `agra_tabletop`. LeRobot imports this module, which registers it and loads no simulator."""

from lerobot_env_agra.configuration import AgraTabletopConfig as AgraTabletopConfig
