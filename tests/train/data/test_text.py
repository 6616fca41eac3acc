"""Own text, hub datasets and the standard library: splits, packing, and every kind of bad input."""

import platform
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pytest

from zoo.kernels.errors import ConfigError, DataError
from zoo.train.data import SPLITS, DataModule, PyStdlibConfig, TextConfig, create_source
from zoo.train.data.corpus import FEW_DOCUMENTS, Shares, files_corpus
from zoo.train.data.pystdlib import stdlib_corpus

from .conftest import PROSE


def text(source, split) -> bytes:
    """All inputs of a split in a row, the filling of the last window included."""
    return b"".join(bytes(row.tolist()) for batch in _evaluation(source, split) for row in batch["inputs"])


def _evaluation(source, split):
    data = DataModule(source.config, seed=0)
    return data._evaluation(split)


def write_files(folder: Path, number: int) -> dict[str, bytes]:
    files = {f"part{i % 3}/file{i}.txt": f"<{i}>{PROSE * (1 + i % 3)}".encode() for i in range(number)}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def test_a_single_file_is_cut_into_blocks(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i} {PROSE}" for i in range(100)), encoding="utf-8")
    source = create_source(TextConfig(path=str(path), seq_len=32))
    whole = path.read_bytes()
    blocks = [text(source, split).rstrip(b"\0") for split in SPLITS]
    assert b"".join(blocks) == whole
    assert [len(block) / len(whole) for block in blocks] == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
    assert all(block.decode() for block in blocks)  # no character is cut
    batch = next(iter(_evaluation(source, "test")))
    assert batch["segment_ids"].shape == batch["inputs"].shape == (16, 32)
    assert (batch["segment_ids"] == 0).all()
    assert (source.unit, source.vocab_size, source.bytes_per_label("test")) == ("byte", 256, 1.0)


def test_many_files_are_split_by_file(tmp_path):
    files = write_files(tmp_path, 3 * FEW_DOCUMENTS)
    (tmp_path / ".hidden").write_text("not to be read")
    (tmp_path / "part0" / "empty.txt").write_text("")
    (tmp_path / "twin.txt").write_bytes(files["part0/file0.txt"])
    source = create_source(TextConfig(path=str(tmp_path), seq_len=16, validation_share=0.2, test_share=0.2))
    seen = []
    for split in SPLITS:
        documents = [bytes(document) for document in source.corpus.documents(split)]
        packed = text(source, split)
        assert packed[: len(b"".join(documents))] == b"".join(documents)
        assert len(documents) > 20
        seen += documents
    assert sorted(seen) == sorted(files.values())

    # Another file moves no file to another split.
    before = {split: set(source.corpus.documents(split)) for split in SPLITS}
    (tmp_path / "another.txt").write_text("one more")
    after = create_source(source.config).corpus
    assert all(before[split] <= set(after.documents(split)) for split in SPLITS)
    assert after.digest != source.corpus.digest


def test_a_pattern_takes_what_it_matches(tmp_path):
    files = write_files(tmp_path, 9)
    source = create_source(TextConfig(path=str(tmp_path / "**" / "file[12].txt"), seq_len=8))
    assert b"".join(sorted(source.corpus.documents("train"))).count(b"<") == 2
    assert source.corpus.files == ("part1/file1.txt", "part2/file2.txt")
    assert files


def test_documents_stay_apart_in_a_window(tmp_path):
    write_files(tmp_path, 5)
    source = create_source(TextConfig(path=str(tmp_path), seq_len=64, eval_batch_size=1))
    rows = list(_evaluation(source, "train"))
    boundaries = 0
    for row in rows:
        segments, targets = row["segment_ids"][0], row["targets"][0]
        ends = segments[1:] != segments[:-1]
        assert (targets[:-1][ends] == -100).all()
        same = ~ends & (targets[:-1] != -100)
        assert (targets[:-1][same] == row["inputs"][0][1:][same]).all()
        boundaries += int(ends.sum())
    assert boundaries >= 4


def test_kept_examples_are_spread_over_the_split(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 50)
    whole = create_source(TextConfig(path=str(tmp_path), seq_len=16)).load("train")[0]
    (few,) = create_source(TextConfig(path=str(tmp_path), seq_len=16, num_examples=5)).load("train")
    kept = few.with_format("numpy")[:]["inputs"]
    every = whole.with_format("numpy")[:]["inputs"]
    assert len(kept) == 5
    np.testing.assert_array_equal(kept[[0, 2, 4]], every[[0, round((len(every) - 1) / 2), -1]])


