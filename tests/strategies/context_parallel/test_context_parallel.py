"""Sequences divided over ranks: every output and gradient is that of one process."""

import copy

import ml_dtypes
import numpy as np
import pytest

import ferro
from ferro_strategies import DDP, FSDP, ContextParallel, DeviceMesh, nn, optim
from ferro_strategies.context_parallel import SequenceChunks, ring_attend

F64 = np.float64
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3])


def simulate(run, ranks, **options):
    return ferro.simulate(run, ranks, timeout_s=20.0, **options)


def transformer(causal=True, dtype=F64, seed=0):
    wide = {"dtype": dtype, "rng": np.random.default_rng(seed)}
    return nn.Sequential(
        nn.Embedding(7, 8, **wide),
        nn.Residual(nn.Sequential(nn.LayerNorm(8, dtype=dtype), nn.Attention(8, 4, causal=causal, **wide))),
        nn.Residual(nn.Checkpoint(nn.Sequential(nn.Linear(8, 9, **wide), nn.GELU(), nn.Linear(9, 8, **wide)))),
        nn.Linear(8, 7, **wide),
    )


def batch(length, seed=0, count=2):
    words, following = np.random.default_rng(seed).integers(0, 7, (2, count, length))
    return words, following


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(mine, theirs, rtol=1e-9, atol=1e-13):
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("zigzag", [True, False])
def test_chunks_cover_each_position_once_and_share_the_work(zigzag):
    for length in (0, 1, 5, 24, 25):
        for ranks in (1, 2, 3, 4):
            chunks = SequenceChunks(length, ranks, zigzag)
            order = np.concatenate([chunks.positions(rank) for rank in range(ranks)])
            np.testing.assert_array_equal(order[chunks.order()], np.arange(length))
            assert chunks.sizes == tuple(len(chunks.positions(rank)) for rank in range(ranks))
    work = [int((SequenceChunks(24, 3, zigzag).positions(rank) + 1).sum()) for rank in range(3)]
    assert (len(set(work)) == 1) is zigzag
    assert SequenceChunks(12, 3).spans(1) == ((2, 4), (8, 10))


@RANKS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("zigzag", [True, False])
def test_output_and_gradients_are_those_of_one_process(ranks, causal, zigzag):
    def one_pass(model, length):
        words, following = batch(length)
        scores, pullback = model.vjp(words)
        loss, grad = nn.cross_entropy(scores, following)
        assert pullback(grad) is None
        found = {name: grad.copy() for name, grad in gradients(model).items()}
        for parameter in model.parameters():
            parameter.zero_grad()
        return scores, loss, found

    lengths = (1, 2, 5, 12)  # fewer positions than chunks, too

    def run(group):
        model = ContextParallel(transformer(causal, seed=group.rank), group, zigzag=zigzag)
        return [one_pass(model, length) for length in lengths]

    serial = transformer(causal)
    expected = [one_pass(serial, length) for length in lengths]
    for found in simulate(run, ranks):
        for (scores, loss, grads), (wanted, wanted_loss, wanted_grads) in zip(found, expected, strict=True):
            np.testing.assert_allclose(scores, wanted, rtol=1e-12, atol=1e-13)
            assert loss == pytest.approx(wanted_loss, rel=1e-12)
            assert_close(grads, wanted_grads)


def test_two_passes_in_flight_and_the_gradient_of_the_input():
    x, grad = np.random.default_rng(5).standard_normal((2, 2, 2, 7, 8))

    def both(model):
        pulls = [model.vjp(part)[1] for part in x]
        return [pull(part) for pull, part in zip(pulls, grad, strict=True)], gradients(model)

    def run(group):
        attention = nn.Attention(8, 2, dtype=F64, rng=0)
        return both(ContextParallel(nn.Sequential(nn.Linear(8, 8, dtype=F64, rng=1), attention), group))

    serial = nn.Sequential(nn.Linear(8, 8, dtype=F64, rng=1), nn.Attention(8, 2, dtype=F64, rng=0))
    expected, grads = both(serial)
    for found, mine in simulate(run, 2):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        assert_close(mine, grads)


@RANKS
def test_own_losses_over_equal_parts_are_averaged(ranks):
    words, following = batch(12)

    def run(group):
        model = ContextParallel(transformer(), group, gather_output=False)
        scores, pullback = model.vjp(words)
        loss, grad = nn.cross_entropy(scores, model.shard(following))
        pullback(grad)
        return group.all_reduce(np.array(loss), "mean"), gradients(model)

    serial = transformer()
    scores, pullback = serial.vjp(words)
    loss, grad = nn.cross_entropy(scores, following)
    pullback(grad)
    for mine, grads in simulate(run, ranks):
        assert float(mine) == pytest.approx(loss, rel=1e-12)
        assert_close(grads, gradients(serial))


