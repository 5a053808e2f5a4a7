"""Whether the best learning rate of a narrow model is that of wide ones, with model.transfer (muP) and without.

    python benchmarks/transfer.py [--widths 64,128,256,512] [--steps N] [--out FILE.json] [--pictures FOLDER]

Small models of each width are trained on the bytes of the running Python's own library, at learning rates that are
powers of 2: from a first guess, later from the best of the width before, until the best of a width has two on either
side. Done runs stand in FILE.json and are not made again, so that the same command goes on where it was stopped. At the
end: the best rate by width, as measured and at the vertex of the parabola of least squares through it and two on either
side; a picture of loss over learning rate; and the coordinate check of the same models, on the same text, as a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import RunConfig
from maxlm.files import write_atomically
from maxlm.models.flops import count_parameters, training_flops_per_token
from maxlm.models.losses import next_token_loss
from maxlm.parallel.mesh import make_mesh
from maxlm.scaling.coordinates import coordinate_check, resized, whole_rows
from maxlm.scaling.coordinates_figure import draw_check
from maxlm.training.optimizer import make_optimizer
from maxlm.training.program import Program
from maxlm.training.schedule import make_schedule
from maxlm.training.state import Placement, init_state
from maxlm.training.step import make_train_step

ROOT = Path(__file__).parent.parent
BASE_WIDTH, FIRST_GUESS, AROUND = 64, -7, 2
# Initial values near 1 / sqrt(d_model) of the base: what is transferred is its start, and with 0.02, made for widths in
# the thousands, models of all widths would learn as slowly as this narrow one does.
MODEL = {
    "vocab_size": 256, "n_layers": 2, "d_model": BASE_WIDTH, "n_heads": 2, "d_ff": 128, "max_seq_len": 128,
    "init_std": 0.1
}  # fmt: skip
TRAIN = {"seq_len": 128, "global_batch_tokens": 1024, "spike": {"sigmas": None}}
HELDOUT_BATCHES, CHECK_STEPS, CHECK_RATE = 16, 10, 2.0**-7
SEEDS = {64: 2, 128: 2}
"""runs whose mean is taken: narrow models differ more from seed to seed, and cost little"""
MEGABYTES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--steps", type=int, default=160, help="of each run (default: 160)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/transfer-cpu.json")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    widths = [int(width) for width in args.widths.split(",")]
    runs = Runs(args.out, args.steps)
    print(f"about {expected_flops(widths, args.steps):.1e} FLOPs in all, those of done runs too")
    for which in ("off", "on"):
        guess = FIRST_GUESS
        for width in widths:
            guess = sweep(runs, which, width, guess)
    runs.keep(best=[best(runs, which, width) for which in ("off", "on") for width in widths])
    args.pictures.mkdir(parents=True, exist_ok=True)
    draw_rates(runs, widths, args.pictures / "transfer-learning-rate.png")
    check = coordinate_check(
        config_of(MODEL, args.steps, CHECK_RATE), widths, text_batches("train")[:CHECK_STEPS], along="width"
    )
    runs.keep(coordinates=check.to_dict())
    draw_check(check, args.pictures / "transfer-coordinates.png")
    for row in runs.content["best"]:
        print("transfer {transfer:3}  width {width:4}  best 2^{log2_rate}  parabola 2^{log2_vertex:.2f}".format(**row))
    for which in ("off", "on"):
        found = [row["log2_vertex"] for row in runs.content["best"] if row["transfer"] == which]
        print(f"transfer {which}: best rates lie within a factor of {2 ** (max(found) - min(found)):.2f}")
    print(f"wrote {args.out}, {args.pictures}/transfer-learning-rate.png and transfer-coordinates.png")


class Runs:
    """What was measured, kept in a file after each run."""

    def __init__(self, path: Path, steps: int):
        self.path = path
        seeds = {str(width): n for width, n in SEEDS.items()}
        settings = {"model": MODEL, "train": {**TRAIN, "steps": steps}, "base_width": BASE_WIDTH, "seeds": seeds}
        machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        self.content: dict[str, Any] = {"settings": settings, "machine": machine | {"jax": jax.__version__}, "runs": []}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise SystemExit(f"{path} is of other settings; choose another --out or remove it")

    def get(self, which: str, width: int, log2_rate: int) -> float:
        """The held-out loss of a run, made now if it is not there; infinity where it diverged."""
        which = "off" if width == BASE_WIDTH else which  # there they are the same
        for run in self.content["runs"]:
            if (run["transfer"], run["width"], run["log2_rate"]) == (which, width, log2_rate):
                break
        else:
            run = {"transfer": which, "width": width, "log2_rate": log2_rate}
            trainer = Trainer.of(which, width, self.content["settings"]["train"]["steps"])
            run |= trainer.run(2.0**log2_rate, SEEDS.get(width, 1))
            self.content["runs"].append(run)
            self.keep()
            print(json.dumps(run), flush=True)
        return float("inf") if run["loss"] is None else run["loss"]

    def measured(self, which: str, width: int) -> dict[int, float]:
        """Losses by log2 of the learning rate, in its order."""
        which = "off" if width == BASE_WIDTH else which
        mine = [run for run in self.content["runs"] if (run["transfer"], run["width"]) == (which, width)]
        losses = {run["log2_rate"]: float("inf") if run["loss"] is None else run["loss"] for run in mine}
        return dict(sorted(losses.items()))

    def keep(self, **more: Any) -> None:
        """Writes the file, with more in it."""
        self.content |= more
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def processor() -> str:
    """The CPU's name as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def sweep(runs: Runs, which: str, width: int, guess: int) -> int:
    """Learning rates around the best of a width, which is returned as log2."""
    losses = {guess: runs.get(which, width, guess)}
    while True:
        lowest = min(losses, key=lambda rate: losses[rate])
        wanted = [rate for rate in range(lowest - AROUND, lowest + AROUND + 1) if rate not in losses]
        if not wanted:
            return lowest
        nearest = min(wanted, key=lambda rate: abs(rate - lowest))
        losses[nearest] = runs.get(which, width, nearest)


