"""A training that was saved and goes on computes the same bits as one that was never interrupted."""

import io
import json

import numpy as np
import pytest

import ferro
from ferro import UsageError
from ferro_strategies import DDP, ShardedSampler, hooks, nn
from ferro_strategies.optim import SGD

DATA = np.random.default_rng(0).standard_normal((45, 24)).astype(np.float32)
LABELS = (DATA.sum(axis=1) > 0).astype(np.int64)


class Training:
    """A model with Dropout, BatchNorm and a compressing hook, its optimizer and its sampler."""

    def __init__(self, group):
        self.net = nn.Sequential(
            nn.Linear(24, 24, rng=0),
            nn.BatchNorm(24),
            nn.Checkpoint(nn.Sequential(nn.ReLU(), nn.Dropout(0.5, rng=group.rank))),
            nn.Linear(24, 2, rng=1),
            nn.Dropout(0.1),  # a seed of its own
        )
        self.group = group
        self.hook = hooks.PowerSGD(rank=2, warm_start=False)
        self.optimizer = SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.sampler = ShardedSampler(len(DATA), group, drop_last=True)

    def run(self, steps):
        model = DDP(self.net, self.group, hook=self.hook)
        for epoch in range(self.sampler.epoch, 1000):
            self.sampler.set_epoch(epoch)
            for rows in self.sampler.batches(4):  # six batches an epoch
                logits, pullback = model.vjp(DATA[rows])
                pullback(nn.cross_entropy(logits, LABELS[rows])[1])
                self.optimizer.step()
                self.optimizer.zero_grad()
                steps -= 1
                if steps == 0:
                    return

    def saved(self):
        """Return everything as bytes, as files would hold it."""
        arrays = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        arrays["hook"] = self.hook.state_dict()
        files = {}
        for name, state in arrays.items():
            file = io.BytesIO()
            np.savez(file, **state)
            files[name] = file.getvalue()
        plain = {"generators": self.net.generator_state_dict(), "sampler": self.sampler.state_dict()}
        return files, json.dumps(plain)

    def load(self, files, plain):
        states = {name: dict(np.load(io.BytesIO(data))) for name, data in files.items()}
        self.net.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.hook.load_state_dict(states["hook"])
        plain = json.loads(plain)
        self.net.load_generator_state_dict(plain["generators"])
        self.sampler.load_state_dict(plain["sampler"])


@pytest.mark.parametrize("first", [4, 6, 9])  # in an epoch, at its end, in the next one
def test_a_training_goes_on_bit_for_bit(first):
    def work(group):
        whole = Training(group)
        begun = whole.saved()
        whole.run(10)
        interrupted = Training(group)
        interrupted.load(*begun)  # since one layer has a random seed
        interrupted.run(first)
        resumed = Training(group)
        resumed.load(*interrupted.saved())
        resumed.run(10 - first)
        return whole.saved(), resumed.saved()

    for whole, resumed in ferro.simulate(work, 2):
        assert whole[1] == resumed[1]
        for name, data in whole[0].items():
            expected, found = dict(np.load(io.BytesIO(data))), dict(np.load(io.BytesIO(resumed[0][name])))
            assert expected.keys() == found.keys()
            assert all(expected[key].tobytes() == found[key].tobytes() for key in expected), name


def test_generators_have_qualified_names_and_are_checked():
    shared = np.random.default_rng(1)
    net = nn.Sequential(nn.Dropout(rng=shared), nn.Residual(nn.Dropout(rng=shared)), nn.Dropout(rng=2))
    state = net.generator_state_dict()
    assert list(state) == ["layers.0.rng", "layers.2.rng"]
    with pytest.raises(UsageError, match=r"missing 'layers.2.rng'; unexpected 'x'. Nothing was loaded"):
        net.load_generator_state_dict({"layers.0.rng": state["layers.0.rng"], "x": state["layers.2.rng"]})
    philox = nn.Dropout(rng=np.random.Generator(np.random.Philox(1))).generator_state_dict()["rng"]
    with pytest.raises(UsageError, match=r"'layers.0.rng' is a PCG64, given a Philox"):
        net.load_generator_state_dict(state | {"layers.0.rng": philox})
    assert net.generator_state_dict() == state
    assert not nn.Linear(2, 2).generator_state_dict()


def test_a_hooks_state_is_checked():
    def work(group):
        hook = hooks.PowerSGD()
        hook.load_state_dict({"0.steps": np.array(1)})
        model = DDP(nn.Linear(64, 64), group, hook=hook)
        y, pullback = model.vjp(np.ones((1, 64), np.float32))
        with pytest.raises(UsageError, match="the loaded state does not fit the bucket"):
            pullback(y)

    ferro.simulate(work, 1)
