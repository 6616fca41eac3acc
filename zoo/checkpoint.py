"""Saving and loading models: folders of our own, and published checkpoints in theirs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo._version import __version__
from zoo.devices import usable_device
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.long_context import set_cache, set_rope_scaling
from zoo.model import Model, create_model
from zoo.pretrained import convert, weights
from zoo.pretrained.families import by_names, by_settings, for_saving
from zoo.pretrained.family import Family, Published, bound
from zoo.pretrained.sources import CONFIG, WEIGHTS, as_path, locate, model_folder
from zoo.pretrained.tokenizer import describe_tokenizer
from zoo.pretrained.weights import SHARD_BYTES, Weights, write_tensors, write_text

__all__ = ["load_pretrained", "model_folder", "model_settings", "read_description", "save_pretrained"]

FORMATS = ("zoo", "transformers")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in convert.FLOATS}
"""Types that a model is loaded in, by the names that config.json has for them."""


def save_pretrained(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    format: str = "zoo",
    tokenizer: dict[str, Any] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    stored_dtype: torch.dtype | None = None,
) -> None:
    """Writes a model so that `load_pretrained` gives back the same one.

    Args:
        model: The model.
        folder: Where to write; made if missing, an older model in it is replaced.
        format: "zoo" keeps every setting and every bit; "transformers" is what that library opens, with equal logits,
            where it has the architecture. It has no word for tokens that are bytes, nor for which tokens a Longformer
            with causal=false treats as global: there, `global_attention_mask` must mark the first n_global.
        tokenizer: How text becomes tokens, as the data describe it; kept for `generate`. That of the model
            (`model.tokenizer`, which loading sets) unless given.
        max_shard_bytes: Of the transformers format: larger weights are split into files of this size.
        stored_dtype: Of the zoo format: a smaller type, such as bf16, to which the weights are rounded in the file;
            they are loaded in the type that they have here.

    Raises:
        ConfigError: No such format, or it has no word for the model or one of its settings; no model, or no folder.
        CheckpointError: The folder cannot be written.
    """
    if not isinstance(model, Model):
        raise ConfigError(f"a {type(model).__name__} cannot be saved: expected a Model, as create_model makes one")
    folder = as_path(folder)
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not known: expected {' or '.join(FORMATS)}")
    if format == "transformers":
        if stored_dtype is not None:
            raise ConfigError('stored_dtype has no word in transformers: convert the model, or save with format="zoo"')
        _save_published(model, folder, tokenizer, max_shard_bytes)
        return
    description = {
        "architecture": model.architecture,
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer,
        "zoo_version": __version__,
    }
    if stored_dtype is not None:
        description["dtype"] = _dtype_name(model)
    tensors = {name: tensor.detach().to(stored_dtype).contiguous() for name, tensor in model.state_dict().items()}
    with weights.writing(folder):
        write_tensors(folder / WEIGHTS, tensors)
        write_text(folder / CONFIG, json.dumps(description, indent=2) + "\n")


def _save_published(model: Model, folder: Path, tokenizer: dict[str, Any] | None, max_shard_bytes: int) -> None:
    family, settings = for_saving(model.architecture, model.config)
    tensors = model.state_dict()
    table = family.table(model.config, Published(settings))
    planned = dict(convert.export({name: tensor.to("meta") for name, tensor in tensors.items()}, table))
    with weights.writing(folder):
        weights.write(folder, planned, convert.export(tensors, table), max_shard_bytes)
        write_text(folder / CONFIG, json.dumps(settings | {"dtype": _dtype_name(model)}, indent=2) + "\n")
        if tokenizer is not None and tokenizer.get("kind") == "tokenizers":
            write_text(folder / "tokenizer.json", tokenizer["json"])
            fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
            write_text(folder / "tokenizer_config.json", json.dumps(fast, indent=2) + "\n")


def _dtype_name(model: Model) -> str:
    return str(model.embedding.weight.dtype).removeprefix("torch.")


def load_pretrained(
    name: str | os.PathLike[str],
    revision: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    cache: str | Mapping[str, Any] | None = None,
) -> Model:
    """Loads a model: one of ours, or a published checkpoint.

    Files are read into the model tensor by tensor, and everything in them is accounted for; pickles are read without
    running them. The hub's cache and its variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) are honoured.

    Args:
        name: The folder of a model or of the run that trained it; a folder as published, or a .pth file of RWKV; a name
            that `zoo.list_models(pretrained=True)` lists; or an id on the Hugging Face hub (with a third part, a file
            in that repository: "BlinkDL/rwkv-7-world/RWKV-x070-World-0.1B-v2.8.pth").
        revision: Branch, tag or commit on the hub.
        device: Where to put the model; the CPU unless said.
        dtype: Type of the weights, or its name; that of the model that was saved unless said.
        rope_scaling: For longer contexts, such as {"type": "yarn", "factor": 8}; see `zoo.set_rope_scaling`. The type
            may be called rope_type.
        cache: What attention keeps of a long context, such as {"type": "window", "window": 1024}; see `zoo.set_cache`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: No model there, a damaged file, an unknown family, or weights that do not fit the config.
        ConfigError: The model cannot be scaled so, or has no such cache; the device or type cannot be used.
    """
    place = usable_device("cpu" if device is None else device)
    kind = None if dtype is None else _dtype(dtype)
    policies = [
        (set_policy, *_policy(key, values))
        for key, set_policy, values in (
            ("rope_scaling", set_rope_scaling, rope_scaling),
            ("cache", set_cache, cache),
        )
        if values is not None
    ]
    found = _open(name, revision)
    family = found.family
    convert.load(
        found.model,
        found.weights,
        found.table,
        renames=family.renames if family else (),
        inert=family.inert if family else (),
        device=place,
        dtype=kind or found.dtype,
    )
    for set_policy, policy, settings in policies:
        set_policy(found.model, policy, **settings)
    return found.model.eval()


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype={dtype!r} is no type of weights: expected one of {', '.join(DTYPES)}")
    return found


def _policy(key: str, values: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a policy and its settings."""
    own = {"type": values} if isinstance(values, str) else dict(values) if isinstance(values, Mapping) else {}
    name = own.pop("type" if "type" in own or key == "cache" else "rope_type", None)
    if not isinstance(name, str) or not all(isinstance(setting, str) for setting in own):
        example = '{"type": "yarn", "factor": 8}' if key == "rope_scaling" else '{"type": "window", "window": 1024}'
        raise ConfigError(f"{key}={values!r} names no type: expected its name, or settings with it such as {example}")
    return name, own


