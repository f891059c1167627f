"""Layer studies: the same training once for every layer that is aligned alone, or read alone (Figs. 10, 11).

Each variant is a run with a folder of its own. `study.json` lists them for the report. After an interruption the same command
continues: a finished stage, finished trials and a finished diagnosis are not repeated.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from agra import files
from agra.config import RunConfig
from agra.diagnostics.report.study import STUDY
from agra.methods.wam import WAMMethodConfig

Over = Literal["alignment", "bridge"]


def variants(config: RunConfig, over: Over, layers: Sequence[int] | None = None) -> dict[str, RunConfig]:
    """The config of every variant by name, the one without the change first. By default all bridged layers.

    `alignment`: no layer, then each layer aligned alone (Fig. 10). `bridge`: the multi-layer bridge, then one whose blocks
    all read the same layer (Fig. 11). Raises ValueError where the method is no WAM, or aligns nothing in this stage.
    """
    method = config.method
    if not isinstance(method, WAMMethodConfig):
        raise ValueError(f"a layer study needs a WAM, got the method {method.kind}")
    studied = sorted(set(method.model.bridge.layers if layers is None else layers))
    if over == "alignment":
        if method.alignment is None or not method.aligns:
            raise ValueError(
                "an alignment study needs a recipe and a stage that align; take `tiny` and the joint stage"
            )
        alignment = method.alignment
        return {"without": replace(config, method=replace(method, alignment=None))} | {
            f"layer_{layer}": replace(
                config, method=replace(method, alignment=replace(alignment, layers=(layer,)))
            )
            for layer in studied
        }
    model, blocks = method.model, method.model.action_dit.num_blocks
    return {"all_layers": config} | {
        f"layer_{layer}": replace(
            config,
            method=replace(method, model=replace(model, bridge=replace(model.bridge, layers=(layer,) * blocks))),
        )
        for layer in studied
    }


def study(
    config: RunConfig,
    *,
    over: Over,
    output: Path,
    layers: Sequence[int] | None = None,
    train: Callable[[RunConfig, Path], bool],
    judge: Callable[[Path, str], object],
) -> Path:
    """Train and judge every variant in a folder under `output`. Returns `output`/study.json.

    `train` trains a config into a folder and returns False where it was stopped. `judge` evaluates and diagnoses a run by
    its folder and name.
    """
    configs = variants(config, over, layers)
    output.mkdir(parents=True, exist_ok=True)
    for name, variant in configs.items():
        if not train(variant, output / name):
            raise KeyboardInterrupt  # SIGTERM, and the checkpoint is written
        judge(output / name, name)
    rows = [{"name": name, "layers": _changed(variant, over)} for name, variant in configs.items()]
    content = {"over": over, "steps": config.stage.steps, "stage": config.stage.name, "variants": rows}
    files.write_text(output / STUDY, json.dumps(content, indent=2) + "\n")
    return output / STUDY


def _changed(config: RunConfig, over: Over) -> list[int]:
    method = config.method
    assert isinstance(method, WAMMethodConfig)
    return sorted(set(method.model.bridge.layers)) if over == "bridge" else list(method.aligned_layers)
