"""Pipelines: models whose stages are on different ranks, and the schedules of their work."""

from .execution.module import Pipeline
from .execution.split import ModelSplit, split_model
from .schedules.build import build, names
from .schedules.check import Verdict, check
from .schedules.schedule import Action, Kind, PipelineSchedule

__all__ = [
    "Action",
    "Kind",
    "ModelSplit",
    "Pipeline",
    "PipelineSchedule",
    "Verdict",
    "build",
    "check",
    "names",
    "split_model",
]
