"""Layer studies (Figs. 10, 11): one training for every layer, in which that layer alone is aligned, or read.

Each variant is a run with its own folder. `study.json` lists them for the report. After an interruption the same
command continues: finished training, trials and diagnoses are not repeated.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from agra import files
from agra.config import RunConfig
from agra.diagnostics.report.study_section import STUDY
from agra.methods.wam import WAMMethodConfig

StudyTopic = Literal["alignment", "bridge"]


def variants(config: RunConfig, over: StudyTopic, layers: Sequence[int] | None = None) -> dict[str, RunConfig]:
    """The config of every variant by name, the baseline first. By default `layers` are all bridged layers.

    `alignment` compares no alignment with each layer aligned alone (Fig. 10). `bridge` compares the multi-layer bridge
    with bridges whose blocks all read the same layer (Fig. 11). Raises ValueError for a method that is no WAM, and for
    an alignment study of a stage or recipe that does not align.
    """
    method = config.method
    if not isinstance(method, WAMMethodConfig):
        raise ValueError(
            f"a layer study is not applicable to the method {method.kind}; it needs a WAM, such as the recipe tiny"
        )
    studied = sorted(set(method.model.bridge.layers if layers is None else layers))
    if over == "alignment":
        if method.alignment is None or not method.aligns:
            raise ValueError(
                "an alignment study needs a recipe and a stage that align, such as the recipe tiny at the joint stage"
            )
        alignment = method.alignment
        return {"without": replace(config, method=replace(method, alignment=None))} | {
            f"layer_{layer}": replace(config, method=replace(method, alignment=replace(alignment, layers=(layer,))))
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
    over: StudyTopic,
    output: Path,
    layers: Sequence[int] | None = None,
    train: Callable[[RunConfig, Path], bool],
    judge: Callable[[Path, str], object],
) -> Path:
    """Train and judge every variant in a folder under `output`. Returns `output`/study.json.

    `train` trains a config into a folder and returns False if it was stopped. `judge` evaluates and diagnoses a run,
    given its folder and name.
    """
    configs = variants(config, over, layers)
    output.mkdir(parents=True, exist_ok=True)
    for name, variant in configs.items():
        if not train(variant, output / name):
            raise KeyboardInterrupt  # stopped by SIGTERM, after its checkpoint was written
        judge(output / name, name)
    rows = [{"name": name, "layers": _changed(variant, over)} for name, variant in configs.items()]
    content = {"over": over, "steps": config.stage.steps, "stage": config.stage.name, "variants": rows}
    files.write_text(output / STUDY, json.dumps(content, indent=2) + "\n")
    return output / STUDY


def _changed(config: RunConfig, over: StudyTopic) -> list[int]:
    method = config.method
    assert isinstance(method, WAMMethodConfig)
    return sorted(set(method.model.bridge.layers)) if over == "bridge" else list(method.aligned_layers)
