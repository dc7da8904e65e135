"""Pipelines: models whose stages are on different ranks, and the schedules they go by."""

from .build import build, names
from .check import Verdict, check
from .module import Pipeline
from .schedule import Action, Kind, PipelineSchedule

__all__ = [
    "Action",
    "Kind",
    "Pipeline",
    "PipelineSchedule",
    "Verdict",
    "build",
    "check",
    "names",
]
