"""RunConfig: the whole description of a training run, and its JSON."""

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import cattrs
from cattrs.preconf.json import make_converter

from agra.alignment.loss import AlignmentConfig
from agra.data.mixture import DataConfig
from agra.data.source import SourceConfig
from agra.diagnostics.grounding_monitor import MonitorConfig
from agra.diagnostics.looking import TargetConfig
from agra.training.stages import StageConfig
from agra.wam.model import WAMConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Model, alignment, data and stage. A recipe makes one, the command line changes it, a checkpoint keeps it."""

    model: WAMConfig = field(default_factory=WAMConfig)
    alignment: AlignmentConfig | None = field(default_factory=AlignmentConfig)
    """None is the baseline WAM: no alignment, no teacher."""
    data: DataConfig
    stage: StageConfig = field(default_factory=StageConfig)
    looking: TargetConfig | None = None
    """Which actions make the target that `diagnostics.looking` follows, in training as well; None leaves it out."""

    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Grounding measured during training, on probe samples."""

    def __post_init__(self) -> None:
        if self.alignment is not None:
            outside = [x for x in self.alignment.layers if not 0 <= x < self.model.video_dit.num_layers]
            if outside:
                raise ValueError(f"alignment.layers: expected 0..{self.model.video_dit.num_layers - 1}, got {outside}")
        if len(self.data.embodiments) > self.model.action_dit.num_embodiments:
            raise ValueError(
                f"model.action_dit.num_embodiments: {self.model.action_dit.num_embodiments} rows for the "
                f"embodiments {self.data.embodiments}"
            )

    @property
    def aligns(self) -> bool:
        """Whether this stage computes the alignment loss and so needs teacher targets."""
        return self.alignment is not None and self.stage.objective.alignment_weight > 0

    def to_json(self) -> str:
        """The resolved config, every field spelled out."""
        return json.dumps(_converter.unstructure(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path = "config") -> "RunConfig":
        """Inverse of `to_json`. An unknown, missing or ill-typed key raises ValueError naming it and `source`."""
        try:
            return _converter.structure(json.loads(text), cls)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not JSON ({error})") from error
        except cattrs.BaseValidationError as error:
            problem = cattrs.transform_error(error, path="config")[0]
            raise ValueError(f"{source}: {problem}{_suggestion(error)}") from error


def read_mixture(path: Path) -> tuple[SourceConfig, ...]:
    """A JSON list of sources, each an object of the fields that it sets. Raises as `RunConfig.from_json` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should list the datasets to mix")
    try:
        return _converter.structure(json.loads(path.read_text(encoding="utf-8")), tuple[SourceConfig, ...])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    except cattrs.BaseValidationError as error:
        raise ValueError(f"{path}: {cattrs.transform_error(error, path='source')[0]}{_suggestion(error)}") from error


_converter = make_converter(forbid_extra_keys=True, detailed_validation=True)


def _suggestion(error: BaseException) -> str:
    """The known key closest to the first unknown one."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [f.name for f in fields(error.cl)]
        close = difflib.get_close_matches(sorted(error.extra_fields)[0], known, n=1, cutoff=0)
        return f"; the closest known key is {close[0]!r}"
    inner: tuple[Any, ...] = getattr(error, "exceptions", ())
    return next((found for e in inner if (found := _suggestion(e))), "")
