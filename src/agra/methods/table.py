"""The methods by `kind`: the only list of them."""

from agra.methods.diffusion_policy import DiffusionPolicyConfig
from agra.methods.method import MethodConfig
from agra.methods.wam import WAMMethodConfig

METHODS: dict[str, type[MethodConfig]] = {"wam": WAMMethodConfig, "diffusion_policy": DiffusionPolicyConfig}
"""`kind` to the class of a method's config. A method outside the package adds itself before its first config is read."""
