"""The checks for strategies: ferro's own pass them, and a strategy that is wrong in one way fails a check."""

import numpy as np
import pytest

from ferro import ProcessGroup
from ferro_strategies import DDP, FSDP, nn, optim
from ferro_testing.strategies import CHECKS, StrategyCase, check_failure, check_parity, check_uneven_batches

RNG = np.random.default_rng(3)
BATCHES = [(RNG.standard_normal((12, 3)), RNG.integers(0, 2, 12)) for _ in range(3)]


def small_model():
    return nn.Sequential(nn.Linear(3, 5, dtype=np.float64, rng=0), nn.ReLU(), nn.Linear(5, 2, dtype=np.float64, rng=1))


def steps(trained, shares):
    optimizer = optim.SGD(trained.parameters(), lr=0.1)
    for (x, labels), weight in shares:
        logits, pullback = trained.vjp(x)
        pullback(nn.cross_entropy(logits, labels)[1] * weight)
        optimizer.step()
        optimizer.zero_grad()


def case_of(wrap, state=lambda trained: {name: it.data.copy() for name, it in trained.named_parameters()}, **settings):
    def train(group: ProcessGroup | None, shares):
        model = small_model()
        if group is None:
            steps(model, shares)
            return {name: it.data.copy() for name, it in model.named_parameters()}
        trained = wrap(model, group)
        steps(trained, shares)
        return state(trained)

    return StrategyCase(train=train, batches=BATCHES, **settings)


def of_ddp(trained):
    return {name: it.data.copy() for name, it in trained.module.named_parameters()}


OWN = {"ddp": case_of(DDP, of_ddp), "fsdp": case_of(FSDP, lambda trained: trained.full_state_dict())}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("strategy", OWN)
def test_the_strategies_of_ferro_pass(strategy, check):
    check(OWN[strategy])


class Replica(nn.Module):
    """A replica that may forget to average, or to say that it cannot."""

    def __init__(self, module, group, average, swallow=False):
        self.module, self.group, self.average, self.swallow = module, group, average, swallow

    def vjp(self, x):
        output, pullback = self.module.vjp(x)

        def averaging(grad):
            grad = pullback(grad)
            for parameter in self.module.parameters():
                try:
                    self.average(self.group, parameter.grad)
                except Exception:
                    if not self.swallow:
                        raise
            return grad

        return output, averaging


def mean(group, grad):
    group.all_reduce(grad, "mean", out=grad)


@pytest.mark.parametrize(
    ("average", "check", "said"),
    [
        (lambda group, grad: None, check_parity, "parameters differ from one process"),
        (lambda group, grad: group.all_reduce(grad, "sum", out=grad), check_parity, "parameters differ from one"),
        (
            lambda group, grad: group.all_reduce(grad / max(1, group.rank), "mean", out=grad),
            check_uneven_batches,
            "parameters differ from one",
        ),
    ],
)
def test_gradients_that_are_not_averaged_are_found(average, check, said):
    with pytest.raises(AssertionError, match=said) as caught:
        check(case_of(lambda module, group: Replica(module, group, average), of_ddp))
    assert "samples of each batch" in caught.value.__notes__[-1]


def test_ranks_that_go_on_alone_are_found():
    lonely = case_of(lambda module, group: Replica(module, group, mean, swallow=True), of_ddp)
    with pytest.raises(AssertionError, match=r"rank 0 of 2 failed between two batches, and rank 1 trained on as if"):
        check_failure(lonely)


def test_a_case_that_would_show_nothing_is_refused():
    with pytest.raises(AssertionError, match="every parameter's size is a multiple of 2"):
        check_parity(StrategyCase(train=lambda group, shares: {"w": np.ones(6) * len(list(shares))}, batches=BATCHES))
    with pytest.raises(AssertionError, match="one process does not train w: nothing can be compared"):
        check_parity(StrategyCase(train=lambda group, shares: {"w": np.ones(5)}, batches=BATCHES))
