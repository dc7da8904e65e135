"""Train with a data loader, stop at any time, and go on where it stopped, on any number of ranks.

    ferro run -n 4 examples/interrupted.py                 stop it with ctrl-c
    ferro run -n 2 examples/interrupted.py                 goes on in the middle of the epoch
    python examples/interrupted.py --folder elsewhere      one rank, from the beginning

It needs nothing besides ferro[gloo,strategies,checkpoint]; tqdm draws a bar on a terminal.
"""

from __future__ import annotations

import argparse
import logging

import numpy as np

import ferro
from ferro_checkpoint import Checkpointer, Last
from ferro_strategies import DDP, ShardedSampler, nn, seed_all
from ferro_strategies.data import DataLoader, item_rng
from ferro_strategies.optim import SGD
from ferro_strategies.training import AveragedMetrics, Progress, StopSignals, agree_stop, rank_handler


class Rings:
    """Points in the plane, which belong to a disc or to the ring around it; each is moved a little when it is read."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        random, label = np.random.default_rng(index), index % 2
        angle, radius = random.uniform(0, 2 * np.pi), random.uniform(label, label + 0.8)
        point = radius * np.array([np.cos(angle), np.sin(angle)])
        return (point + 0.02 * item_rng().standard_normal(2)).astype(np.float32), label


def train(group: ferro.ProcessGroup, args: argparse.Namespace) -> None:
    """Train until the last epoch, a signal, or --stop-after steps; then save."""
    log = logging.getLogger("interrupted")
    weights = seed_all(group, args.seed).shared("weights")
    net = nn.Sequential(nn.Linear(2, 64, rng=weights), nn.ReLU(), nn.Dropout(0.1, rng=0), nn.Linear(64, 2, rng=weights))
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    sampler = ShardedSampler(len(Rings()), group, seed=args.seed, pad=True)
    model, metrics = DDP(net, group), AveragedMetrics(group)
    with (
        DataLoader(Rings(), sampler, args.batch // group.world_size, workers=2) as loader,
        StopSignals() as stop,
        Checkpointer(args.folder, group, keep=Last(2)) as keeper,
    ):
        state = {"model": model, "optimizer": optimizer, "loader": loader}
        step = first = keeper.resume(into=state) or 0
        log.info("epoch %d, %d of %d items are done", loader.epoch, loader.state_dict()["taken"], len(Rings()))
        for epoch in range(loader.epoch, args.epochs):
            for points, labels in (bar := Progress(loader, group, description=f"epoch {epoch}")):
                logits, pullback = model.vjp(points)
                loss, grad = nn.cross_entropy(logits, labels)
                pullback(grad)
                optimizer.step()
                optimizer.zero_grad()
                metrics.add(len(labels), loss=loss, accuracy=np.mean(logits.argmax(axis=1) == labels))
                bar.show(loss=loss)
                step += 1
                if agree_stop(group, stop, step - first == args.stop_after):
                    keeper.save(step, state)
                    log.info("stopped in epoch %d; the next run goes on there", epoch)
                    return
            means = metrics.compute()
            log.info("epoch %d: loss %.4f, accuracy %.2f %%", epoch, means["loss"], 100 * means["accuracy"])
        keeper.save(step, state)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="items of all ranks together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="interrupted-training", help="where the state is saved")
    parser.add_argument("--stop-after", type=int, help="stop after so many steps, as a signal would")
    args = parser.parse_args()
    with ferro.init() as group:
        logging.basicConfig(level=logging.INFO, handlers=[rank_handler(group)])
        train(group, args)


if __name__ == "__main__":
    main()
