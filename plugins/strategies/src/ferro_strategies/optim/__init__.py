"""Optimizers that work in place on `ferro_strategies.nn` parameters."""

from .adafactor import Adafactor
from .adagrad import Adagrad
from .adamw import Adam, AdamW
from .clip import clip_grad_norm, clip_grad_value, grad_norm
from .decay import decay_groups, matrices_and_others
from .ema import EMA
from .groups import ParameterGroup
from .lion import Lion
from .loss_scaler import LossScaler
from .muon import Muon
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
    "EMA",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "ChainedSchedule",
    "ConstantSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "Lion",
    "LossScaler",
    "Muon",
    "OneCycleSchedule",
    "Optimizer",
    "ParameterGroup",
    "StepSchedule",
    "WarmUpSchedule",
    "clip_grad_norm",
    "clip_grad_value",
    "decay_groups",
    "grad_norm",
    "matrices_and_others",
]
