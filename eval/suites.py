"""Suites: the long-range tasks that a trained model can be put to, each by its dataset and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zoo.codec import Codec
from zoo.eval.evaluate import evaluate
from zoo.eval.history import History
from zoo.eval.text import by_position, find_number, windows
from zoo.kernels.errors import ZooError
from zoo.model import Model
from zoo.train.config import as_override, train_config
from zoo.train.data import DataModule, ListOpsConfig, MQARConfig
from zoo.train.data.text import PackedText
from zoo.train.objectives import make_objective


@dataclass(frozen=True)
class Entry:
    """A task of a suite.

    A synthetic task is for models that were trained on it: the settings of that training hold, but for `longer`.
    A task of kind "position" or "number" is for every model of text.
    """

    name: str
    data: str
    longer: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    """Settings over those of the training, such as the lengths to test at; or what makes them of the training's."""
    kind: str = "labels"

    def words(self, base: dict[str, Any]) -> tuple[str, ...]:
        """The settings of `longer` for a model that was trained with `base`."""
        return self.longer(data_config(self.data, base)) if callable(self.longer) else self.longer


MAD = ("mad_recall", "mad_noisy", "mad_fuzzy", "mad_memorize", "mad_compress_causal", "mad_selcopy")


@dataclass(frozen=True)
class Outcome:
    """What came out of one task, or why nothing did."""

    name: str
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    levels: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def data_config(data: str, base: dict[str, Any], words: tuple[str, ...] = ()) -> Any:
    """The settings of a dataset: `base`, and over it words such as "data.seq_len=64".

    Raises:
        ConfigError: No such dataset or setting, or a bad value.
    """
    before = [f"data.{key}={as_override(value)}" for key, value in base.items()]
    return train_config([f"data={data}", *before, *words]).data


def run_entry(entry: Entry, model: Model, past: History | None, codec: Codec | None, chunk: int) -> Outcome:
    """Puts a model to a task; what does not fit it, or fails, is an outcome with its reason."""
    try:
        if entry.kind == "labels":
            return _labels(entry, model, past, chunk)
        if codec is None:
            return Outcome(entry.name, reason="this model was not trained on text")
        if entry.kind == "number":
            return _number(entry, model, codec)
        return _position(entry, model, past, codec, chunk)
    except ZooError as error:
        return Outcome(entry.name, reason=str(error))


def _labels(entry: Entry, model: Model, past: History | None, chunk: int) -> Outcome:
    if past is None or past.data != entry.data:
        learnt = "nothing that its folder tells of" if past is None else f"data={past.data}"
        return Outcome(entry.name, reason=f"it was trained on {learnt}, not on these data")
    data = DataModule(data_config(entry.data, past.settings, entry.words(past.settings)), seed=0)
    objective = make_objective(past.objective, data.source.vocab_size, mask_rate=past.mask_rate)
    metrics = evaluate(model, data, objective=objective, chunk=chunk)
    return Outcome(entry.name, metrics, data.source.levels)


def _position(entry: Entry, model: Model, past: History | None, codec: Codec, chunk: int) -> Outcome:
    known = past is not None and past.data in ("text", "pystdlib")
    data = past.data if past is not None and known else entry.data
    source = DataModule(data_config(data, past.settings if past is not None and known else {}), seed=0).source
    assert isinstance(source, PackedText)
    if source.codec.to_dict() != codec.to_dict():
        return Outcome(entry.name, reason=f"its tokenizer is another than that of data={data}")
    rows = windows(source, "test", 2048, 64)
    return Outcome(entry.name, by_position(model, rows, chunk=chunk), note=f"{len(rows)} windows of data={data}")


def _number(entry: Entry, model: Model, codec: Codec) -> Outcome:
    found = list(find_number(model, codec))
    metrics = {"found": sum(share for *_, share in found) / len(found)}
    metrics |= {f"found/characters={length}, depth={depth:g}": share for length, depth, share in found}
    return Outcome(entry.name, metrics, {"chance": 1 / 50_000})


def _pairs_farther_apart(config: MQARConfig) -> tuple[str, ...]:
    """As many pairs at up to eight times the length of the training, unless its test is longer already."""
    trained, tested = (max(segment.seq_len for segment in config.segments(split)) for split in ("train", "test"))
    if tested > trained:
        return ()
    return (f"data.test_lengths={as_override([trained * times for times in (1, 2, 4, 8)])}", "data.test_examples=256")


def _longer_expressions(config: ListOpsConfig) -> tuple[str, ...]:
    """Longer than any of the training and nested deeper, up to twice the length."""
    trained = config.grammar
    return (
        f"data.min_length={trained.max_length + 1}",
        f"data.max_length={2 * trained.max_length}",
        f"data.max_depth={trained.max_depth + 2}",
        "data.num_examples=1000",  # only to learn the rules that the score is compared with
        "data.test_examples=256",
    )


FARTHER = "data.test_lengths=[64,128,256,512,1024,2048,4096,8192,16384]"
"""For a task whose answer only moves away with the length."""
SYNTHETIC = [
    Entry("multi-query associative recall", "mqar", _pairs_farther_apart),
    Entry("associative recall", "assoc_recall"),
    Entry("induction heads", "induction", (FARTHER, "data.test_examples=64")),
    Entry("selective copying", "selective_copying"),
    Entry("copying", "copying"),
    *(Entry(name.replace("_", ": ", 1).replace("_", " "), name) for name in MAD),
    Entry("passkey", "passkey", ("data.test_lengths=[128,256,512,1024,2048,4096]", "data.test_examples=200")),
    Entry("needles", "needle", ("data.test_lengths=[128,256,512,1024,2048,4096]", "data.test_examples=200")),
    Entry("RULER in tokens", "ruler"),
    Entry("lost in the middle", "depth_curve"),
    Entry("ListOps", "listops"),
    Entry("ListOps, longer expressions", "listops", _longer_expressions),
    Entry("parity", "parity"),
    Entry("word problem", "word"),
]
TEXT = [
    Entry("perplexity by position", "pystdlib", kind="position"),
    Entry("a number hidden in text", "text", kind="number"),
]
SUITES: dict[str, list[Entry]] = {"longrange": [*SYNTHETIC, *TEXT], "text": TEXT}
"""Tasks by suite. A task that a dataset adds is one line here."""
