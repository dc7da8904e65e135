"""Every layer under DDP, FSDP and Checkpoint, and as a deep copy: gradients are those of one process."""

import copy

import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, MixedPrecision, nn

BATCH = 4


class Encoder(nn.Module):
    """An image encoder, and a decoder of words that attends to it, with masks of padding."""

    def __init__(self):
        self.indices = data()[0]
        self.images = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2, rng=0),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.ConvTranspose2d(4, 4, 2, rng=1),
            nn.BatchNorm(4),
            nn.AvgPool2d(2, 1),
            nn.AdaptiveAvgPool2d((2, 3)),
        )
        self.words = nn.Embedding(7, 4, padding_idx=0, rng=2)
        self.self_attention = nn.Attention(4, 2, num_kv_heads=1, rotary_base=10.0, rng=3)
        self.norm = nn.RMSNorm(4)
        self.cross = nn.Checkpoint(nn.CrossAttention(4, 2, memory_dim=6, rng=4))
        self.head = nn.Sequential(
            nn.LayerNorm(4, bias=False), nn.Linear(4, 8, bias=False, rng=5), nn.SwiGLU(), nn.Linear(4, 7, rng=6)
        )

    def vjp(self, images):
        words = self.indices
        mask = words != 0
        features, pull_images = self.images.vjp(images)
        memory = features.reshape(len(features), 4, 6)
        embedded, pull_words = self.words.vjp(words)
        attended, pull_attention = self.self_attention.vjp((embedded, mask))
        normed, pull_norm = self.norm.vjp(attended)
        crossed, pull_cross = self.cross.vjp((normed, memory))
        y, pull_head = self.head.vjp(crossed)

        def pullback(grad_y):
            grad, grad_memory = pull_cross(pull_head(grad_y))
            grad, _none = pull_attention(pull_norm(grad))
            pull_words(grad)
            return pull_images(grad_memory.reshape(features.shape))

        return y, pullback


def data():
    rng = np.random.default_rng(0)
    words = rng.integers(1, 7, (BATCH, 5))
    words[:, 4] = 0
    return words, rng.standard_normal((BATCH, 2, 6, 6)).astype(np.float32), rng.integers(0, 7, (BATCH, 5))


def gradients(model):
    _words, images, labels = data()
    y, pullback = model.vjp(images)
    loss, grad = nn.cross_entropy(y, labels, ignore_index=0)
    pullback(grad)
    return loss


def test_gradients_in_strategies_are_those_of_one_process():
    whole = Encoder()
    loss = gradients(whole)
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    copied = copy.deepcopy(whole)
    copied.zero_grad()
    gradients(copied)
    for name, parameter in copied.named_parameters():
        np.testing.assert_array_equal(parameter.grad, expected[name], err_msg=name)

    def work(group):
        replica = DDP(Encoder(), group)
        gradients(replica)  # each rank has the whole batch, and so the mean is its gradient
        replicas = {name: parameter.grad.copy() for name, parameter in replica.named_parameters()}
        sharded = FSDP(Encoder(), group)
        gradients(sharded)
        for parameter in sharded.parameters():
            parameter.data[...] = parameter.grad
        pieces = sharded.full_state_dict()
        half = FSDP(Encoder(), group, mixed_precision=MixedPrecision(param_dtype=np.float16, reduce_dtype=np.float32))
        return replicas, pieces, gradients(half)

    for replicas, pieces, half_loss in ferro.simulate(work, 2):
        for name, value in expected.items():
            np.testing.assert_allclose(replicas[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(pieces[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        assert half_loss == pytest.approx(loss, rel=5e-3)
