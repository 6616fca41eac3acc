"""The hub: its cache without a network, its protocol against a server on this machine, cards, lists, tokenizers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from zoo.kernels.errors import CheckpointError, DataError
from zoo.pretrained.hub import model_card
from zoo.pretrained.variants import variants

from .hub_server import COMMIT, Hub
from .published import VOCAB, assert_equal_weights, randomised

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
NAMED = '{"a": 0, "b": 1, "c": 2}'


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = randomised(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **SIZES)))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"def": 0, "x": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill_cache(cache: Path, name: str, files: dict[str, bytes]) -> None:
    """As a download leaves it behind."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file, content in files.items():
        (snapshot / file).write_bytes(content)


def run(code: str, cache: Path, **environment: str) -> list:
    """Runs code in a process of its own, because the hub's package reads its variables once.

    Returns what it prints, each line as JSON.
    """
    more = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import json, zoo\nfrom zoo.kernels.errors import ZooError\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **more, "HF_TOKEN": "hf_none", **environment},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def trying(*calls: str) -> str:
    """Code that prints the error of each call."""
    return "\n".join(
        f"try:\n    {call}\n    print('null')\nexcept ZooError as error:\n    print(json.dumps(str(error)))"
        for call in calls
    )


def test_the_cache_without_a_network(llama, tmp_path) -> None:
    fill_cache(tmp_path, "someone/llama", contents(llama))
    without = {name: content for name, content in contents(llama).items() if not name.endswith(".safetensors")}
    fill_cache(tmp_path, "someone/half", without)
    code = (
        "model = zoo.load_pretrained('someone/llama')\n"
        "print(json.dumps(sum(p.detach().double().sum().item() for p in model.parameters())))\n"
        "print(json.dumps(zoo.load_tokenizer('someone/llama').encode('def x y')))\n"
    )
    calls = ["zoo.load_pretrained('no/such')", "zoo.load_pretrained('someone/half')", "zoo.push_to_hub(model, 'a/b')"]
    total, tokens, absent, half, push = run(code + trying(*calls), tmp_path, HF_HUB_OFFLINE="1")
    assert total == pytest.approx(
        sum(p.detach().double().sum().item() for p in zoo.load_pretrained(llama).parameters())
    )
    assert tokens == [0, 1, 2]
    assert "no folder 'no/such'" in absent
    assert "HF_HUB_OFFLINE=1 is set" in absent
    assert "holds no weights" in half or "the cache does not hold all of it" in half
    assert "HF_HUB_OFFLINE=1" in push


def test_no_network_is_one_line(tmp_path) -> None:
    (message,) = run(
        trying("zoo.load_pretrained('a/b')"), tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0"
    )
    assert "\n" not in message
    assert "http://127.0.0.1:9 does not answer, and the cache does not hold all of it" in message


