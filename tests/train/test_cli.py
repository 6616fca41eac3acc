"""The command line: settings, help, sweeps, and every error as one line."""

import json
import shlex
import subprocess
import sys

import pytest

from zoo.kernels.errors import ConfigError
from zoo.train import cli
from zoo.train.config import train_config
from zoo.train.help import help_text

from .conftest import TINY


@pytest.fixture
def zoo_train(tmp_path, monkeypatch, capsys):
    """Runs `python -m zoo.train WORDS` in this process; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_DEBUG", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def go(words: str, *more: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["zoo.train", *shlex.split(words), *more])
        status = cli.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return go


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("arch=mambo", 2, "no architecture 'mambo': did you mean 'mamba' or 'mamba2'? (known: "),
        ("data=mqa", 2, "no dataset 'mqa': did you mean 'mqar'?"),
        ("trainer=gp", 2, "no trainer 'gp': did you mean 'gpu'?"),
        ("optim=sgd", 2, "no optim 'sgd': known: adamw"),
        ("arch.d_stat=3", 2, "arch has no setting 'd_stat': did you mean 'd_state'"),
        ("data.seq_le=3", 2, "data has no setting 'seq_le': did you mean 'seq_len'"),
        ("trainer.maxsteps=3", 2, "trainer has no setting 'maxsteps': did you mean 'max_steps'"),
        ("optim.rl=3", 2, "optim has no setting 'rl': did you mean 'lr'"),
        ("sede=3", 2, "no setting 'sede': did you mean 'seed'?"),
        ("+extra=3", 2, "a run has no setting 'extra'"),
        ("arch.d_state=-1", 2, "arch.d_state=-1 is not valid: expected at least 1"),
        ("arch.d_model=abc", 2, "arch.d_model=abc is not valid: expected an integer"),
        ("arch.d_model=1000000000000", 1, "out of memory: lower data.batch_size"),
        ("optim.lr=inf", 2, "optim.lr=inf is not valid: expected a finite number"),
        ("seed=99999999999999999999999", 2, "is not valid: expected at most 9223372036854775807"),
        ("~arch", 2, "~arch takes away what every run needs"),
        ("seed=0,1", 2, "'seed=0,1' are several values: -m before them makes a run of each"),
        ("data.path=a,b.txt data=text", 2, """as one value, write 'data.path="a,b.txt"'"""),
        ("'data.path=my book (1).txt'", 2, """: write 'data.path="my book (1).txt"', which takes"""),
        ("data.path=k=v.txt", 2, """: write 'data.path="k=v.txt"', which takes"""),
        ("-x", 2, "no option '-x': settings are written key=value"),
        ("-m seed=0,1 --foo", 2, "no option '--foo': settings are written key=value"),
        ("-m seed=0,1 name=same", 2, "name=same is one folder for several runs"),
        ("arch.d_model=null", 2, "arch.d_model=None is not valid: expected an integer"),
        (shlex.join(["arch=mamba", "arch.backend=nonsense", *TINY]), 2, "nonsense"),
        ("arch=hybrid arch.members=3", 2, "arch.members=3 is not valid: expected a mapping"),
        ("arch=hybrid arch.members.mambo.d_state=3", 2, "expected settings of mamba, transformer, not of mambo"),
        ("arch=hybrid arch.members.mamba.d_stat=3", 2, "'mamba' of the hybrid has no setting 'd_stat': did you mean"),
        ("arch=hybrid arch.pattern=mamba", 2, "arch.pattern=mamba is not valid: expected a list"),
        ("data.batch_size=0", 2, "data.batch_size=0 is not valid: expected at least 1"),
        ("data.seq_len=63", 2, "data.seq_len=63: expected an even number"),
        ("data.seq_len=7 data.num_pairs=1", 2, "data.seq_len=7: expected an even number"),
        ("data=text", 2, "data=text got neither of data.path and data.hub"),
        ("data=text data.path=/nowhere", 2, "data.path=/nowhere: no such file or folder"),
        ("trainer.max_steps=0", 2, "trainer.max_steps=0 is not valid: expected at least 1"),
        ("trainer.max_steps=many", 2, "trainer.max_steps=many is not valid: expected an integer or null"),
        ("trainer.precision=fp8", 2, "trainer.precision='fp8' is not valid: did you mean 'fp32'"),
        ("trainer.stop_at=2", 2, "trainer.stop_at=2.0 is not valid: expected at most 1"),
        ("optim.lr=0", 2, "optim.lr=0.0 is not valid: expected more than 0"),
        ("seed=-1", 2, "seed=-1 is not valid: expected at least 0"),
        ("runs_dir=/proc/nowhere/runs", 2, "runs_dir=/proc/nowhere/runs cannot be written"),
        ("trainer.max_steps", 2, "'trainer.max_steps' is not understood: write key=value"),
        ("arch.backend=cuda data.seq_len=32", 2, "; arch.backend=auto takes one that runs"),
        ("'trainer.max_steps=${nothing}'", 2, "Interpolation key 'nothing' not found"),
        ("-m arch=mamba,mambo", 2, "no architecture 'mambo'"),
    ],
)
def test_a_mistake_is_one_line_with_the_mend(words, status, line, zoo_train, tmp_path):
    got, _, err = zoo_train(words)
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1
    assert got == status
    assert "-m" in words or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", ["'arch.members={mamba: {d_state: 3}}'", "arch.members.mamba.d_state=3", "+arch.members.mamba.d_state=3"]
)
def test_members_of_a_hybrid_are_told_as_their_help_says(words):
    assert train_config(["arch=hybrid", *shlex.split(words)]).model["members"] == {"mamba": {"d_state": 3}}


def test_a_value_of_odd_characters_is_taken_as_the_message_says(zoo_train):
    for path in ("my book (1).txt", "k=v.txt", 'a,"b".txt'):
        _, _, err = zoo_train("data=text", f"data.path={path}")
        mend = err[err.index("write ") + len("write ") :].partition(", which")[0].strip()
        assert zoo_train("data=text", *shlex.split(mend))[2].startswith(f"error: data.path={path}: no such file")


def test_ctrl_c_while_the_imports_run_is_one_line():
    code = """if True:
        import runpy, sys
        class Interrupt:
            def find_spec(self, name, *args):
                if name == "hydra":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupt())
        runpy.run_module("zoo.train", run_name="__main__")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_no_gpu_is_one_line(zoo_train, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = zoo_train("trainer=gpu")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: trainer.accelerator=gpu cannot run here")
    assert "trainer=auto" in err


def test_debug_shows_the_traceback(zoo_train, monkeypatch):
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(ConfigError, match="at least 1"):
        zoo_train("arch.d_state=-1")


def test_a_failing_run_exits_with_1(toy, zoo_train):
    def explode(mixer, call):
        mixer.inner.weight.data.fill_(float("nan"))

    toy.at_step = explode
    status, _, err = zoo_train("arch=toy trainer.max_steps=2", *TINY)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(
        "error: step 1: cross_entropy is not finite, first seen in parameter blocks.0.mixers.0.inner.weight"
    )


def test_an_unforeseen_error_is_one_line_too_and_leaves_a_summary(toy, zoo_train, tmp_path):
    def bug(mixer, call):
        raise RuntimeError("a bug\nof two lines")

    toy.at_step = bug
    status, _, err = zoo_train("arch=toy trainer.max_steps=2 name=x", *TINY)
    assert (status, err.count("\n")) == (1, 1)
    assert "RuntimeError: a bug of two lines" in err
    assert "ZOO_DEBUG=1" in err
    assert json.loads((tmp_path / "runs/x/summary.json").read_text())["status"] == "failed"


def test_out_of_memory_names_the_mend(toy, zoo_train):
    def explode(mixer, call):
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    toy.at_step = explode
    status, _, err = zoo_train("arch=toy trainer.max_steps=2", *TINY)
    assert status == 1
    mend = "lower data.batch_size and raise trainer.accumulate instead, or take a smaller model"
    assert err == f"error: out of memory after step 0: {mend}\n"


def test_ctrl_c_exits_with_130(toy, zoo_train):
    import signal

    toy.at_step = lambda mixer, call: call == 2 and signal.raise_signal(signal.SIGINT)
    status, _, err = zoo_train("arch=toy trainer.max_steps=9 trainer.val_every=3 name=x", *TINY)
    assert (status, err) == (130, "interrupted after step 2: the same command with resume=true goes on in runs/x\n")


def test_the_debug_preset_runs_everything_and_prints_a_table(toy, zoo_train, tmp_path):
    status, out, err = zoo_train("arch=toy trainer=debug", *TINY[:6])
    assert (status, err) == (0, "")
    assert out.startswith("toy on mqar: ")
    assert "step 2/4  loss " in out
    assert "test accuracy" in out
    assert "chance 0.0156" in out
    assert "\nfolder: runs/toy-mqar" in out
    assert out.endswith("\nnext: python -m zoo.train arch=transformer data=mqar\n")
    assert not (tmp_path / "outputs").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    summary = json.loads(next(tmp_path.glob("runs/toy*/summary.json")).read_text())
    assert summary["command"].startswith("python -m zoo.train arch=toy trainer=debug")


def test_a_sweep_runs_all_and_tells_what_failed(toy, zoo_train, tmp_path):
    def explode(mixer, call):
        if call == 2:
            mixer.inner.weight.data.fill_(float("nan"))

    toy.at_step = explode
    status, _, err = zoo_train("-m arch=toy seed=0,1,2 trainer.max_steps=1", *TINY)
    lines = err.splitlines()
    assert status == 1
    assert len(lines) == 2
    assert lines[0].startswith("error: step 1: cross_entropy is not finite")
    assert lines[1].startswith("error: 1 of the sweep's runs failed: ")
    assert "seed=1" in lines[1]
    names = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert [name.rpartition("-")[2] for name in names[1:]] == ["s1", "s2"]
    assert len(names) == 3


def test_words_on_both_sides_of_an_option_and_the_help_of_a_sweep(zoo_train):
    status, out, _ = zoo_train("trainer.max_steps=7 --cfg job seed=3")
    assert (status, "max_steps: 7" in out, "seed: 3" in out) == (0, True, True)
    assert zoo_train("-m --help arch=transformer,mamba")[0] == 0


def test_cfg_job_shows_the_settings_and_runs_nothing(zoo_train, tmp_path):
    status, out, _ = zoo_train("arch=transformer trainer.max_steps=7 --cfg job")
    assert status == 0
    assert "max_steps: 7" in out
    assert "n_heads: 4" in out
    assert not list(tmp_path.iterdir())


def test_help_names_every_group_option_and_setting(zoo_train):
    status, out, _ = zoo_train("--help")
    assert status == 0
    for word in ("arch=mamba", "arch=transformer", "data=mqar", "data=pystdlib", "data=text", "trainer=debug"):
        assert word in out
    for word in ("arch.d_state", "data.seq_len", "trainer.max_steps", "optim.lr", "resume", "seed"):
        assert f"  {word} " in out
    assert "Hydra" in out
    assert "yaml" not in out.lower()
    assert max(map(len, out.splitlines())) <= 120


def test_help_shows_the_settings_of_the_chosen_architecture():
    assert "arch.n_heads" in help_text(["arch=transformer", "--help"])
    assert "arch.n_heads" not in help_text(["--help"])


def test_help_shows_the_choices_of_a_setting():
    text = " ".join(help_text([]).split())
    for choices in ("nano or zoology_fig2 or based_recall", "fp32 or bf16-mixed or fp16-mixed", "auto or cpu or gpu"):
        assert choices in text
    assert "settings of data=mqar (null: its own choice" in text


def test_every_setting_has_a_help_text():
    for line in help_text(["arch=transformer", "data=text"]).splitlines():
        assert not line.startswith("  arch.") or len(line.split()) > 2, line


def test_presets():
    assert train_config(["trainer=gpu"]).trainer.precision == "bf16-mixed"
    assert train_config(["trainer=debug"]).trainer.max_steps == 4
    assert train_config(["trainer=debug", "trainer.max_steps=9"]).trainer.max_steps == 9
    assert train_config().trainer.accelerator == "auto"


def test_settings_arrive_with_their_types():
    config = train_config(["arch=mamba", "arch.d_state=32", "data.num_pairs=2", "optim.lr=3", "seed=5", "resume=true"])
    assert config.model["d_state"] == 32
    assert "vocab_size" not in config.model
    assert config.data.num_pairs == 2
    assert (config.optim.lr, type(config.optim.lr)) == (3.0, float)
    assert (config.seed, config.resume) == (5, True)


def test_a_python_caller_gets_the_same_errors():
    with pytest.raises(ConfigError, match=r"^no architecture 'mambo': did you mean 'mamba'"):
        train_config(["arch=mambo"])
