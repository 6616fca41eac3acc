"""Run folders: names, claims, and finding a run again."""

import json
import math

import pytest

from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.train.folder import RunFolder, claim, default_name, different_keys, find

DEFAULTS = {"arch": {"d_state": 16, "eps": 1e-5}, "data": {"seq_len": None}, "optim": {"lr": None}}


def tree(seed: int = 0, **changes: object) -> dict:
    return {
        "arch": {"name": "mamba", "d_state": 16, "eps": 1e-5, "tied": changes.get("tied")},
        "data": {"name": "mqar", "seq_len": changes.get("seq_len")},
        "optim": {"lr": changes.get("lr")},
        "trainer": {"segment_length": changes.get("segment_length")},
        "objective": changes.get("objective", "causal"),
        "mask_rate": changes.get("mask_rate"),
        "seed": seed,
        "name": changes.get("name"),
        "runs_dir": "runs",
        "resume": changes.get("resume", False),
    }


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (tree(), "mamba-mqar"),
        (tree(3), "mamba-mqar-s3"),
        (tree(seq_len=[8, 16]), "mamba-mqar-seq_len8_16"),
        (tree(1, lr=0.003, seq_len=64), "mamba-mqar-seq_len64-lr0.003-s1"),
        (tree(objective="classify"), "mamba-mqar-classify"),
        (tree(1, objective="masked", mask_rate=0.3), "mamba-mqar-masked-mask_rate0.3-s1"),
        (tree(segment_length=256, seq_len=512), "mamba-mqar-segments256-seq_len512"),
        (tree(2, seq_len="a/very long value" * 5), "mamba-mqar-s2"),
    ],
)
def test_default_names(settings, name):
    assert default_name(settings, DEFAULTS) == name


def test_a_default_name_gets_a_number_and_a_given_one_is_refused_when_taken(tmp_path):
    assert [claim(tmp_path, None, "a").path.name for _ in range(3)] == ["a", "a-2", "a-3"]
    with pytest.raises(ConfigError, match=r"resume=true .* name="):
        claim(tmp_path, "a", "other")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"runs_dir=.*file cannot be written"):
        claim(tmp_path / "file", None, "a")


def test_the_newest_run_with_equal_settings_is_found(tmp_path):
    for settings in (tree(lr=1.0), tree(lr=2.0), tree(lr=1.0, name="mine", resume=True), tree(lr=3.0)):
        claim(tmp_path, None, "a").write_config(settings)
    claim(tmp_path, None, "a")  # killed before its settings were written
    claim(tmp_path, None, "a-b").write_config(tree(lr=1.0))
    assert find(tmp_path, None, "a", tree(lr=1.0)).path.name == "a-3"
    assert find(tmp_path, None, "a", tree(lr=2.0)).path.name == "a-2"
    assert find(tmp_path, "a-4", "a", tree(lr=3.0)).path.name == "a-4"
    assert find(tmp_path, None, "nothing", tree()) is None
    assert find(tmp_path, "nothing", "a", tree()) is None


def test_no_run_with_equal_settings_names_what_differs(tmp_path):
    claim(tmp_path, None, "a").write_config(tree(lr=1.0))
    with pytest.raises(
        CheckpointError, match=r"^resume=true: .*a was run with other settings \(optim.lr: 1.0 there, 2.0"
    ):
        find(tmp_path, None, "a", tree(lr=2.0))


def test_settings_survive_the_file(tmp_path):
    folder = claim(tmp_path, None, "a")
    settings = tree(lr=1e-8, seq_len="null", name="1e3") | {"trainer": {"x": True, "y": None, "z": "1"}}
    folder.write_config(settings)
    assert different_keys(folder.read_config(), settings) == []
    assert folder.read_config() == settings


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\x00"])
def test_damaged_settings_are_no_settings(text, tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text(text)
    assert not folder.read_config()


def test_the_summary_is_strict_json(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_summary({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": -math.inf, "e": "text"}})
    assert json.loads(folder.summary.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None, "e": "text"},
    }
    folder.summary.write_text("{")
    assert folder.read_summary() is None


def test_a_long_list_of_changes_says_so_and_names_what_is_not_there(tmp_path):
    claim(tmp_path, None, "a").write_config(tree() | {"old": 1, "older": {"x": 1, "y": 2, "z": 3}})
    with pytest.raises(CheckpointError, match=r"\(seed: .*old: 1 there, no such setting now.* and 1 more\)"):
        find(tmp_path, None, "a", tree(1))
