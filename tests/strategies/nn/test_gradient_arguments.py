"""Wrong arguments of modules and pullbacks: a loss, another shape, arrays that mean more than their numbers."""

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, FSDP, Pipeline, SyncBatchNorm2d, nn
from ferro_strategies import tensor_parallel as tp

X = np.ones((4, 6), np.float32)
IMAGE = np.ones((2, 3, 4, 4), np.float32)
INDICES = np.array([[0, 1], [1, 1]])
SEQUENCE = np.ones((2, 4, 6), np.float32)

MODULES = {
    "Linear": (lambda g: nn.Linear(6, 2), X),
    "ReLU": (lambda g: nn.ReLU(), X),
    "GELU": (lambda g: nn.GELU(), X),
    "SwiGLU": (lambda g: nn.SwiGLU(), X),
    "Softmax": (lambda g: nn.Softmax(), X),
    "Sigmoid": (lambda g: nn.Sigmoid(), X),
    "RMSNorm": (lambda g: nn.RMSNorm(6), X),
    "GroupNorm": (lambda g: nn.GroupNorm(2, 6), X),
    "Conv1d": (lambda g: nn.Conv1d(4, 2, 3), SEQUENCE),
    "ConvTranspose2d": (lambda g: nn.ConvTranspose2d(3, 2, 3), IMAGE),
    "AvgPool2d": (lambda g: nn.AvgPool2d(2), IMAGE),
    "AdaptiveAvgPool2d": (lambda g: nn.AdaptiveAvgPool2d(2), IMAGE),
    "AdaptiveMaxPool2d": (lambda g: nn.AdaptiveMaxPool2d(2), IMAGE),
    "CrossAttention": (lambda g: nn.CrossAttention(6, 2), (SEQUENCE, SEQUENCE)),
    "Flatten": (lambda g: nn.Flatten(), IMAGE),
    "Dropout": (lambda g: nn.Dropout(), X),
    "Dropout in evaluation": (lambda g: nn.Dropout().eval(), X),
    "BatchNorm": (lambda g: nn.BatchNorm(6), X),
    "LayerNorm": (lambda g: nn.LayerNorm(6), X),
    "Conv2d": (lambda g: nn.Conv2d(3, 2, 3), IMAGE),
    "MaxPool2d": (lambda g: nn.MaxPool2d(2), IMAGE),
    "Embedding": (lambda g: nn.Embedding(2, 3), INDICES),
    "Unembedding": (lambda g: nn.Unembedding(nn.Embedding(5, 6)), X),
    "Attention": (lambda g: nn.Attention(6, 2), SEQUENCE),
    "Checkpoint": (lambda g: nn.Checkpoint(nn.Linear(6, 2)), X),
    "Residual": (lambda g: nn.Residual(nn.Linear(6, 6)), X),
    "Sequential": (lambda g: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), X),
    "DDP": (lambda g: DDP(nn.Linear(6, 2), g), X),
    "FSDP": (lambda g: FSDP(nn.Sequential(nn.Linear(6, 2)), g), X),
    "SyncBatchNorm2d": (lambda g: SyncBatchNorm2d(3, g), IMAGE),
    "ColumnParallelLinear": (lambda g: tp.ColumnParallelLinear(6, 2, g), X),
    "ColumnParallelLinear, gathered": (lambda g: tp.ColumnParallelLinear(6, 2, g, gather_output=True), X),
    "RowParallelLinear": (lambda g: tp.RowParallelLinear(6, 2, g), X),
    "ParallelEmbedding": (lambda g: tp.ParallelEmbedding(2, 3, g), INDICES),
    "ParallelAttention": (lambda g: tp.ParallelAttention(6, 2, g), SEQUENCE),
    "CopyIn": (lambda g: tp.CopyIn(g), X),
    "ReduceOut": (lambda g: tp.ReduceOut(g), X),
    "GatherIn": (lambda g: tp.GatherIn(g), SEQUENCE),
}