def best(runs: Runs, which: str, width: int) -> dict[str, Any]:
    """The best learning rate of a width, and the vertex of the parabola through it and two on either side."""
    losses = runs.measured(which, width)
    lowest = min(losses, key=lambda rate: losses[rate])
    near = [rate for rate in losses if abs(rate - lowest) <= AROUND and np.isfinite(losses[rate])]
    curvature, slope, _ = np.polyfit([rate - lowest for rate in near], [losses[rate] for rate in near], 2)
    # Two neighbours are higher, so that the parabola opens upwards; its vertex is not sought outside of them.
    vertex = lowest + float(np.clip(-slope / (2 * curvature), -AROUND, AROUND))
    return {"transfer": which, "width": width, "log2_rate": lowest, "log2_vertex": vertex, "loss": losses[lowest]}


def config_of(model: dict[str, Any], steps: int, rate: float) -> RunConfig:
    """A run of a model on one device in float32, with a short warm-up and a linear decay to zero."""
    return RunConfig.model_validate(
        {
            "name": "transfer",
            "model": model,
            "train": {**TRAIN, "steps": steps},
            "optimizer": {"learning_rate": rate},
            "schedule": {"kind": "linear", "warmup_steps": max(1, steps // 5), "final_fraction": 0.0},
            "precision": {"compute": "float32"},
        }
    )


class Trainer:
    """The compiled step of one model, for any learning rate."""

    made: dict[tuple[str, int], Trainer] = {}  # noqa: RUF012

    @classmethod
    def of(cls, which: str, width: int, steps: int) -> Trainer:
        """The trainer of a width, made once; of the last one asked for alone."""
        if (which, width) not in cls.made:
            cls.made.clear()
            cls.made[which, width] = cls(which, width, steps)
        return cls.made[which, width]

    def __init__(self, which: str, width: int, steps: int):
        transfer = {"kind": "mup", "base_width": BASE_WIDTH} if which == "on" else None
        model = resized(config_of(MODEL, steps, 1.0).model, "width", width, transfer)
        self.config = config_of(model.model_dump(), steps, 1.0)
        self.program = Program(self.config, make_mesh(self.config.mesh, jax.devices()[:1]))
        schedule = make_schedule(self.config.schedule, 1.0, steps)

        net, run = self.program.model, self.config
        with jax.set_mesh(self.program.mesh):
            optimizer, placement = make_optimizer(run.optimizer, net), Placement.of(net, run.mesh.zero)

        def step(state, batch, rate):
            paced = lambda number: rate * schedule(number)  # noqa: E731
            return make_train_step(net, optimizer, paced, placement, run.train, run.optimizer, run.loss)(state, batch)

        def init(seed):
            return init_state(net, optimizer, placement, run.train.spike.window, jax.random.key(seed))

        self.init, self.step = jax.jit(init), jax.jit(step, donate_argnums=0)
        self.loss = jax.jit(
            lambda params, batch: next_token_loss(self.program.model, params, batch, self.config.loss)[0]
        )

    def run(self, rate: float, seeds: int) -> dict[str, Any]:
        """Trains from each seed. The mean held-out loss in nats a byte, None where one diverged, and the seconds."""
        begin = time.perf_counter()
        losses = [self._loss_of(rate, seed) for seed in range(seeds)]
        loss = float(np.mean(losses)) if np.isfinite(losses).all() else None
        return {"loss": loss, "losses": losses if loss else None, "seconds": round(time.perf_counter() - begin, 2)}

    def _loss_of(self, rate: float, seed: int) -> float:
        steps, heldout = self.config.train.steps, text_batches("heldout")
        with jax.set_mesh(self.program.mesh):
            state, batches = self.init(seed), text_batches("train")
            for i in range(steps):
                state, _ = self.step(state, self._placed(batches[seed * steps + i]), jnp.float32(rate))
            # Steps that are not finite change nothing.
            skipped = int(state.guard.skipped)
            total = sum(float(self.loss(state.params, self._placed(batch))) for batch in heldout)
        return float("inf") if skipped else total / float(sum(batch["weights"].sum() for batch in heldout))

    def _placed(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.device_put(array, self.program.batch_sharding) for name, array in batch.items()}


class Batches:
    """Batches of windows drawn from bytes, by number."""

    def __init__(self, text: np.ndarray, seed: int):
        self.text, self.seed = text, seed

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(1 << 30))]
        rows, length = TRAIN["global_batch_tokens"] // TRAIN["seq_len"], TRAIN["seq_len"]
        starts = np.random.default_rng((self.seed, number)).integers(0, len(self.text) - length, rows)
        return whole_rows(self.text[starts[:, None] + np.arange(length + 1)].astype(np.int32))


