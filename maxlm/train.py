"""The run, top to bottom: config, mesh, data, state, step, loop, checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import yaml

import maxlm
from maxlm.checkpoint import Checkpoints
from maxlm.config import RunConfig, check_resume, to_yaml
from maxlm.data.loader import Loader, device_batches, process_rows
from maxlm.data.tokenizer import load_tokenizer
from maxlm.errors import CheckpointError, ConfigError
from maxlm.evaluation.evaluate import Evaluator
from maxlm.files import write_atomically
from maxlm.models.flops import count_parameters, training_flops_per_token
from maxlm.models.losses import Batch
from maxlm.parallel import distributed, support
from maxlm.parallel.mesh import make_mesh
from maxlm.planning.compile import program_hash
from maxlm.planning.hardware import chip_of, peak_flops_per_device
from maxlm.planning.xla_options import compiler_options
from maxlm.run_lock import RunLock
from maxlm.training.metrics import Metrics, Profiler
from maxlm.training.program import Program
from maxlm.training.state import TrainState


def train(config: RunConfig) -> None:
    """Runs `config` to its last step, going on from the newest intact checkpoint of its folder where there is one.

    On SIGTERM or SIGINT it saves and returns. Raises MaxlmError for what is the user's to mend.
    """
    began = time.perf_counter()
    distributed.initialize(config.distributed)
    mesh = make_mesh(config.mesh)
    support.check_mesh(config, dict(mesh.shape))
    program = Program(config, mesh)
    with (
        RunLock(config.run_dir),
        distributed.Signals() as signals,
        jax.set_mesh(mesh),
        Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint) as checkpoints,
    ):
        check_same_run(checkpoints, config)
        loader = open_data(program)
        state, done = start(program, checkpoints, loader)
        with make_metrics(program, done) as metrics:
            lowered = program.lower()
            if distributed.is_main():
                write_run_files(program, program_hash(lowered))
            if done:
                metrics.say(f"resumed {config.run_dir} after step {done:,}")
            loop(program, lowered, state, done, loader, checkpoints, metrics, signals, began)


def start(program: Program, checkpoints: Checkpoints, loader: Loader) -> tuple[TrainState, int]:
    """The state to go on from and the number of steps already done: a checkpoint's, or a new run's and 0."""
    restored = checkpoints.restore(program.abstract_state)
    if restored is None:
        state, done = program.init_state(), 0
    else:
        state, meta = restored
        done = meta["step"]
        check_same_data(meta["data"], loader.fingerprint, program.config)
    return state, done


def check_same_run(checkpoints: Checkpoints, config: RunConfig) -> None:
    """Raises CheckpointError where the newest checkpoint is of another model, tokenizer or data than the config's."""
    for step in reversed(checkpoints.steps()):
        try:
            before = checkpoints.read_config(step)
        except CheckpointError:
            continue  # a damaged one; `restore` reports it
        check_resume(yaml.safe_load(before), config)
        return


def check_same_data(before: dict[str, Any], now: dict[str, Any], config: RunConfig) -> None:
    """Raises CheckpointError where the batches would not go on as they began, naming what differs."""
    changed = [f"  {name}: {before.get(name)} then, {now[name]} now" for name in now if before.get(name) != now[name]]
    if changed:
        raise CheckpointError(
            f"the checkpoints in {config.run_dir} were trained on other data than the config now gives:\n"
            + "\n".join(changed)
            + "\nBring the old token store back, or start anew in another folder (run_dir=...)."
        )


def open_data(program: Program) -> Loader:
    """The training data of the run, checked against its tokenizer and its model's vocabulary."""
    config, objective = program.config, program.config.objective
    if config.model.next_sentence_head and not objective.next_sentence:
        raise ConfigError(
            "model.next_sentence_head = true and data.objective.next_sentence = false: nothing would train that head; "
            "set both to true, or both to false, and masked tokens alone are learned"
        )
    loader = Loader(
        config.data,
        seq_len=config.train.seq_len,
        global_batch=program.rows,
        seed=config.train.seed,
        tokenizer=load_tokenizer(config.tokenizer) if config.tokenizer.path else None,
        objective=objective,
    )
    if loader.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {loader.vocab_size} tokens of the "
            f"tokenizer that made the token store; set model.vocab_size={loader.vocab_size}"
        )
    given = config.data.objective.mask_id, config.data.objective.first_sentinel_id
    n_special = objective.n_special(config.train.seq_len)
    if given == (None, None) and loader.vocab_size + n_special > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} leaves no place for {n_special} tokens of "
            f"data.objective.kind = {objective.kind!r} behind the {loader.vocab_size} of the tokenizer; set "
            f"model.vocab_size={loader.vocab_size + n_special}, or say which of them they are "
            "(data.objective.mask_id, data.objective.first_sentinel_id)"
        )
    return loader