def test_a_tokenizer_gives_tokens_and_honest_bytes(tmp_path, tokenizer_file):
    (tmp_path / "a.txt").write_text(PROSE * 40, encoding="utf-8")
    config = TextConfig(path=str(tmp_path), tokenizer=str(tokenizer_file), seq_len=16)
    source = create_source(config)
    assert (source.unit, source.vocab_size) == ("token", 300)
    (document,) = source.corpus.documents("train")
    tokens, sizes = source.codec.encode_document(document)
    rows = source.load("train")[0].with_format("numpy")[:]
    np.testing.assert_array_equal(rows["inputs"].ravel()[: len(tokens)], tokens)
    assert source.bytes_per_label("train") == pytest.approx(sizes[1:].sum() / (len(tokens) - 1))
    assert source.bytes_per_label("train") > 1.5
    wide = TextConfig(path=str(tmp_path), tokenizer=str(tokenizer_file), seq_len=16, vocab_size=512)
    assert create_source(wide).vocab_size == 512


def documents_of(number: int) -> list[str]:
    return [f"{i}: {PROSE}" for i in range(number)]


@pytest.mark.parametrize("form", ["jsonl", "saved", "saved table"])
def test_a_dataset_folder_counts_as_a_hub_dataset(tmp_path, form):
    table = datasets.Dataset.from_dict({"body": documents_of(300), "number": list(range(300))})
    if form == "jsonl":
        table.to_json(tmp_path / "train.jsonl")
    elif form == "saved":
        datasets.DatasetDict(train=table).save_to_disk(tmp_path)
    else:
        table.save_to_disk(tmp_path)
    source = create_source(TextConfig(hub=str(tmp_path), seq_len=32, validation_share=0.2, test_share=0.2))
    split = {name: list(source.corpus.documents(name)) for name in SPLITS}
    assert sorted(d for of in split.values() for d in of) == sorted(d.encode() for d in documents_of(300))
    assert min(map(len, split.values())) > 30
    assert text(source, "test").startswith(split["test"][0])
    assert create_source(source.config).corpus == source.corpus


def test_a_dataset_keeps_its_own_splits(tmp_path):
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": [*documents_of(200), "", None]}),
            "dev": datasets.Dataset.from_dict({"text": ["own validation " * 9]}),
        }
    ).save_to_disk(tmp_path)
    corpus = create_source(TextConfig(hub=str(tmp_path), test_share=0.2, validation_share=0.3)).corpus
    assert list(corpus.documents("validation")) == [b"own validation " * 9]
    train, test = list(corpus.documents("train")), list(corpus.documents("test"))
    assert sorted(train + test) == sorted(document.encode() for document in documents_of(200))
    assert 0.1 < len(test) / 200 < 0.3


def test_a_small_dataset_is_cut_into_blocks(tmp_path):
    datasets.Dataset.from_dict({"text": [PROSE * 20]}).save_to_disk(tmp_path)
    corpus = create_source(TextConfig(hub=str(tmp_path))).corpus
    assert b"".join(next(corpus.documents(split)) for split in SPLITS) == (PROSE * 20).encode()


@pytest.mark.parametrize(
    ("tables", "column", "message"),
    [
        ({"train": {"a": ["x"], "b": ["y"]}}, None, r"data\.column= \(of strings: a, b\)"),
        ({"train": {"n": [1]}}, None, "of strings: none"),
        ({"train": {"text": ["x"]}}, "txt", "did you mean 'text'"),
        ({"train": {"text": ["x"], "n": [1]}}, "n", "no column of strings"),
        ({"test": {"text": ["x"]}}, None, "expected one called train"),
    ],
)
def test_a_dataset_without_the_right_parts_is_refused(tmp_path, tables, column, message):
    datasets.DatasetDict({k: datasets.Dataset.from_dict(v) for k, v in tables.items()}).save_to_disk(tmp_path)
    with pytest.raises(DataError, match=message):
        create_source(TextConfig(hub=str(tmp_path), column=column))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"data\.hub=some/thing: cannot be loaded \(ConnectionError") as caught:
        create_source(TextConfig(hub="some/thing"))
    assert "\n" not in str(caught.value)