@pytest.mark.parametrize("strategy", ["ddp over the other axis", "ddp over both axes", "fsdp over the other axis"])
def test_data_parallel_over_another_axis(strategy):
    def train(model, take):
        optimizer = optim.SGD(model.parameters(), 0.3, momentum=0.9)
        for step in range(3):
            words, following = batch(6, seed=step, count=4)
            scores, pullback = model.vjp(take(words))
            pullback(nn.cross_entropy(scores, take(following))[1])
            optimizer.step()
            optimizer.zero_grad()

    def run(group):
        mesh = DeviceMesh((2, 2), ("dp", "cp"), group)
        if strategy == "ddp over both axes":
            inner = ContextParallel(transformer(), mesh["cp"], reduce_gradients=False)
            model = DDP(inner, mesh.flatten(("dp", "cp"), "data")["data"])
        else:
            outer = FSDP if strategy.startswith("fsdp") else DDP
            model = outer(ContextParallel(transformer(), mesh["cp"]), mesh["dp"])
        train(model, lambda whole: whole[mesh["dp"].rank :: 2])
        return model.full_state_dict() if isinstance(model, FSDP) else model.state_dict()

    serial = transformer()
    train(serial, lambda whole: whole)
    for state in simulate(run, 4):
        assert_close(state, serial.state_dict(), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 4e-3), (ml_dtypes.bfloat16, 3e-2)])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_and_half_precision(dtype, tolerance, causal):
    rng = np.random.default_rng(0)
    query, key, value, grad = (rng.standard_normal((2, 9, columns)) for columns in (12, 6, 6, 12))

    def whole(x):  # each head of keys and values serves two of the queries
        heads = x.reshape(2, 9, 2, 1, 3)
        return np.repeat(heads, 2, axis=3).reshape(2, 9, 12)

    given = [x.astype(dtype).astype(F64) for x in (query, whole(key), whole(value))]
    expected, pull = nn.attention.attend(*given, 4, causal=causal)
    grads = pull(grad.astype(dtype).astype(F64))
    grads = [grads[0], *(part.reshape(2, 9, 2, 2, 3).sum(axis=3).reshape(2, 9, 6) for part in grads[1:])]

    def run(group):
        chunks = SequenceChunks(9, group.world_size)
        own = [x.astype(dtype)[:, chunks.positions(group.rank)] for x in (query, key, value, grad)]
        y, pullback = ring_attend(*own[:3], group, chunks, num_heads=4, num_kv_heads=2, causal=causal)
        return chunks.order(), y, pullback(own[3])

    results = simulate(run, 3)
    order = results[0][0]
    for found, wanted in zip(
        [[y for _, y, _ in results], *([part[i] for _, _, part in results] for i in range(3))],
        [expected, *grads],
        strict=True,
    ):
        mine = np.concatenate(found, axis=1)[:, order]
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine.astype(F64), wanted, rtol=tolerance, atol=tolerance)


