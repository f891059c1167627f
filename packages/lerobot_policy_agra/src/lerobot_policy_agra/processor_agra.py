"""Pre- and post-processing: batches and devices only, because the server normalises."""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

from lerobot_policy_agra.configuration_agra import AgraConfig


def make_agra_pre_post_processors(config: AgraConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """The two pipelines. They have the steps that LeRobot overrides by name, and use no statistics."""
    steps = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device or "cpu"),
    ]
    before = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](steps=steps, name="policy_preprocessor")
    after = PolicyProcessorPipeline(
        steps=[DeviceProcessorStep(device="cpu")],
        name="policy_postprocessor",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