def test_download_and_upload(llama, tmp_path) -> None:
    hub = Hub()
    files = contents(llama)
    hub.repositories["someone/llama"] = files | {"pytorch_model.bin": b"not wanted", "flax_model.msgpack": b"neither"}
    pickled = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    torch.save(LlamaForCausalLM.from_pretrained(llama).state_dict(), tmp_path / "weights")
    hub.repositories["someone/old"] = pickled | {"pytorch_model.bin": (tmp_path / "weights").read_bytes()}
    hub.repositories["someone/gated"] = files
    hub.gated.add("someone/gated")
    rwkv = tmp_path / "run" / "model"
    zoo.save_pretrained(zoo.create_model("rwkv7", vocab_size=7, d_model=16), rwkv, tokenizer={"kind": "bytes"})
    summary = {"arch": "rwkv7", "data": "mqar", "params": 123, "command": "python -m zoo.train arch=rwkv7"}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"metrics": {"test": {"acc": 0.75}}}))
    code = (
        f"loaded = zoo.load_pretrained('someone/llama', revision='{COMMIT}')\n"
        "zoo.load_pretrained('someone/old')\n"
        f"zoo.push_to_hub({str(tmp_path / 'run')!r}, 'me/rwkv7-nano', licence='apache-2.0')\n"
        "zoo.push_to_hub(loaded, 'me/llama', format='transformers')\n"
        f"zoo.save_pretrained(zoo.load_pretrained('me/rwkv7-nano'), {str(tmp_path / 'again')!r})\n"
        f"zoo.save_pretrained(zoo.load_pretrained('me/llama'), {str(tmp_path / 'llama')!r})\n"
    )
    calls = ["zoo.load_pretrained('no/such')", "zoo.load_pretrained('someone/llama', revision='nope')"]
    calls += ["zoo.load_pretrained('someone/gated')", "zoo.load_pretrained('someone/llama/x.pth')"]
    with hub.running():
        errors = run(code + trying(*calls), tmp_path / "cache", HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0")
    for error, expected in zip(
        errors, ["the hub has no no/such", "no revision 'nope'", "agreement", "no file 'x.pth'"], strict=True
    ):
        assert expected in error
    assert not any("someone/llama/resolve" in r and r.endswith(("bin", "msgpack")) for r in hub.requests)
    assert_equal_weights(zoo.load_pretrained(tmp_path / "again"), zoo.load_pretrained(rwkv))
    assert_equal_weights(zoo.load_pretrained(tmp_path / "llama"), zoo.load_pretrained(llama))
    card = hub.repositories["me/rwkv7-nano"]["README.md"].decode()
    for part in (
        'license: "apache-2.0"',
        "# rwkv7-nano",
        "`rwkv7`",
        "| data | mqar |",
        "| test | acc | 0.75 |",
        "zoo.train",
    ):
        assert part in card
    assert set(hub.repositories["me/rwkv7-nano"]) == {"README.md", "config.json", "model.safetensors"}
    assert json.loads(hub.repositories["me/llama"]["config.json"])["model_type"] == "llama"


def test_a_card_without_a_run() -> None:
    card = model_card("me/thing", "mamba", None, None)
    assert card.startswith("---\nlibrary_name:")
    assert "license" not in card
    assert "Training" not in card


def test_the_table_of_variants() -> None:
    names = zoo.list_models(pretrained=True)
    assert set(variants()) <= set(names)
    assert zoo.list_models("rwkv-7*", pretrained=True) == [name for name in names if name.startswith("rwkv-7")]
    assert {row.family for row in variants().values()} <= set(zoo.list_models())
    public = [row.hub_id for row in variants().values() if row.hub_id is not None]
    assert len(set(public)) == len(public)


def test_the_table_on_the_command_line() -> None:
    shown = [
        subprocess.run(
            [sys.executable, "-m", "zoo", "list", "--pretrained", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "160"},
        )
        for words in ([], ["smollm*"], ["nothing*"])
    ]
    assert shown[0].returncode == 0, shown[0].stderr
    assert all(name in shown[0].stdout for name in variants())
    assert "HuggingFaceTB/SmolLM2-135M" in shown[1].stdout
    assert "mamba" not in shown[1].stdout
    assert shown[2].returncode == 2
    assert "no pretrained variant matches 'nothing*'" in shown[2].stderr


def test_a_name_that_is_nearly_one() -> None:
    with pytest.raises(
        CheckpointError, match="no folder 'mamba-130', and no variant of that name: did you mean 'mamba-130m'"
    ):
        zoo.load_pretrained("mamba-130")


def test_tokenizers(llama, tmp_path) -> None:
    codec = zoo.load_tokenizer(llama)
    assert codec.decode(codec.encode("def x")) == "def x"
    zoo.save_pretrained(
        zoo.load_pretrained(llama), tmp_path / "saved", format="transformers", tokenizer=codec.to_dict()
    )
    assert zoo.load_tokenizer(tmp_path / "saved").encode("x def") == [1, 0]
    zoo.save_pretrained(
        zoo.create_model("mamba", vocab_size=256, d_model=8), tmp_path / "own", tokenizer={"kind": "bytes"}
    )
    assert zoo.load_tokenizer(tmp_path / "own").encode("a") == [97]


def test_tokenizers_of_other_kinds(llama, tmp_path) -> None:
    for name, content in contents(llama).items():
        if name != "tokenizer.json":
            (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"comes without a tokenizer: expected tokenizer.json"):
        zoo.load_tokenizer(tmp_path)
    tokens = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(tokens))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert zoo.load_tokenizer(tmp_path).encode("abb") == [3, 2]
    torch.save({"emb.weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="a file of weights without a tokenizer"):
        zoo.load_tokenizer(tmp_path / "a.pth")


def test_published_models_generate_on_the_command_line(llama) -> None:
    words = ["zoo", "generate", f"model={llama}", "prompt=def x", "max_new_tokens=5", "temperature=0"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def x")