@RANKS
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_rotary_positions_and_a_mask_are_those_of_one_process(ranks, causal):
    x, grad = np.random.default_rng(1).standard_normal((2, 3, 7, 16))
    mask = np.arange(7) < np.array([[7], [4], [0]])  # the last sequence is all padding

    def one_pass(model):
        y, pullback = model.vjp((x, mask))
        grad_x, no_gradient = pullback(grad)
        assert no_gradient is None
        return y, grad_x, gradients(model)

    def attention():
        return nn.Attention(16, 4, causal=causal, num_kv_heads=2, rotary_base=50.0, dtype=F64, rng=0)

    def run(group):
        return one_pass(ContextParallel(attention(), group))

    y, grad_x, grads = one_pass(attention())
    for mine, my_grad, my_grads in simulate(run, ranks):
        np.testing.assert_allclose(mine, y, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(my_grad, grad_x, rtol=1e-10, atol=1e-13)
        assert_close(my_grads, grads, atol=1e-12)


def test_the_pullback_drops_the_weights_that_the_forward_pass_dropped():
    rng = np.random.default_rng(0)
    x, direction, grad = (rng.standard_normal((3, 2, 6, 8)) for _ in range(3))

    def run(group):
        chunks = SequenceChunks(6, group.world_size)
        take = chunks.positions(group.rank)

        def output(given):
            dropout = nn.Dropout(0.4, rng=group.rank)
            return ring_attend(*given[:, :, take], group, chunks, num_heads=2, causal=True, dropout=dropout)

        y, pull = output(x)
        assert not np.allclose(y, ring_attend(*x[:, :, take], group, chunks, num_heads=2, causal=True)[0])
        along = sum(float((d[:, take] * g).sum()) for d, g in zip(direction, pull(grad[0][:, take]), strict=True))
        step = 1e-5
        moved = (output(x + step * direction)[0] - output(x - step * direction)[0]) / (2 * step)
        return along, float((moved * grad[0][:, take]).sum())

    along, moved = np.sum(simulate(run, 3), axis=0)
    assert along == pytest.approx(moved, rel=1e-7)


def test_ranks_drop_other_elements_and_save_their_generators():
    def run(group):
        layers = nn.Attention(8, 2, dropout=0.5, dtype=F64, rng=0), nn.Dropout(0.5, rng=0)
        model = ContextParallel(nn.Sequential(*layers), group)
        state = model.generator_state_dict()
        first = model(np.ones((1, 4, 8)))
        model.load_generator_state_dict(state)
        np.testing.assert_array_equal(model(np.ones((1, 4, 8))), first)
        return state

    one, other = simulate(run, 2)
    assert list(one) == list(other)
    assert all(one[name] != other[name] for name in one)


def test_large_scores_of_half_precision_do_not_overflow():
    def run(group):
        chunks = SequenceChunks(4, group.world_size)
        x = np.full((1, 2, 64), 300, np.float16)  # scores of 64 * 300**2 / 8, beyond 65504
        y, pullback = ring_attend(x, x, x, group, chunks, num_heads=1, causal=True)
        return y, pullback(np.ones_like(x))

    for y, grads in simulate(run, 2):
        assert (y == 300).all()
        assert all(np.isfinite(grad).all() for grad in grads)


def test_what_cannot_be_divided_is_refused():
    def run(group):
        with pytest.raises(ferro.UsageError, match=r"ContextParallel: the module has no nn\.Attention"):
            ContextParallel(nn.Linear(4, 4, rng=0), group)
        norm = nn.Sequential(nn.Attention(4, 2, rng=0), nn.BatchNorm(4))
        with pytest.raises(ferro.UsageError, match=r"layer 'layers\.1', a BatchNorm"):
            ContextParallel(norm, group)
        differs = nn.Attention(4, 1 + group.rank, bias=group.rank == 0, rng=0)
        with pytest.raises(ferro.UsageError, match=r"ContextParallel on group .*the models differ"):
            ContextParallel(differs, group)
        model = ContextParallel(nn.Attention(4, 2, rng=0), group)
        with pytest.raises(ferro.UsageError, match=r"expected input of shape \(B, T >= 1, \.\.\.\), got \(4,\)"):
            model.vjp(np.ones(4, np.float32))
        with pytest.raises(ferro.UsageError, match=r"the ranks have \(3, 1\) positions"):
            model.module.vjp(np.ones((1, 3 - 2 * group.rank, 4), np.float32))
        x = np.ones((1, 3, 4), np.float32)
        with pytest.raises(ferro.UsageError, match="3 heads of queries and 3 of keys"):
            ring_attend(x, x, x, group, SequenceChunks(6, 2), num_heads=3, causal=True)
        y, pullback = model.vjp(x)
        with pytest.raises(ferro.UsageError, match=r"an array of shape \(1, 3, 4\)"):
            pullback(y[0])

    simulate(run, 2)


def test_ddp_goes_around_it():
    def work(group):
        with pytest.raises(ferro.UsageError, match=r"the other way round: DDP\(ContextParallel"):
            ContextParallel(DDP(nn.Attention(4, 2, rng=0), group), group)

    simulate(work, 2)


def test_a_deep_copy_trains_by_itself():
    words, following = batch(6)

    def one_pass(model):
        scores, pullback = model.vjp(words)
        pullback(nn.cross_entropy(scores, following)[1])
        return gradients(model)

    def run(group):
        model = ContextParallel(transformer(), group)
        twin = copy.deepcopy(model)
        return one_pass(twin), [parameter.grad for parameter in model.parameters()]

    expected = one_pass(transformer())
    for grads, untouched in simulate(run, 2):
        assert_close(grads, expected)
        assert untouched == [None] * len(expected)


def test_a_pullback_that_is_kept_is_noticed_before_the_optimizer_steps():
    words, following = batch(6)

    def run(group):
        model = ContextParallel(transformer(), group)
        optimizer = optim.SGD(model.parameters(), 0.1)
        _, kept = model.vjp(words)
        scores, pullback = model.vjp(words)
        pullback(nn.cross_entropy(scores, following)[1])
        with pytest.raises(ferro.UsageError, match=r"ContextParallel: .* gradients of this rank alone, of 'layers\.0"):
            optimizer.step()
        kept(np.zeros_like(scores))
        optimizer.step()

    simulate(run, 2)