@pytest.mark.parametrize(("make", "x"), MODULES.values(), ids=MODULES)
def test_a_pullback_refuses_all_but_the_gradient_of_its_output(make, x):
    def work(group):
        module = make(group)
        y, pullback = module.vjp(x)
        words = rf"pullback takes the gradient of the output, an array of shape \({y.shape[0]}, .*; "
        words += r"nn.cross_entropy returns \(loss, grad\). It got "
        for wrong, found in [
            (0.5, "a float"),
            (np.float32(0.5), "a float32"),
            ((0.5, np.ones_like(y)), "a tuple"),
            (None, "a NoneType"),
            (np.ones((7, *y.shape), np.float32), "an array of shape"),
            (np.ma.array(np.ones_like(y), mask=True), "a MaskedArray"),
            (np.ones(y.shape, int), "an array of int64, which would lose fractions"),
            (np.ones(y.shape, object), "an array of object, which are no numbers"),
            (np.ones((*y.shape[:-1], y.shape[-1] + 1), np.float32)[..., :1], "an array of shape"),
            (np.ones(y.shape[::-1], np.float32).T[..., None], "an array of shape"),
        ]:
            with pytest.raises(UsageError, match=words + found):
                pullback(wrong)
        assert all(parameter.grad is None for parameter in module.parameters())
        pullback(np.ones_like(y))  # the pullback was not used up

    ferro.simulate(work, 1)


REAL = ["ReLU", "GELU", "SwiGLU", "Softmax", "Sigmoid", "RMSNorm", "GroupNorm", "AvgPool2d", "AdaptiveAvgPool2d"]
REAL += ["AdaptiveMaxPool2d", "CrossAttention", "BatchNorm", "LayerNorm", "MaxPool2d", "Attention", "SyncBatchNorm2d"]


def test_layers_of_real_numbers_refuse_complex_gradients():
    def work(group):
        for make, x in (MODULES[name] for name in REAL):
            module = make(group)
            y, pullback = module.vjp(x)
            with pytest.raises(UsageError, match="an array of complex64, whose imaginary part would be lost"):
                pullback(y * 1j)
            pullback(np.ones_like(y))

    ferro.simulate(work, 1)


def test_a_pipeline_says_what_its_loss_must_return():
    def work(group):
        with pytest.raises(
            UsageError, match=r"must return \(loss, grad\), as nn.cross_entropy does; it returned a float"
        ):
            Pipeline([nn.Linear(6, 2)], group, microbatches=1).step(X, X[:, :2], lambda y, target: 0.5)
        with pytest.raises(UsageError, match="the loss function: pullback takes the gradient"):
            Pipeline([nn.Linear(6, 2)], group, microbatches=1).step(X, X[:, :2], lambda y, target: (0.5, 0.5))

    ferro.simulate(work, 1)


@pytest.mark.parametrize("wrong", [np.ma.array(X, mask=X > 2), X.view(np.matrix)], ids=["masked", "matrix"])
def test_arrays_that_mean_more_than_their_numbers_are_no_inputs(wrong):
    for module in (
        nn.Linear(6, 2),
        nn.ReLU(),
        nn.GELU(),
        nn.LayerNorm(6),
        nn.BatchNorm(6),
        nn.Dropout().eval(),
        nn.Flatten(),
    ):
        with pytest.raises(UsageError, match="expected a plain array, got a"):
            module.vjp(wrong)
    for x, target in ((wrong, X), (X, wrong)):
        with pytest.raises(UsageError, match="expected a plain array, got a"):
            nn.mse_loss(x, target)
    with pytest.raises(UsageError, match="expected a plain array, got a"):
        nn.cross_entropy(X, np.ma.array([0, 1, 0, 1], mask=[0, 0, 1, 0]))
    with pytest.raises(UsageError, match="expected a plain array, got a"):
        nn.cross_entropy(X, [0, 1, 0, 1], weight=np.ma.array([1.0] * 6, mask=[0, 0, 1, 0, 0, 0]))
    with pytest.raises(UsageError, match="expected a plain array, got a"):
        nn.Parameter(wrong)


def test_an_infinite_gradient_passes_only_where_there_is_a_way():
    infinite = np.array([np.inf, np.inf, np.nan, 1.0])
    np.testing.assert_array_equal(nn.ReLU().vjp(np.array([-1.0, 1.0, 0.0, np.nan]))[1](infinite), [0, np.inf, 0, 1])
    pooled = nn.MaxPool2d(2).vjp(np.arange(4.0).reshape(1, 1, 2, 2))[1](np.full((1, 1, 1, 1), np.inf))
    np.testing.assert_array_equal(pooled.ravel(), [0, 0, 0, np.inf])
    dropout = nn.Dropout(0.5, rng=0)
    y, pullback = dropout.vjp(np.full(100, np.inf))
    assert set(y.tolist()) == set(pullback(np.full(100, np.inf)).tolist()) == {0.0, np.inf}


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64])
def test_numbers_that_a_layer_has_no_meaning_for_are_refused(dtype):
    rows, images = np.ones((4, 6), dtype), np.ones((1, 2, 4, 4), dtype)
    plain = (nn.LayerNorm(6, elementwise_affine=False), nn.RMSNorm(6, elementwise_affine=False))
    for layer in (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.SwiGLU(), nn.Sigmoid(), nn.Tanh(), nn.Softmax(), *plain):
        with pytest.raises(UsageError, match="must be of real floating-point numbers, got"):
            layer.vjp(rows)
    for layer in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.BatchNorm(2)):
        with pytest.raises(UsageError, match="must be of real floating-point numbers, got"):
            layer.vjp(images)
    if dtype != np.complex64:
        with pytest.raises(UsageError, match="must be of real floating-point numbers, got"):
            nn.Dropout().vjp(rows)
    for loss in (nn.cross_entropy, nn.nll_loss):
        with pytest.raises(UsageError, match="logits must be of real floating-point numbers, got"):
            loss(rows, [0, 0, 0, 0])
    losses = (nn.l1_loss, nn.smooth_l1_loss, nn.binary_cross_entropy_with_logits)
    for loss in losses if dtype == np.complex64 else (nn.mse_loss, *losses):
        with pytest.raises(UsageError, match="prediction must be of real floating-point numbers, got"):
            loss(rows, rows)


