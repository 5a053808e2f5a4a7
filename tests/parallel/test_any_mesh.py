"""Whole runs with experts on meshes of every axis: one after the other on the same checkpoints, and over processes."""

import numpy as np
import pytest

from maxlm.config import load_config
from maxlm.train import train
from tests import runs
from tests.processes import run_processes

SECTIONS = {
    "model": {
        "vocab_size": 384, "n_layers": 4, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 32, "max_seq_len": 32,
        "moe": {
            "n_experts": 4, "experts_per_token": 2, "d_ff": 32, "balance_loss": 0.01, "balance_loss_over": "sequence",
        },
    },
    "train": {"global_batch_tokens": 512},
    "schedule": {"kind": "constant", "warmup_steps": 1},
}  # fmt: skip
STEPS_EACH = 2
PIPELINE = {"schedule": "1f1b", "microbatches": 2}
MESHES = {
    "fsdp 8": {"mesh": {"fsdp": 8}},
    "pipeline 2 x fsdp 4": {"mesh": {"pipeline": 2, "fsdp": 4}, "pipeline": PIPELINE},
    "expert 4 x fsdp 2": {"mesh": {"expert": 4, "fsdp": 2}},
    "context 4 x data 2, zero 1": {"mesh": {"context": 4, "data": 2, "fsdp": 1, "zero": 1}},
    "data 2 x fsdp 2 x tensor 2": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "pipeline 2 x expert 2 x context 2": {
        "mesh": {"pipeline": 2, "expert": 2, "context": 2, "fsdp": 1},
        "pipeline": {"schedule": "gpipe", "microbatches": 4},
    },
    "expert 2 x context 2 x tensor 2": {"mesh": {"expert": 2, "context": 2, "tensor": 2, "fsdp": 1}},
    "pipeline 4 x tensor 2": {"mesh": {"pipeline": 4, "tensor": 2, "fsdp": 1}, "pipeline": PIPELINE},
}


def config_of(folder, store, steps, **sections):
    tree = {**SECTIONS, **sections}
    tree["train"] = {**SECTIONS["train"], "steps": steps}
    return runs.write_config(folder / "tiny.yaml", store, folder / "run", **tree)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return runs.make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def on_one_device(store, tmp_path_factory):
    """The lines of a run that stayed where it was."""
    folder = tmp_path_factory.mktemp("one device")
    run_processes(1, runs.command(config_of(folder, store, STEPS_EACH * len(MESHES))), timeout=300)
    return runs.training_lines(folder / "run")


@pytest.mark.processes
@pytest.mark.exhaustive
def test_a_checkpoint_of_any_mesh_resumes_on_any_other_with_the_same_data(store, on_one_device, tmp_path):
    steps = 0
    for sections in MESHES.values():
        steps += STEPS_EACH
        train(load_config(config_of(tmp_path, store, steps, **sections)))
    found = runs.training_lines(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    # Other batches would differ in the second digit; rounding grows from step to step.
    for name, rtol in (("loss", 1e-5), ("nll", 1e-5), ("grad_norm", 1e-3)):
        np.testing.assert_allclose(
            [line[name] for line in found], [line[name] for line in on_one_device], rtol=rtol, err_msg=name
        )


STAGES = {"mesh": {"pipeline": 2, "fsdp": 2}, "pipeline": PIPELINE}
EXPERTS = {"mesh": {"expert": 2, "context": 2, "fsdp": 1}}
PIECES = {"mesh": {"context": 2, "tensor": 2, "fsdp": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "processes"),
    # Two processes of two devices each, with pieces of rows between them, have lost each other in Gloo once.
    [(STAGES, 2), (STAGES, 4), (EXPERTS, 2), (EXPERTS, 4), (PIECES, 4)],
    ids=["stages, 2", "stages, 4", "experts and pieces, 2", "experts and pieces, 4", "pieces and tensor, 4"],
)
def test_many_processes_train_as_one_device_does(sections, processes, store, on_one_device, tmp_path):
    config = config_of(tmp_path, store, 4, **sections)
    run_processes(processes, runs.command(config), devices_per_process=4 // processes, timeout=300)
    found = runs.training_lines(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = [line[name] for line in on_one_device[: len(found)]]
        np.testing.assert_allclose([line[name] for line in found], expected, rtol=rtol, err_msg=name)
