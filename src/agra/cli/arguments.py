"""Command-line parsing: flags from the parameters of functions, from options classes, and from a recipe's config."""

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from agra.cli.renamed import check_renamed

if TYPE_CHECKING:
    from agra.config import RunConfig

Command = Callable[[list[str]], None]


def command(function: Callable[..., None]) -> Command:
    """Make a command whose flags are the function's parameters."""
    name = function.__name__.replace("_", "-")

    def run(arguments: list[str]) -> None:
        check_renamed(name, arguments)
        call = tyro.cli(_deferred(function), args=arguments, prog=f"agra {name}")
        call()

    run.__doc__ = function.__doc__
    return run


def recipe_arguments(name: str, arguments: list[str], options: type) -> tuple:
    """Parse RECIPE, --stage NAME, --with PRESET ..., the `options`, and every field of the config as a flag.

    Returns the options and the `RunConfig`.
    """
    from agra.recipes import PRESETS, RECIPES, compose
    from agra.stages import Stage

    if not arguments or arguments[0].startswith("-"):
        print(
            f"usage: agra {name} RECIPE [--stage {{{','.join(Stage)}}}] [--with PRESET ...] [flags]; "
            f"recipes: {', '.join(RECIPES)}; presets: {', '.join(PRESETS)} (`agra recipes` describes them); "
            f"`agra {name} RECIPE --help` lists the flags"
        )
        raise SystemExit(0 if "-h" in arguments or "--help" in arguments else 2)
    recipe, *rest = arguments
    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, RECIPES))
    check_renamed(name, rest)
    stages, rest = _take("--stage", rest)
    presets, rest = _take("--with", rest)
    for kind, values, choices in (("stage", stages, list(Stage)), ("preset", presets, PRESETS)):
        for value in values:
            if value not in choices:
                raise ValueError(unknown(kind, value, choices))
    config = compose(recipe, Stage(stages[-1]) if stages else Stage.JOINT, presets)
    return _parse(f"agra {name} {recipe}", config, rest, options)


def with_data(config: "RunConfig", arguments: Sequence[str], mixture: Path | None) -> "RunConfig":
    """Fit the config to its dataset, or replace its dataset by those that a JSON file lists.

    Prints the settings that the dataset determines. `--data.embodiments` among the `arguments` is kept. Raises
    ValueError for flags of a single dataset beside a mixture.
    """
    if mixture is not None:
        from agra.config import read_mixture

        config = replace(config, data=replace(config.data, mixture=read_mixture(mixture)))
    if config.data.mixture:
        _check_mixture_flags(arguments)
        return config
    from agra.data.fit import fit_to_dataset

    named = any(argument.split("=")[0] == "--data.embodiments" for argument in arguments)
    fit = fit_to_dataset(config.method, config.data, keep_embodiments=named)
    if fit.changes:
        print(f"{config.data.path}: {', '.join(fit.changes)}", file=sys.stderr)
    return replace(config, method=fit.method, data=fit.data)


def _check_mixture_flags(arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag that sets a field of a single dataset, which a mixture does not read."""
    from agra.data.config import SourceConfig

    of_a_source = {field.name for field in fields(SourceConfig)} - {"path"}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--data.") and flag.removeprefix("--data.").replace("-", "_") in of_a_source:
            raise ValueError(
                f"{flag}: sets a single dataset, but each source of a mixture has its own settings; set it for the sources"
                " in the file of --mixture"
            )


def use_threads(threads: int | None) -> None:
    """Set torch's number of threads. None changes nothing and does not import torch."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def unknown(kind: str, name: str, choices: Sequence[str] | dict) -> str:
    """Write the error message for a name that is not among the choices."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f"unknown {kind} {name!r}; did you mean {close[0]!r}? Available: {', '.join(names)}"


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Wrap `function` to return its call instead of making it, so that tyro handles errors of parsing alone."""

    @wraps(function)
    def later(*arguments: Any, **options: Any) -> Callable[[], None]:
        return partial(function, *arguments, **options)

    return later


def _take(flag: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split off the values of every `flag`: FLAG=VALUE, or those up to the next flag. Returns them and the others."""
    values, others, start = [], [], 0
    while start < len(arguments):
        argument, start = arguments[start], start + 1
        if argument == flag:
            end = next((i for i in range(start, len(arguments)) if arguments[i].startswith("-")), len(arguments))
            values += arguments[start:end] or [""]
            start = end
        elif argument.startswith(f"{flag}="):
            values.append(argument.removeprefix(f"{flag}="))
        else:
            others.append(argument)
    return values, others


def _parse(program: str, config: "RunConfig", rest: list[str], options: type) -> tuple:
    from agra.config import RunConfig

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        run: Annotated[options, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: config)

    settings = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    parsed = tyro.cli(Arguments, args=rest, prog=program, config=settings)
    return parsed.run, parsed.config
