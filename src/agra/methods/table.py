"""The only list of methods, by `kind`."""

from agra.methods.diffusion_policy import DiffusionPolicyConfig
from agra.methods.dit4dit import DiT4DiTConfig
from agra.methods.flare import FLAREConfig
from agra.methods.lda import LDAConfig
from agra.methods.method import MethodConfig
from agra.methods.uwm import UWMConfig
from agra.methods.vla import VLAConfig
from agra.methods.wam import WAMMethodConfig

METHODS: dict[str, type[MethodConfig]] = {
    "wam": WAMMethodConfig,
    "diffusion_policy": DiffusionPolicyConfig,
    "dit4dit": DiT4DiTConfig,
    "flare": FLAREConfig,
    "vla": VLAConfig,
    "uwm": UWMConfig,
    "lda_scratch": LDAConfig,
}
"""Config classes by `kind`. A method outside the package adds itself before its first config is read."""