def model_settings(name: str) -> tuple[str, dict[str, Any]]:
    """The architecture of a model that `load_pretrained` would load, and the settings that it was built with.

    Raises:
        CheckpointError: No model there.
    """
    model = _open(name, None).model
    return model.architecture, dataclasses.asdict(model.config)


class _Found(NamedTuple):
    """A model before its weights are read."""

    model: Model
    """Without memory."""
    weights: Weights
    table: convert.Table
    family: Family | None
    """None: one of ours."""
    dtype: torch.dtype | None
    """To load it in; None: as it is in the files."""


def _open(name: str | os.PathLike[str], revision: str | None) -> _Found:
    place = locate(name, revision)
    if place.is_file():
        found = Weights([place], place, "what the shapes of its tensors say")
        shapes = {name: entry.shape for name, entry in found.entries.items()}
        return _published(by_names(shapes, str(place)), Published({}, str(place), shapes), found)
    settings = _read_json(place / CONFIG)
    if isinstance(settings, dict) and {"model_type", "ssm_cfg", "architectures"} & settings.keys():
        family = by_settings(settings, str(place / CONFIG))
        found = Weights(weights.find(place), place, f"its {CONFIG} ({family.name})")
        opened = _published(family, Published(settings, str(place / CONFIG)), found)
        opened.model.tokenizer = describe_tokenizer(place)
        return opened
    description = read_description(place)
    found = Weights([place / WEIGHTS], place / WEIGHTS, f"its {CONFIG} ({description['architecture']})")
    model = _build(description["architecture"], description["config"], place / CONFIG, found)
    model.tokenizer = description["tokenizer"]
    dtype = DTYPES.get(description.get("dtype", ""))
    return _Found(model, found, convert.identity(model), None, dtype)


def _published(family: Family, theirs: Published, found: Weights) -> _Found:
    try:
        bound(theirs.values, theirs.where, found)
        settings = family.read(theirs)
        model = _build(family.architecture, settings, theirs.where, found)
        return _Found(model, found, family.table(model.config, theirs), family, None)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise CheckpointError(
            f"{theirs.where} is damaged: {type(error).__name__} ({error}) when read as {family.name}; copy it again"
        ) from error


class _OnPaper(TorchFunctionMode):
    """Gives matrices neither memory nor values, which their file will give them.

    Vectors are computed: on the meta device the arithmetic of an initialisation would import torch's compiler, and that
    takes a second.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls what is called, draws of matrices excepted, and makes matrices on the meta device."""
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            shape = args[0] if len(args) == 1 else args
            if isinstance(shape, tuple) and len(shape) > 1:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _build(architecture: str, settings: dict[str, Any], where: str | Path, found: Weights | None = None) -> Model:
    """A model without memory for its matrices."""
    if found is not None:
        bound(settings, where, found)
    try:
        try:
            with torch.random.fork_rng(devices=[]), _OnPaper():
                return create_model(architecture, **settings)
        except RuntimeError:  # its initialisation computes with matrices and vectors together
            with torch.device("meta"):
                return create_model(architecture, **settings)
    except ConfigError as error:
        raise CheckpointError(f"{where} describes no model ({error}): copy or train it again") from error
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes that no tensor can have
        told = weights.brief(error)
        raise CheckpointError(
            f"{where} describes no model that can be built ({told}): copy or train it again"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy or train the model again") from error


def read_description(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        CheckpointError: Not JSON, or not one of the zoo's.
    """
    description = _read_json(folder / CONFIG)
    kinds = {"architecture": str, "config": dict, "tokenizer": dict | None}
    for key, kind in kinds.items():
        if not isinstance(description, dict) or not isinstance(description.get(key), kind):
            raise CheckpointError(
                f"{folder / CONFIG} was not written by the zoo, or changed since: {key} is missing or of the wrong "
                f"kind; copy or train the model again"
            )
    if description.get("dtype", "float32") not in list(DTYPES):  # which compares with anything
        raise CheckpointError(
            f"{folder / CONFIG} has dtype={description['dtype']!r}: expected one of {', '.join(DTYPES)}; copy it again"
        )
    return description