def text_batches(split: str, made: dict[str, Any] = {}) -> Any:  # noqa: B006
    """Batches of the library's first megabytes, and a list of held-out ones from behind those."""
    if not made:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), MEGABYTES << 20
        text = np.frombuffer(b"\n".join(path.read_bytes() for path in files[0])[: files[1]], np.uint8)
        cut = len(text) * 9 // 10
        made["train"] = Batches(text[:cut], seed=1)
        made["heldout"] = Batches(text[cut:], seed=2)[:HELDOUT_BATCHES]
    return made[split]


def expected_flops(widths: list[int], steps: int) -> float:
    """Of all runs, where each width takes as few as it can, and the base's are the same with transfer and without."""
    total, tokens = 0.0, steps * TRAIN["global_batch_tokens"] + HELDOUT_BATCHES * TRAIN["global_batch_tokens"] / 3
    for width in widths:
        model = resized(config_of(MODEL, steps, 1.0).model, "width", width, None)
        n_runs = (2 * AROUND + 1) * (1 if width == BASE_WIDTH else 2) * SEEDS.get(width, 1)
        each = training_flops_per_token(model, TRAIN["seq_len"]) * tokens
        print(f"width {width}: {count_parameters(model).total:,} parameters, {each:.1e} FLOPs a run, {n_runs} runs")
        total += n_runs * each
    return total


def draw_rates(runs: Runs, widths: list[int], path: Path) -> None:
    """Loss over learning rate, a line a width, with the best marked: without transfer and with it."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, which in zip(axes, ("off", "on"), strict=True):
        for i, width in enumerate(widths):
            losses = {rate: loss for rate, loss in runs.measured(which, width).items() if np.isfinite(loss)}
            colour = colormaps["viridis"](0.9 * (1 - i / max(1, len(widths) - 1)))
            axis.plot(list(losses), list(losses.values()), marker="o", markersize=3, color=colour, label=str(width))
            found = best(runs, which, width)
            axis.plot(found["log2_vertex"], found["loss"], marker="*", markersize=11, color=colour)
        rates = [best(runs, which, width)["log2_vertex"] for width in widths]
        axis.set_title(f"transfer {which}: best rates within a factor of {2 ** (max(rates) - min(rates)):.1f}")
        axis.set_xlabel("log2 learning rate")
        axis.grid(alpha=0.3, linewidth=0.5)
    lowest = [best(runs, which, width)["loss"] for which in ("off", "on") for width in widths]
    axes[0].set_ylim(min(lowest) - 0.05, max(lowest) + 0.6)
    axes[0].set_ylabel("held-out loss, nats a byte")
    axes[0].legend(title="d_model", fontsize=8)
    figure.savefig(path, dpi=130, format="png")


if __name__ == "__main__":
    main()
