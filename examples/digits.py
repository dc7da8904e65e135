"""Train a small convolutional network on scikit-learn's handwritten digits, on any number of ranks.

    python examples/digits.py                       one rank
    ferro run -n 4 examples/digits.py               four ranks on this machine
    torchrun --nproc-per-node 4 examples/digits.py  or under mpiexec, srun, …
    ferro run -n 4 examples/digits.py --checkpoint runs/digits     stop it, and start it again: it goes on

It needs scikit-learn, tqdm and (for --plot) matplotlib besides ferro[gloo,strategies,checkpoint].
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import ferro
from ferro_checkpoint import Checkpointer, Every, Last
from ferro_strategies import DDP, nn
from ferro_strategies.optim import SGD

SEED = 0


def make_model() -> nn.Module:
    """Return the network. The seed is fixed, so the parameters are the same on all ranks."""
    rng = np.random.default_rng(SEED)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, rng=rng),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, rng=rng),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10, rng=rng),
    )


def load_data() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return (images, labels) of the training set and of the test set: 8x8 digits, split 4 to 1."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(SEED).permutation(len(images))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    return (images[rest], digits.target[rest]), (images[held_out], digits.target[held_out])


def global_batches(length: int, epoch: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the indices of each global batch of an epoch, the same on all ranks."""
    order = np.random.default_rng((SEED, epoch)).permutation(length)
    for start in range(0, length - batch + 1, batch):
        yield order[start : start + batch]


def train(model: nn.Module, args: argparse.Namespace, group: ferro.ProcessGroup | None) -> list[list[float]]:
    """Train, and return the loss and the held-out accuracy of every epoch.

    Without a group, one process trains on the whole global batches.
    """
    (images, labels), held_out = load_data()
    rank, ranks = (group.rank, group.world_size) if group else (0, 1)
    optimizer = SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    batches = len(images) // args.batch
    state = {"model": model, "optimizer": optimizer, "history": [], "epoch_loss": 0.0}
    keeper, step = None, 0
    if args.checkpoint and group is not None:
        keeper = Checkpointer(args.checkpoint, group, every=Every(steps=args.save_every), keep=Last(2))
        step = keeper.resume(into=state) or 0
    bar = tqdm(total=args.epochs * batches, initial=step, disable=group is None or rank > 0, unit="batch")
    with keeper or nullcontext():
        for epoch in range(step // batches, args.epochs):
            optimizer.lr = args.lr * 0.5 * (1 + np.cos(np.pi * epoch / args.epochs))
            for indices in list(global_batches(len(images), epoch, args.batch))[step % batches :]:
                local = indices[rank::ranks]
                logits, pullback = model.vjp(images[local])
                loss, grad = nn.cross_entropy(logits, labels[local])
                pullback(grad)
                optimizer.step()
                optimizer.zero_grad()
                state["epoch_loss"] += float(loss)
                step += 1
                bar.update()
                if step % batches == 0:
                    mean = state["epoch_loss"] / batches
                    if group is not None:
                        mean = float(group.all_reduce(mean, "mean"))
                    state["history"].append([mean, evaluate(model, held_out)])
                    state["epoch_loss"] = 0.0
                if keeper is not None:
                    keeper.step(step, state)
            loss, accuracy = state["history"][-1]
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2%}")
            if rank == 0 and group is not None:
                bar.write(f"epoch {epoch + 1:2}  loss {loss:.4f}  held-out accuracy {accuracy:.2%}")
    bar.close()
    return state["history"]


def evaluate(model: nn.Module, held_out: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the accuracy on held-out images."""
    images, labels = held_out
    model.eval()
    accuracy = (model(images).argmax(axis=1) == labels).mean()
    model.train()
    return float(accuracy)


def plot(history: list[list[float]], ranks: int, path: str) -> None:
    """Draw loss and accuracy over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses, accuracies = zip(*history, strict=True)
    epochs = range(1, len(history) + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    figure.suptitle(f"8x8 handwritten digits, DDP on {ranks} rank{'s' if ranks > 1 else ''}")
    left.plot(epochs, losses, marker=".", color="tab:blue")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log")
    right.plot(epochs, [100 * accuracy for accuracy in accuracies], marker=".", color="tab:green")
    right.axhline(97, color="gray", linewidth=0.8, linestyle="--", label="97 %")
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def compare(model: nn.Module, args: argparse.Namespace) -> float:
    """Train again in one process on the same global batches; return the largest difference."""
    reference = make_model()
    train(reference, args, None)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float(np.abs(a.data - b.data).max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="global batch size")
    parser.add_argument("--lr", type=float, default=0.08)
    parser.add_argument("--backend", help="the launcher's default when left out")
    parser.add_argument("--checkpoint", metavar="DIR", help="save into this directory, and go on from what is there")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--plot", metavar="FILE", help="write the curves to this picture")
    parser.add_argument("--compare", action="store_true", help="compare with a one-process run")
    args = parser.parse_args()

    with ferro.init(args.backend) as group:
        model = DDP(make_model(), group)
        history = train(model, args, group)
        if group.rank == 0:
            print(f"world of {group.world_size} over {group.backend_name}: held-out accuracy {history[-1][1]:.2%}")
            if args.plot:
                plot(history, group.world_size, args.plot)
                print(f"wrote {args.plot}")
            if args.compare:
                print(f"largest parameter difference from one process: {compare(model, args):.2e}")


if __name__ == "__main__":
    main()
