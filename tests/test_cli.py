"""The command line: what it prints, how it ends, and how little it imports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from maxlm import __version__, cli
from maxlm.config import load_config, to_yaml
from maxlm.errors import CheckpointError, ClusterError, ConfigError, DataError, MaxlmError, StorageError

REPOSITORY = Path(__file__).parent.parent


def maxlm(*args, cwd=None, **environment):
    """Runs a real command line in another process."""
    return subprocess.run(
        [sys.executable, "-m", "maxlm.cli", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )


def test_help_takes_under_half_a_second():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        done = maxlm("--help")
        took.append(time.perf_counter() - start)
        assert done.returncode == 0
    for command in ("train", "eval", "generate", "export", "import", "report", "data", "tokenizer", "config"):
        assert f"\n    {command}" in done.stdout
    assert min(took) < 0.5


@pytest.mark.parametrize(
    ("call", "absent"),
    [
        ("main(['--help'])", "jax flax orbax grain tensorstore numpy pydantic yaml rich tokenizers"),
        ("main(['config', 'quickstart'])", "jax flax orbax grain tensorstore numpy rich tokenizers"),
        ("main(['config', '--presets'])", "jax flax orbax grain tensorstore tokenizers"),
    ],
)
def test_light_commands_import_nothing_heavy(call, absent):
    program = f"""
import sys
from maxlm.cli import main
try:
    {call}
finally:
    print(sorted(set({absent.split()}) & set(sys.modules)), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_version_is_the_package_s():
    done = maxlm("--version")
    assert (done.returncode, done.stdout) == (0, f"maxlm {__version__}\n")


def test_a_bad_override_ends_a_real_process_with_code_2_and_one_line():
    done = maxlm("train", "quickstart", "train.step=3")
    assert done.returncode == 2
    assert done.stderr == "error: override `train.step=3`: unknown key `train.step`; did you mean `train.steps`?\n"


def test_debug_shows_the_traceback_and_keeps_the_exit_code():
    done = maxlm("config", "quickstart", "train.step=3", MAXLM_DEBUG="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("arguments", [["config", "quickstart"], ["config", "--help-keys"]])
def test_a_reader_that_has_left_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = to_stdout(writer, *arguments)
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.EXIT_BROKEN_PIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["config", "quickstart"], ["config", "--help-keys"]])
def test_a_full_disk_ends_with_code_5_and_says_so(arguments):
    with open("/dev/full", "w") as full:
        done = to_stdout(full, *arguments)
    assert done.returncode == 5
    assert done.stderr == "error: no space left on device; make room on that disk, or choose another folder\n"


