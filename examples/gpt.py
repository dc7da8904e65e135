"""Train a small character GPT with data, tensor and pipeline parallelism, then generate text.

    python examples/gpt.py                                        one rank
    ferro run -n 8 examples/gpt.py --dp 2 --tp 2 --pp 2           data x tensor x pipeline
    ferro run -n 8 examples/gpt.py --dp 2 --tp 2 --pp 2 --fsdp    the data axis shards parameters
    ferro run -n 4 examples/gpt.py --dp 4 --fsdp --compare        train again in one process
    ferro run -n 4 examples/gpt.py --dp 2 --pp 2 --checkpoint DIR     go on from DIR, also with other numbers

The text is Python's language reference, which Python contains (`pydoc_data.topics`). The program
needs tqdm besides ferro[gloo,strategies,checkpoint].
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pydoc_data.topics import topics

import numpy as np
from tqdm import tqdm

import ferro
from ferro_checkpoint import Checkpointer, Every, Last
from ferro_strategies import DDP, FSDP, DeviceMesh, Pipeline, nn, split_model
from ferro_strategies import tensor_parallel as tp
from ferro_strategies.optim import AdamW, clip_grad_norm

TEXT = "\n".join(topics[name] for name in sorted(topics))
ALPHABET = sorted(set(TEXT))
IDS = np.searchsorted(ALPHABET, list(TEXT))
CLIP_NORM = 1.0
WARM_UP_STEPS = 20


class Embeddings(nn.Module):
    """Token and position embeddings, added: (B, T) integers -> (B, T, dim)."""

    def __init__(self, context: int, dim: int, dtype: str, rng: np.random.Generator) -> None:
        self.table = nn.Embedding(len(ALPHABET), dim, dtype=dtype, rng=rng)
        self.positions = nn.Parameter(rng.standard_normal((context, dim)).astype(dtype))

    def vjp(self, x: nn.Array) -> tuple[nn.Array, nn.Pullback]:
        """Look up the embeddings; indices have no gradient."""
        y, pull_table = self.table.vjp(x)
        positions, length = self.positions.use(), x.shape[1]

        def pullback(grad_y: nn.Array) -> None:
            positions.add_grad_rows(np.arange(length), grad_y.sum(axis=0))
            pull_table(grad_y)

        return y + positions.data[:length], pullback


class Block(nn.Module):
    """x = x + attention(norm(x)), then x + down(gelu(up(norm(x))))."""

    def __init__(self, dim: int, heads: int, dtype: str, rng: np.random.Generator) -> None:
        self.attention = nn.Attention(dim, heads, dtype=dtype, rng=rng)
        self.up = nn.Linear(dim, 4 * dim, dtype=dtype, rng=rng)
        self.down = nn.Linear(4 * dim, dim, dtype=dtype, rng=rng)
        norms = nn.LayerNorm(dim, dtype=dtype), nn.LayerNorm(dim, dtype=dtype)
        self.layers = nn.Sequential(
            nn.Residual(nn.Sequential(norms[0], self.attention)),
            nn.Residual(nn.Sequential(norms[1], self.up, nn.GELU(), self.down)),
        )

    def vjp(self, x: nn.Array) -> tuple[nn.Array, nn.Pullback]:
        """Apply the layers."""
        return self.layers.vjp(x)


class Head(nn.Module):
    """Logits of the next character: (B, T, dim) -> (B, T, characters)."""

    def __init__(self, dim: int, dtype: str, rng: np.random.Generator) -> None:
        self.logits = nn.Linear(dim, len(ALPHABET), dtype=dtype, rng=rng)
        self.layers = nn.Sequential(nn.LayerNorm(dim, dtype=dtype), self.logits)

    def vjp(self, x: nn.Array) -> tuple[nn.Array, nn.Pullback]:
        """Apply the layers."""
        return self.layers.vjp(x)


PARALLEL = {
    "*.table": tp.ParallelEmbedding.from_serial,
    "*.attention": tp.ParallelAttention.from_serial,
    "*.up": tp.ColumnParallelLinear.from_serial,
    "*.down": tp.RowParallelLinear.from_serial,
    "*.logits": tp.ColumnParallelLinear.from_serial,
}


def make_model(args: argparse.Namespace) -> nn.Sequential:
    """Return the whole model; the seed makes it the same on every rank."""
    rng = np.random.default_rng(args.seed)
    blocks = [Block(args.dim, args.heads, args.dtype, rng) for _ in range(args.blocks)]
    embeddings = Embeddings(args.context, args.dim, args.dtype, rng)
    model = nn.Sequential(embeddings, *blocks, Head(args.dim, args.dtype, rng))
    for parameter in model.parameters():
        if parameter.data.ndim == 2:  # small values keep the sum over all blocks small
            parameter.data[...] = 0.05 * rng.standard_normal(parameter.data.shape)
    return model


def make_pipeline(args: argparse.Namespace, mesh: DeviceMesh) -> Pipeline:
    """Return this rank's stages, tensor parallel, and replicated or sharded over "dp"."""
    model = make_model(args)
    tp.parallelize(model, mesh["tp"], PARALLEL)
    pipe = mesh["pp"]
    split = split_model(model, pipe, stages_per_rank=args.stages_per_rank)
    stages: list[nn.Module] = []
    for stage in split.stages:
        if args.fsdp:
            stages.append(FSDP(stage, mesh["dp"], units=lambda _, part: isinstance(part, Block)))
        else:
            stages.append(DDP(stage, mesh["dp"]))
    return Pipeline(stages, pipe, schedule=args.schedule, microbatches=args.microbatches, ties=split.ties)


