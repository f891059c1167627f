"""The methods by `kind`: the only list of them."""

from agra.methods.wam import WAMMethodConfig

AnyMethodConfig = WAMMethodConfig
METHODS: dict[str, type] = {"wam": WAMMethodConfig}
"""`kind` to the class of a method's config."""
