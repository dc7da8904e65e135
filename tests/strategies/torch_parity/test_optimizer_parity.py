"""Optimizers, schedules, clipping and averages follow those of torch, with groups and decay."""

import math

import numpy as np
import pytest

from ferro_strategies import optim
from ferro_strategies.nn import Parameter

torch = pytest.importorskip("torch")

STEPS = 25
CASES = [
    ("SGD", {"lr": 0.1}, {"weight_decay": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True}, {"weight_decay": 0.2}),
    ("AdamW", {"lr": 0.02}, {"weight_decay": 0.3, "betas": (0.5, 0.9)}),
    ("Adam", {"lr": 0.02, "eps": 1e-4}, {"weight_decay": 0.3, "lr": 0.05}),
    ("Adagrad", {"lr": 0.1}, {"weight_decay": 0.1, "lr_decay": 0.01}),
    ("Adafactor", {"lr": 0.05}, {"weight_decay": 0.1, "d": 0.5, "beta2_decay": -0.6}),
    ("Muon", {"lr": 0.05}, {"momentum": 0.8, "nesterov": False, "weight_decay": 0.3}),
]
SHAPES = [(5, 3), (3, 7), (6,)]
TOLERANCE = {np.float32: {"rtol": 3e-5, "atol": 3e-6}, np.float64: {"rtol": 1e-10, "atol": 1e-12}}


def pair(values):
    """Make a parameter of ours and one of torch's for each value."""
    ours = [Parameter(value.copy()) for value in values]
    return ours, [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in values]


def run(ours, theirs, optimizer, other, rng, steps=STEPS, after=lambda: None):
    for _ in range(steps):
        for mine, torchs in zip(ours, theirs, strict=True):
            grad = rng.standard_normal(mine.data.shape).astype(mine.data.dtype)
            mine.grad, torchs.grad = grad, torch.from_numpy(grad.copy())
        optimizer.step()
        other.step()
        after()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "options", "of_second_group"), CASES)
def test_optimizers_follow_torch(monkeypatch, name, options, of_second_group, dtype):
    rng = np.random.default_rng(0)
    shapes = [shape for shape in SHAPES if name != "Muon" or len(shape) == 2]
    ours, theirs = pair([rng.standard_normal(shape).astype(dtype) for shape in shapes])
    groups = [{"params": ours[:1]}, {"params": ours[1:], **of_second_group}]
    optimizer = getattr(optim, name)(groups, **options)
    if name == "Muon":
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # torch rounds the matrices so
        theirs = [torch.nn.Parameter(each.detach().T.contiguous()) for each in theirs]  # weights are transposed there
    other = getattr(torch.optim, name)([{"params": theirs[:1]}, {"params": theirs[1:], **of_second_group}], **options)
    for _ in range(STEPS):
        for mine, torchs in zip(ours, theirs, strict=True):
            mine.grad = rng.standard_normal(mine.data.shape).astype(dtype)
            grad = torch.from_numpy(mine.grad.copy())
            torchs.grad = grad.T.contiguous() if name == "Muon" else grad
        optimizer.step()
        other.step()
    for mine, torchs in zip(ours, theirs, strict=True):
        expected = torchs.detach().numpy()
        np.testing.assert_allclose(mine.data, expected.T if name == "Muon" else expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam", "Adagrad"])
def test_complex_numbers_are_two_real_ones_as_in_torch(name):
    rng = np.random.default_rng(0)
    value = rng.standard_normal((3, 2)) + 1j * rng.standard_normal((3, 2))
    ours, theirs = pair([value])
    options = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    optimizer, other = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for _ in range(STEPS):
        ours[0].grad = rng.standard_normal((3, 2)) + 1j * rng.standard_normal((3, 2))
        theirs[0].grad = torch.from_numpy(ours[0].grad.copy())
        optimizer.step()
        other.step()
    np.testing.assert_allclose(ours[0].data, theirs[0].detach().numpy(), rtol=1e-10)


def schedules(other):
    scheduler = torch.optim.lr_scheduler
    warm_up = scheduler.LinearLR(other, start_factor=0.1, total_iters=5)
    cosine = scheduler.CosineAnnealingLR(other, 20, eta_min=0.0)
    return scheduler.SequentialLR(other, [warm_up, cosine], [5])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optim.CosineSchedule(20), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
        (
            optim.LinearSchedule(10, start=0.2, end=0.9),
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.2, 0.9, total_iters=10),
        ),
        (optim.StepSchedule(7, 0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5)),
        (optim.StepSchedule([3, 11], 0.2), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 11], 0.2)),
        (
            optim.OneCycleSchedule(21),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(
                o, [group["lr"] for group in o.param_groups], total_steps=21, cycle_momentum=False
            ),
        ),
        (optim.WarmUpSchedule(5, optim.CosineSchedule(20), start=0.1), schedules),
        (optim.ChainedSchedule([(optim.LinearSchedule(5, 0.1, 1.0), 5), (optim.CosineSchedule(20), None)]), schedules),
    ],
)
def test_schedules_follow_torch(ours, theirs):
    mine, torchs = pair([np.ones(2), np.ones(3)])
    optimizer = optim.SGD([{"params": mine[:1]}, {"params": mine[1:], "lr": 0.02}], lr=0.5)
    other = torch.optim.SGD([{"params": torchs[:1]}, {"params": torchs[1:], "lr": 0.02}], lr=0.5)
    optimizer.follow(ours)
    scheduler = theirs(other)
    found, expected = [optimizer.lrs], [[group["lr"] for group in other.param_groups]]

    def after():
        scheduler.step()
        found.append(optimizer.lrs)
        expected.append([group["lr"] for group in other.param_groups])

    run(mine, torchs, optimizer, other, np.random.default_rng(0), steps=20, after=after)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(mine[0].data, torchs[0].detach().numpy(), rtol=1e-10)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_norms_and_clipping_follow_torch(norm_type, dtype):
    rng = np.random.default_rng(0)
    ours, theirs = pair([rng.standard_normal(shape).astype(dtype) for shape in SHAPES])
    for mine, torchs in zip(ours, theirs, strict=True):
        grad = rng.standard_normal(mine.data.shape).astype(dtype)
        grad += 1j * rng.standard_normal(mine.data.shape) if dtype == np.complex128 else 0
        mine.grad, torchs.grad = grad, torch.from_numpy(grad.copy())
    norm = optim.clip_grad_norm(ours, 1.5, norm_type)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 1.5, norm_type)), rel=1e-12)
    for mine, torchs in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, torchs.grad.numpy(), rtol=2e-6)  # torch adds 1e-6 to the norm
    if dtype == np.float64:
        optim.clip_grad_value(ours, 0.1)
        torch.nn.utils.clip_grad_value_(theirs, 0.1)
        np.testing.assert_allclose(ours[0].grad, theirs[0].grad.numpy(), rtol=2e-6)


def test_averages_follow_torch():
    rng = np.random.default_rng(0)
    ours, theirs = pair([rng.standard_normal((3, 4))])
    ema = optim.EMA(ours, decay=0.9)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    means = [theirs[0].detach().clone()]
    for _ in range(STEPS):
        ours[0].data[...] = rng.standard_normal((3, 4))
        average(means, [torch.from_numpy(ours[0].data.copy())], 0)
        ema.update()
    np.testing.assert_allclose(ema.state[0]["average"], means[0].numpy(), rtol=1e-12)