def batch_of(args: argparse.Namespace, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a step's inputs and targets, the next characters; they are the same on all ranks."""
    starts = np.random.default_rng((args.seed, step)).integers(0, len(IDS) - args.context, args.batch)
    rows = IDS[starts[:, None] + np.arange(args.context + 1)]
    return rows[:, :-1], rows[:, 1:]


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Return a step's learning rate, which rises during the warm-up."""
    return args.lr * min(1.0, (step + 1) / WARM_UP_STEPS)


def train(args: argparse.Namespace, pipeline: Pipeline, mesh: DeviceMesh) -> list[float]:
    """Train, and return every step's loss over the whole batch."""

    def loss_function(logits: nn.Array, targets: nn.Array) -> tuple[float, nn.Array]:
        return tp.vocab_parallel_cross_entropy(logits, targets, mesh["tp"])

    optimizer = AdamW(pipeline.parameters(), lr=args.lr)
    losses: list[float] = []
    state = {"model": pipeline, "optimizer": optimizer, "losses": losses}
    keeper, first = None, 0
    if args.checkpoint:
        keeper = Checkpointer(args.checkpoint, mesh.parent, every=Every(steps=args.save_every), keep=Last(2))
        first = keeper.resume(into=state) or 0
    replicas = mesh["dp"]
    steps = tqdm(range(first, args.steps), disable=mesh.parent.rank > 0, unit="step", initial=first, total=args.steps)
    with keeper or nullcontext():
        for step in steps:
            x, targets = (np.split(whole, replicas.world_size)[replicas.rank] for whole in batch_of(args, step))
            optimizer.lr = learning_rate(args, step)
            loss = pipeline.step(x, targets, loss_function)
            pipeline.clip_grad_norm(CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(replicas.all_reduce(loss, "mean")))
            steps.set_postfix(loss=f"{losses[-1]:.3f}")
            if keeper is not None:
                keeper.step(step + 1, state)
    return losses


def train_in_one_process(args: argparse.Namespace) -> list[float]:
    """Train the same model on the same batches in this process alone; return the losses."""
    model = make_model(args)
    optimizer = AdamW(model.parameters(), lr=args.lr)
    losses = []
    for step in tqdm(range(args.steps), unit="step", desc="one process"):
        optimizer.lr = learning_rate(args, step)
        x, targets = batch_of(args, step)
        logits, pullback = model.vjp(x)
        loss, grad = nn.cross_entropy(logits, targets)
        pullback(grad)
        clip_grad_norm(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def generate(args: argparse.Namespace, pipeline: Pipeline, mesh: DeviceMesh) -> str:
    """Continue a prompt, character by character; all ranks take part."""
    ids = np.searchsorted(ALPHABET, list("The "))
    columns = [len(part) for part in np.array_split(ALPHABET, args.tp)]
    last_stage = mesh.rank_of([0 if name != "pp" else args.pp - 1 for name in mesh.names])
    rng = np.random.default_rng(args.seed)
    pipeline.eval()
    for _ in range(args.write):
        logits = pipeline.forward(ids[None, -args.context :])
        drawn = np.zeros((), np.int64)
        if logits is not None:
            row = mesh["tp"].all_gather(logits[0, -1], sizes=columns).astype(np.float64)
            weights = np.exp((row - row.max()) / args.temperature)
            drawn[...] = rng.choice(len(ALPHABET), p=weights / weights.sum())
        ids = np.append(ids, mesh.parent.broadcast(drawn, last_stage))
    pipeline.train()
    return "".join(ALPHABET[index] for index in ids)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dp", type=int, default=1, help="replicas, or shards with --fsdp")
    add("--tp", type=int, default=1, help="ranks that share every matrix; at most --heads")
    add("--pp", type=int, default=1, help="ranks that have some of the layers each")
    add("--fsdp", action="store_true", help="shard parameters over the --dp ranks")
    add("--schedule", default="1f1b", help="see `ferro show pipeline --help`")
    add("--stages-per-rank", type=int, default=1, help="more than 1 for interleaved_1f1b")
    add("--microbatches", type=int, default=2)
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=32, help="rows of a whole batch; a multiple of --dp")
    add("--context", type=int, default=64, help="characters seen at once")
    add("--dim", type=int, default=96)
    add("--heads", type=int, default=4)
    add("--blocks", type=int, default=4)
    add("--lr", type=float, default=3e-3)
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--seed", type=int, default=0)
    add("--write", type=int, default=200, metavar="CHARACTERS", help="how many at the end")
    add("--temperature", type=float, default=0.7)
    add("--compare", action="store_true", help="train again in one process, and compare losses")
    add("--checkpoint", metavar="DIR", help="save into this directory, and go on from what is there")
    add("--save-every", type=int, default=50, metavar="STEPS")
    add("--backend", help="the launcher's default when left out")
    return parser.parse_args()


def fault_of(args: argparse.Namespace, world_size: int) -> str | None:
    """Return the first error in the options, or None."""
    counts = ("dp", "tp", "pp", "stages_per_rank", "microbatches", "batch", "steps")
    sizes = ("context", "dim", "heads", "blocks")
    for name in (*counts, *sizes):
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1"
    ranks = args.dp * args.pp * args.tp
    stages, layers = args.pp * args.stages_per_rank, args.blocks + 2
    rules = [
        (world_size == ranks, f"--dp x --pp x --tp is {ranks} ranks, not {world_size}: -n {ranks}"),
        (args.batch % args.dp == 0, "--batch must be a multiple of --dp"),
        (args.dim % args.heads == 0, "--dim must be a multiple of --heads"),
        (args.tp <= args.heads, "--tp must be at most --heads"),
        (stages <= layers, f"--pp x --stages-per-rank must be at most {layers}, --blocks and 2"),
        (args.temperature > 0, "--temperature must be above 0"),
    ]
    return next((fault for holds, fault in rules if not holds), None)


def main() -> None:
    args = parse()
    with ferro.init(args.backend) as group:
        if fault := fault_of(args, group.world_size):
            if group.rank == 0:
                raise SystemExit(f"gpt.py: {fault}")
            return
        mesh = DeviceMesh((args.dp, args.pp, args.tp), ("dp", "pp", "tp"), group)
        pipeline = make_pipeline(args, mesh)
        losses = train(args, pipeline, mesh)
        text = generate(args, pipeline, mesh)
        if group.rank == 0:
            kind = "shards" if args.fsdp else "replicas"
            stages = args.pp * args.stages_per_rank
            print(
                f"{args.dp} {kind} x {stages} stages x {args.tp} pieces over "
                f"{group.backend_name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
            )
            print(text)
            if args.compare:
                pairs = zip(losses, train_in_one_process(args), strict=True)
                worst = max(abs(a - b) / b for a, b in pairs)
                print(f"largest relative difference of a loss from one process: {worst:.1e}")


if __name__ == "__main__":
    main()