def loop(
    program: Program,
    lowered: jax.stages.Lowered,
    state: TrainState,
    done: int,
    loader: Loader,
    checkpoints: Checkpoints,
    metrics: Metrics,
    signals: distributed.Signals,
    began: float,
) -> None:
    """Steps `done + 1` to the last, with what is due between them: evaluation, checkpoints, a stop by signal."""
    config, total = program.config, program.config.train.steps
    if done >= total:
        metrics.say(f"nothing to do: {config.run_dir} has done {done:,} steps; raise train.steps to go on")
        return
    chip = chip_of(program.mesh.devices.flat[0])
    step_program = lowered.compile(compiler_options=compiler_options(chip and chip.name) or None)
    batches = training_batches(program, loader, done)
    evaluation = RunEvaluation(program, loader)
    profiler = Profiler(config.run_dir, config.profile)
    metrics.mark()
    for step in range(done + 1, total + 1):
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        profiler.before(step)
        state, values = step_program(state, batch)
        metrics.record(step, values, data_wait_seconds=waited)
        profiler.after(step, values)
        if step == done + 1:
            jax.block_until_ready(values)
            metrics.say(f"first step done {time.perf_counter() - began:.1f} s after the start")
        stop = distributed.agree(signals.stop_requested)
        eval_loss = None
        if evaluation.due(step):
            metrics.flush()
            scores = evaluation(state.params)
            metrics.record_eval(step, scores)
            eval_loss = scores["eval_loss"]
        if stop or step == total or step % config.checkpoint.every == 0 or step in config.checkpoint.at:
            metrics.flush()
            checkpoints.save(
                step, state, meta=run_meta(step, config, loader), config_yaml=to_yaml(config), metric=eval_loss
            )
            metrics.mark()
        if stop:
            break
    profiler.close()
    checkpoints.wait()
    if step < total:
        metrics.say(f"stopped after step {step:,} and saved; resume with: maxlm train {config.run_dir}")
    else:
        metrics.say(f"done: {total:,} steps, {total * config.train.global_batch_tokens:,} tokens, in {config.run_dir}")


class RunEvaluation:
    """When a run is evaluated, and on which batches."""

    def __init__(self, program: Program, loader: Loader):
        self.config, self.program, self.loader = program.config, program, loader
        self.evaluator = Evaluator(program.model, program.config.loss)

    def due(self, step: int) -> bool:
        """Whether step `step` ends with an evaluation: the last one and every so many, where there is held-out text."""
        every = self.config.evaluation.every
        return self.loader.has_heldout and (step == self.config.train.steps or bool(every and step % every == 0))

    def __call__(self, params: Any) -> dict[str, float]:
        """The held-out scores of `params`."""
        scores = self.evaluator(params, heldout_batches(self.program, self.loader))
        return {name: scores[name] for name in ("eval_loss", "eval_bits_per_byte")}


def training_batches(program: Program, loader: Loader, done: int) -> Iterator[Batch]:
    """The batches of step done + 1 and on, on the mesh; every process reads the rows of its own devices alone."""
    rows = process_rows(program.batch_sharding, program.rows)
    return device_batches(loader.iterate(done, rows), program.batch_sharding, program.rows)


def heldout_batches(program: Program, loader: Loader) -> Iterator[Batch]:
    """The held-out windows in order, on the mesh."""
    rows = process_rows(program.batch_sharding, program.rows)
    batches = loader.eval_batches(rows, program.config.evaluation.max_batches)
    return device_batches(batches, program.batch_sharding, program.rows)


def make_metrics(program: Program, done: int) -> Metrics:
    """The run's log, with what turns tokens a second into MFU."""
    config = program.config
    devices = program.mesh.devices.flatten().tolist()
    peak, meaning = peak_flops_per_device(devices, config.precision.compute)
    metrics = Metrics(
        config.run_dir,
        config.metrics,
        tokens_per_step=config.train.global_batch_tokens,
        model_flops_per_token=training_flops_per_token(config.model, config.train.seq_len, config.row_lengths),
        peak_flops_per_device=peak,
        n_devices=len(devices),
        total_steps=config.train.steps,
        resume_step=done,
        main=distributed.is_main(),
    )
    metrics.say(f"MFU is model FLOP/s over the {meaning}")
    return metrics


def run_meta(step: int, config: RunConfig, loader: Loader) -> dict[str, Any]:
    """What a checkpoint says beside its arrays."""
    return {
        "step": step,
        "tokens": step * config.train.global_batch_tokens,
        "data": loader.fingerprint,
        "maxlm": maxlm.__version__,
    }


def write_run_files(program: Program, program_sha256: str) -> None:
    """The resolved config, and what the run runs on, for whoever opens the folder later.

    The hash is of the step's StableHLO: a plan for the same devices has the same one.
    """
    run_dir = Path(program.config.run_dir)
    parameters = count_parameters(program.config.model)
    about = {
        "command": sys.argv,
        "n_params": parameters.total,
        "n_params_nonembedding": parameters.non_embedding,
        "devices": f"{program.mesh.size} x {program.mesh.devices.flat[0].device_kind}",
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "processes": jax.process_count(),
        "program_sha256": program_sha256,
        "versions": {
            "maxlm": maxlm.__version__,
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")
            },
        },
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_atomically(run_dir / "config.yaml", to_yaml(program.config))
    write_atomically(run_dir / "run.json", json.dumps(about, indent=1) + "\n")