def to_stdout(stdout, *arguments):
    """Runs a real command line that writes to `stdout`."""
    return subprocess.run(
        [sys.executable, "-m", "maxlm.cli", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def test_the_printed_config_is_the_one_that_is_trained(tmp_path, capsys):
    assert cli.main(["config", "quickstart", "mesh.tensor=2"]) == 0
    saved = tmp_path / "saved.yaml"
    saved.write_text(capsys.readouterr().out)
    assert load_config(saved) == load_config("quickstart", ["mesh.tensor=2"])


def test_json_of_a_config_is_its_plain_data(capsys):
    assert cli.main(["config", "quickstart", "--json", "train.seed=5"]) == 0
    assert json.loads(capsys.readouterr().out) == load_config("quickstart", ["train.seed=5"]).model_dump(mode="json")


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (["--help-keys"], {"key", "type", "default", "required", "unit", "meaning", "section"}),
        (["--help-keys", "optimizer"], {"key", "type", "default", "required", "unit", "meaning", "section"}),
        (
            ["--presets"],
            {"preset", "parameters", "layers", "d_model", "vocab_size", "cache_bytes_per_token", "seq_len", "tokens"},
        ),
    ],
)
def test_tables_are_printed_as_text_and_as_json(arguments, columns, capsys):
    assert cli.main(["config", *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert {frozenset(row) for row in rows} == {frozenset(columns)}
    assert cli.main(["config", *arguments]) == 0
    table = capsys.readouterr().out
    first = next(iter(rows[0].values()))
    assert first in table


def test_support_is_printed_as_text_and_as_json(capsys):
    assert cli.main(["config", "--support", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {row["feature"] for row in said["features"]} > {"pipeline", "expert", "ring"}
    assert cli.main(["config", "--support"]) == 0
    text = capsys.readouterr().out
    assert all(row["feature"] in text for row in said["features"])
    assert all(row["because"].split()[0] in text for row in said["refused"])


def test_key_help_shows_brackets_and_units_as_they_are(capsys):
    assert cli.main(["config", "--help-keys", "optimizer"]) == 0
    assert '["norm", "bias", "scale"]' in capsys.readouterr().out


def test_unknown_section_of_help_is_a_config_error(capsys):
    assert cli.main(["config", "--help-keys", "optimiser"]) == 2
    assert "did you mean `optimizer`" in capsys.readouterr().err


def test_config_without_a_config_says_what_to_give(capsys):
    assert cli.main(["config"]) == 2
    assert "--presets" in capsys.readouterr().err


def test_overrides_may_follow_flags():
    args = cli.parse(["train", "quickstart", "a.b=1", "--simulate-devices", "8", "mesh.data=2", "mesh.tensor=2"])
    assert args.overrides == ["a.b=1", "mesh.data=2", "mesh.tensor=2"]
    assert args.simulate_devices == 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "quickstart", "--train.steps=3"], "without dashes: train.steps=3"),
        (["train"], "CONFIG"),
        (["trian", "quickstart"], "trian"),
        (["train", "quickstart", "--num-processes", "0"], "at least 1"),
        (["eval", "runs/a", "extra"], "unknown argument extra"),
        (["generate", "runs/a"], "--prompt"),
        (["generate", "runs/a", "--prompt", "x", "--temperature", "0"], "--greedy"),
        (["generate", "runs/a", "--prompt", "x", "--top-p", "1.5"], "at most 1"),
        (["generate", "runs/a", "--prompt", "x", "--top-k", "0"], "at least 1"),
        (["generate", "runs/a", "--prompt", "x", "--greedy", "--temperature", "1"], "not allowed with"),
        (["export", "runs/a", "out"], "--to"),
        (["export", "runs/a", "out", "--to", "onnx"], "onnx"),
        (["import", "hf:a", "out", "--dtype", "float16"], "float16"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_says_what(arguments, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "report", "generate", "export"])
def test_commands_on_a_run_refuse_other_folders_and_name_the_nearest(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/config.yaml").write_text(to_yaml(load_config("quickstart")))
    more = {"generate": ["--prompt", "x"], "export": ["out", "--to", "hf"]}
    assert cli.main([command, "runs/frist", *more.get(command, [])]) == CheckpointError.exit_code
    message = capsys.readouterr().err
    assert "runs/frist" in message
    assert "did you mean runs/first?" in message
    assert not Path("out").exists()
    assert not Path("runs/frist").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a"), 2, "a"),
        (DataError("a"), 3, "a"),
        (CheckpointError("a"), 4, "a"),
        (StorageError("a"), 5, "a"),
        (ClusterError("a"), 6, "a"),
        (MaxlmError("a"), 1, "a"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "", "runs/x"), 5, "runs/x: no space left on device"),
        (PermissionError(13, "", "runs/x"), 5, "runs/x: permission denied"),
        (OSError(30, "", "runs/x"), 5, "runs/x: read-only file system"),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(error, code, message, monkeypatch, capsys):
    def fails(args):
        """Fails."""
        raise error

    monkeypatch.setattr(cli, "show_config", fails)
    assert cli.main(["config", "quickstart"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


def test_an_error_that_is_no_user_s_escapes_with_its_traceback(monkeypatch):
    def fails(args):
        """Fails."""
        raise FileNotFoundError(2, "", "x")

    monkeypatch.setattr(cli, "show_config", fails)
    with pytest.raises(FileNotFoundError):
        cli.main(["config", "quickstart"])


def test_simulated_devices_are_there_when_jax_starts():
    program = (
        "from maxlm.cli import simulate_devices; simulate_devices(3); simulate_devices(4);"
        "import jax; print(jax.device_count(), jax.default_backend())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.stdout.split() == ["4", "cpu"]


def test_flags_of_train_become_keys_of_the_config(tmp_path, monkeypatch, capsys):
    """A key beside them that is wrong shows that they were read as keys, before any process is waited for."""
    monkeypatch.chdir(tmp_path)
    flags = ["--coordinator", "10.0.0.1:1234", "--num-processes", "2", "--process-id", "0"]
    seen = []
    monkeypatch.setattr("maxlm.config.load_config", lambda config, overrides: seen.extend(overrides) or _refuse())
    assert cli.main(["train", "quickstart", *flags]) == 2
    config = load_config("quickstart", seen)
    assert config.distributed.coordinator == "10.0.0.1:1234"
    assert (config.distributed.num_processes, config.distributed.process_id) == (2, 0)
    assert list(tmp_path.iterdir()) == []


def _refuse():
    raise ConfigError("stop here")


def test_the_config_that_is_printed_is_plain_yaml(capsys):
    assert cli.main(["config", "llama3-8b"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["n_layers"] == 32


def test_text_becomes_a_tokenizer_and_a_store_by_two_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for i in range(40):
        Path(f"texts/{i}.txt").write_text(f"Document number {i} says the same words, again and again.\n" * 5)
    sources = ["data.sources=[{kind: text, paths: [texts]}]", "data.workers=1", "data.heldout_fraction=0.2"]
    assert cli.main(["data", "prepare", "quickstart", *sources]) == DataError.exit_code
    assert "maxlm tokenizer train" in capsys.readouterr().err
    assert cli.main(["tokenizer", "train", "quickstart", "tokenizer.vocab_size=300", *sources]) == 0
    assert "300 tokens; next: maxlm data prepare quickstart" in capsys.readouterr().out
    assert cli.main(["data", "prepare", "quickstart", *sources]) == 0
    capsys.readouterr()

    assert cli.main(["data", "inspect", "runs/quickstart/store", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["train"]["documents"] + facts["heldout"]["documents"] == 40
    assert facts["vocab_size"] == 300
    assert cli.main(["data", "inspect", "runs/quickstart/store"]) == 0
    table = capsys.readouterr().out
    assert "train.documents" in table
    assert "Document number" in table


TINY = [
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.d_ff=32", "model.vocab_size=300"),
    *("model.max_seq_len=32", "train.seq_len=32", "train.global_batch_tokens=256", "schedule.warmup_steps=1"),
    *("tokenizer.vocab_size=300", "metrics.tensorboard=false", "metrics.progress=none"),
]


def test_a_run_goes_from_text_to_a_report_by_commands_alone(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i}.txt").write_text(f"Document number {i} says the same words, again and again.\n" * 5)
    source = ["data.sources=[{kind: text, paths: [texts]}]", "data.workers=1", "data.heldout_fraction=0.2"]

    def run(*arguments, code=0):
        done = maxlm(*arguments, cwd=tmp_path, XLA_FLAGS="")
        assert done.returncode == code, done.stderr
        return done

    run("tokenizer", "train", "quickstart", *TINY, *source)
    run("data", "prepare", "quickstart", *TINY, *source)
    run("train", "quickstart", "train.steps=3", *TINY, *source)
    scores = json.loads(run("eval", "runs/quickstart", "--json").stdout)
    assert 4 < scores["eval_loss"] < 7
    sampling = ["--max-tokens", "4", "--greedy", "--json"]
    samples = run("generate", "runs/quickstart", "--prompt", "Doc", "--prompt", "<b>", *sampling).stdout
    assert [(set(pair), pair["prompt"]) for pair in json.loads(samples)] == [
        ({"prompt", "continuation"}, prompt) for prompt in ("Doc", "<b>")
    ]
    (tmp_path / "runs/quickstart/samples.json").write_text(samples)
    run("export", "runs/quickstart", "out", "--to", "hf")
    assert (tmp_path / "out/model.safetensors").is_file()
    assert "runs/quickstart/report.html" in run("report", "runs/quickstart").stdout
    assert "<b>&lt;b&gt;</b>" in (tmp_path / "runs/quickstart/report.html").read_text()