def test_norms_and_attention_refuse_complex_parameters():
    for make in (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, lambda n, **o: nn.GroupNorm(1, n, **o)):
        with pytest.raises(UsageError, match="dtype must be of real floating-point numbers, got complex64"):
            make(4, dtype=np.complex64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 3.0), "Conv2d: kernel_size must be a whole number, got 3.0"),
        (lambda: nn.Conv2d(1, 1, (3, 5, 7)), r"kernel_size must be one whole number or 2 of them, got \(3, 5, 7\)"),
        (lambda: nn.Conv2d(1, 1, 3, padding=-1), "Conv2d: padding must be at least 0, got -1"),
        (lambda: nn.Conv2d(1, 1, 3, stride=[1]), r"stride must be one whole number or 2 of them, got \[1\]"),
        (lambda: nn.Conv2d(3, 4, 1, groups=2), "groups must divide in_channels and out_channels, got 2, 3 and 4"),
        (lambda: nn.Conv1d(1, 1, (3, 3)), r"Conv1d: kernel_size must be one whole number or 1 of them"),
        (lambda: nn.ConvTranspose2d(1, 1, 3, 2, output_padding=2), "output_padding must be less than stride"),
        (lambda: nn.MaxPool2d(2, padding=2), "padding must be at most half of the kernel's size"),
        (lambda: nn.LayerNorm(()), r"normalized_shape must have at least one size, got \(\)"),
        (lambda: nn.LayerNorm("4"), "normalized_shape must be a whole number, got '4'"),
        (lambda: nn.Linear(3.5, 2), "Linear: in_features must be a whole number, got 3.5"),
        (lambda: nn.Linear(3, 0), "Linear: out_features must be at least 1, got 0"),
        (lambda: nn.Embedding(3, 2, padding_idx=3), "padding_idx must be from -3 to 2, got 3"),
        (lambda: nn.GroupNorm(4, 6), "num_channels must be a multiple of num_groups, got 6 and 4"),
    ],
)
def test_sizes_that_are_none_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_sizes_may_be_numpy_integers_and_lists():
    n = np.int64
    assert repr(nn.Conv2d(n(1), n(2), n(3), [1, n(2)])) == repr(nn.Conv2d(1, 2, 3, (1, 2)))
    assert repr(nn.MaxPool2d(np.array([2, 3]))) == repr(nn.MaxPool2d((2, 3)))
    assert nn.LayerNorm(n(4)).normalized_shape == nn.LayerNorm([4]).normalized_shape == (4,)
    assert repr(nn.Linear(n(3), n(4))) == "Linear(3, 4, bias=True)"
    assert repr(nn.Attention(n(4), n(2))) == repr(nn.Attention(4, 2))


def test_the_row_of_padding_stays_as_it_is():
    table = nn.Embedding(4, 2, padding_idx=-1, rng=0)
    assert table.padding_idx == 3
    assert not table.weight.data[3].any()
    y, pullback = table.vjp(np.array([3, 0, 3, 0]))
    pullback(np.ones_like(y))
    np.testing.assert_array_equal(table.weight.grad, [[2, 2], [0, 0], [0, 0], [0, 0]])


def test_the_row_of_padding_stays_as_it_is_where_rows_are_divided():
    def work(group):
        table = tp.ParallelEmbedding.from_serial(nn.Embedding(4, 2, padding_idx=2, rng=0), group)
        y, pullback = table.vjp(np.array([2, 3, 0]))
        pullback(np.ones_like(y))
        return table.weight.grad[:, 0].tolist()

    assert ferro.simulate(work, 2) == [[1, 0], [0, 1]]
