"""Optimizers that work in place on `ferro_strategies.nn` parameters."""

from .adagrad import Adagrad
from .adamw import Adam, AdamW
from .clip import clip_grad_norm, clip_grad_value, grad_norm
from .groups import ParameterGroup
from .lion import Lion
from .loss_scaler import LossScaler
from .optimizer import Optimizer
from .schedules import (
    ChainedSchedule,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    OneCycleSchedule,
    StepSchedule,
    WarmUpSchedule,
)
from .sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "ChainedSchedule",
    "ConstantSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "Lion",
    "LossScaler",
    "OneCycleSchedule",
    "Optimizer",
    "ParameterGroup",
    "StepSchedule",
    "WarmUpSchedule",
    "clip_grad_norm",
    "clip_grad_value",
    "grad_norm",
]