def test_bad_paths_and_settings_are_one_clear_line(tmp_path, tokenizer_file):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "hollow").mkdir()
    for name in "ab":
        (tmp_path / "hollow" / name).write_text("")
    (tmp_path / "good.txt").write_text(PROSE)
    good = str(tmp_path / "good.txt")
    cases = [
        ({"path": "/nowhere"}, DataError, r"data\.path=/nowhere: no such file or folder"),
        ({"path": str(tmp_path / "*.rst")}, DataError, "no file matches"),
        ({"path": str(tmp_path / "empty.txt")}, DataError, "an empty file"),
        ({"path": str(tmp_path / "nothing")}, DataError, "no files"),
        ({"path": str(tmp_path / "hollow")}, DataError, "2 files, all empty"),
        ({}, ConfigError, "neither"),
        ({"path": good, "hub": "a/b"}, ConfigError, "both"),
        ({"path": good, "vocab_size": 200}, DataError, "outside the vocabulary; give at least 256"),
        ({"path": good, "vocab_size": 256, "tokenizer": str(tokenizer_file)}, DataError, "give at least 300"),
        ({"path": good, "seq_len": 1}, ConfigError, r"data\.seq_len=1 is not valid: expected at least 2"),
        ({"path": good, "validation_share": 0.6, "test_share": 0.4}, ConfigError, "less than 1"),
        ({"path": good, "test_share": 0.0}, ConfigError, "more than 0"),
    ]
    for settings, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            create_source(TextConfig(**settings))
        assert "\n" not in str(caught.value)


def test_too_little_text_for_a_window_is_one_clear_line(tmp_path, tokenizer_file):
    (tmp_path / "good.txt").write_text(PROSE)
    for tokenizer, unit in ((None, "bytes"), (str(tokenizer_file), "tokens")):
        data = DataModule(TextConfig(path=str(tmp_path), seq_len=60, tokenizer=tokenizer), seed=0)
        with pytest.raises(DataError, match=rf"validation split has \d {unit}, too short .*data\.seq_len=60"):
            data.val_dataloader()


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"cannot read .*a\.txt"):
        files_corpus("data.path=x", tmp_path, [tmp_path / "a.txt"], Shares())


def test_text_that_is_no_utf8_needs_bytes(tmp_path, tokenizer_file):
    (tmp_path / "latin.txt").write_bytes("über ".encode("latin-1") * 100)
    data = DataModule(TextConfig(path=str(tmp_path), seq_len=8), seed=0)
    assert len(list(data.val_dataloader())) >= 1
    data = DataModule(TextConfig(path=str(tmp_path), seq_len=8, tokenizer=str(tokenizer_file)), seed=0)
    with pytest.raises(DataError, match="not UTF-8"):
        data.val_dataloader()


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text(PROSE * 20)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "good.txt" / "cache")
    data = DataModule(TextConfig(path=str(tmp_path / "good.txt"), seq_len=8), seed=0)
    with pytest.raises(DataError, match="set HF_DATASETS_CACHE to a writable folder"):
        data.prepare_data()


def test_the_standard_library_is_split_by_file():
    source = create_source(PyStdlibConfig(seq_len=1024))
    root = Path(sysconfig.get_path("stdlib"))
    files = source.corpus.files
    assert {"json/decoder.py", "argparse.py"} <= set(files)
    assert not any("test" in Path(file).parts or "site-packages" in Path(file).parts for file in files)
    contents = {split: set(source.corpus.documents(split)) for split in SPLITS}
    together = sum(len(of) for of in contents.values())
    assert together == len(set.union(*contents.values()))  # no file is in two splits
    assert set.union(*contents.values()) == {(root / file).read_bytes() for file in files}
    test_bytes = sum(map(len, contents["test"]))
    (windows,) = source.load("test")
    assert len(windows) == -(-test_bytes // 1024)
    assert len(source.load("validation")[0]) <= 256
    assert source.facts() == {
        "corpus": "data=pystdlib",
        "corpus_hash": source.corpus.digest,
        "python": platform.python_version(),
    }
    batch = next(iter(_evaluation(source, "test")))
    assert bytes(batch["inputs"][0].tolist()) in b"".join(source.corpus.documents("test"))


def test_a_python_without_sources_is_one_clear_line(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "numpy.py").write_text("x = 1")
    with pytest.raises(DataError, match=r"no \.py sources"):
        stdlib_corpus(tmp_path)


def test_a_split_of_one_token_documents_has_nothing_to_predict(tmp_path):
    for number in range(256):
        (tmp_path / f"{number:03}").write_bytes(bytes([number]))
    with pytest.raises(DataError, match="the test split has nothing to predict"):
        create_source(TextConfig(path=str(tmp_path), seq_len=2)).load("test")
