"""One engine between our tensors and those of a published checkpoint, in either direction.

A family says in a `Table` which tensors of theirs fill which rows of each tensor of ours, and in which form. From that
alone follow the names and shapes that a file must have, how it is read into a model, and how a model is written.

Letters: D d_model, E channels, K taps, P positions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels.errors import CheckpointError
from zoo.model import Model
from zoo.pretrained.weights import Weights

MAX_NAMES = 8
"""So many names of tensors fit into one line."""

MAPPED_ELEMENTS = 8 << 20
"""About so much of the files is mapped at a time, or one tensor: what is mapped counts as memory of the process."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Form(NamedTuple):
    """A change of form that can be undone; both ways work on any device, "meta" included."""

    load: Callable[[Tensor], Tensor]
    """Theirs to rows of ours."""
    save: Callable[[Tensor], Tensor]
    """Rows of ours to theirs."""


SAME = Form(lambda t: t, lambda t: t)
TRANSPOSED = Form(lambda t: t.T, lambda t: t.T)
TAPS = Form(lambda t: t.squeeze(1), lambda t: t.unsqueeze(1))
"""(E, 1, K), the weight of a depthwise convolution, and (E, K)."""
CHANNELS = Form(lambda t: t.flatten(), lambda t: t[None, None])
"""(1, 1, D) and (D,)."""
SHARE = Form(lambda t: t.flatten(0, 1), lambda t: t[None])
"""(1, 1, D) and one row of ours, (1, D)."""
KEPT = Form(lambda t: 1 - t.flatten(0, 1), lambda t: 1 - t[None])
"""Their share of the current token, (1, 1, D), and our share of the one before it, (1, D).

Exact for what was loaded; shares of ours below a half are rounded to 2^-25 (in fp32) when they are first written."""


class Source(NamedTuple):
    """A tensor of theirs that fills rows of one of ours."""

    name: str
    form: Form = SAME
    rows: int | None = None
    """How many rows of ours it fills; None: an equal share."""


class Link(NamedTuple):
    """Where a tensor of ours comes from."""

    ours: str
    sources: tuple[Source, ...]
    """They fill its rows from the top."""
    added: Source | None = None
    """What is added to it; written such that it adds nothing."""


class Table(NamedTuple):
    """All tensors of a model, ours and theirs."""

    links: list[Link]
    copies: dict[str, str]
    """Tensors of theirs that repeat another one: read where the other is missing, else equal; not written."""
    silent: dict[str, tuple[int, ...]]
    """Tensors of theirs without effect on the logits, and their shapes: may be missing, written as zeros."""


def link(ours: str, theirs: str, form: Form = SAME) -> Link:
    """One of ours from one of theirs."""
    return Link(ours, (Source(theirs, form),))


def norm_links(pairs: Mapping[str, str], kinds: Iterable[str] = ("weight", "bias")) -> list[Link]:
    """Links of modules of the same form (norms, projections), ours -> theirs."""
    return [link(f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in pairs.items() for kind in kinds]


def identity(model: nn.Module) -> Table:
    """The table of the zoo's own files."""
    return Table([link(name, name) for name in model.state_dict()], {}, {})


def export(tensors: Mapping[str, Tensor], table: Table) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, one after another, from ours; views wherever the form allows."""
    for ours, sources, added in table.links:
        tensor = tensors[ours].detach()
        for source, rows in zip(sources, tensor.split(_rows(sources, tensor.shape[0])), strict=True):
            yield source.name, source.form.save(rows)
        if added is not None:
            yield added.name, added.form.save(tensor)
    like = tensors[table.links[0].ours]
    for name, shape in table.silent.items():
        yield name, like.new_zeros(shape)


def _rows(sources: tuple[Source, ...], total: int) -> list[int]:
    return [total // len(sources) if source.rows is None else source.rows for source in sources]


def load(
    model: Model,
    weights: Weights,
    table: Table,
    *,
    renames: Iterable[tuple[str, str]] = (),
    inert: Iterable[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Gives a model that has no memory yet its weights; beside it, few tensors at a time are in memory.

    Args:
        model: Built on the meta device; it is changed only if everything in the files fits it.
        weights: The files.
        table: What corresponds to what.
        renames: Patterns and replacements that turn names in the files into those of the table.
        inert: Patterns of names in the files that nobody needs.
        device: Of the model; the CPU unless said.
        dtype: Of the weights; as saved unless said.

    Raises:
        CheckpointError: Tensors are missing, unexpected, of another shape or of a type that is no weight's; or a file
            cannot be read.
    """
    files = _names(weights, list(renames), list(inert))
    for copy, original in table.copies.items():
        if original not in files and copy in files:
            files[original] = files.pop(copy)
    blank = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    assert blank.keys() == {row.ours for row in table.links}, "a table has all tensors of its architecture"
    _check(weights, files, {name: tuple(t.shape) for name, t in export(blank, table)}, table)

    _check_copies(weights, files, table)
    device = torch.device(device or "cpu")
    # The largest first, while little else is held.
    links = sorted(table.links, key=lambda row: blank[row.ours].numel(), reverse=True)
    for group in _groups(links, blank):
        with ExitStack() as stack:
            read = stack.enter_context(weights.reader(files[name] for row in group for name in _theirs(row)))
            for row in group:
                shape = blank[row.ours].shape
                kinds = [weights.entries[files[name]].dtype for name in _theirs(row)]
                target = torch.empty(shape, dtype=dtype or _promoted(kinds), device=device)
                parts = target.split(_rows(row.sources, shape[0]))
                for source, part in zip(row.sources, parts, strict=True):
                    theirs = source.form.save(part)
                    if theirs.data_ptr() == part.data_ptr():  # a view of our memory, which can be filled as it is
                        read(files[source.name], theirs)
                    else:
                        part.copy_(source.form.load(read(files[source.name])))
                if row.added is not None:
                    target += row.added.form.load(read(files[row.added.name])).to(device, target.dtype)
                put(model, row.ours, target)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Sets a parameter, with the marks of the one whose place it takes."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module.get_parameter(leaf)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    setattr(module, leaf, new)


def _theirs(row: Link) -> list[str]:
    return [source.name for source in (*row.sources, *([] if row.added is None else [row.added]))]


def _groups(links: Iterable[Link], blank: Mapping[str, Tensor]) -> Iterator[list[Link]]:
    """Runs of links that are small together: files are mapped into memory for one run at a time."""
    group: list[Link] = []
    size = 0
    for row in links:
        elements = blank[row.ours].numel()
        if group and size + elements > MAPPED_ELEMENTS:
            yield group
            group, size = [], 0
        group.append(row)
        size += elements
    if group:
        yield group


def _promoted(kinds: list[torch.dtype | str]) -> torch.dtype:
    """The type that holds all of them; what is no float was refused before."""
    return functools.reduce(torch.promote_types, (kind for kind in kinds if isinstance(kind, torch.dtype)))


def _names(weights: Weights, renames: list[tuple[str, str]], inert: list[str]) -> dict[str, str]:
    """The table's names of what the files hold -> the files' names."""
    names: dict[str, str] = {}
    for written in weights.entries:
        name = written
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if any(re.fullmatch(pattern, name) for pattern in inert):
            continue
        if name in names:
            raise CheckpointError(
                f"{weights.where} holds both {names[name]} and {written}, two names of one tensor: copy it again"
            )
        names[name] = written
    return names


def _check(weights: Weights, files: Mapping[str, str], shapes: dict[str, tuple[int, ...]], table: Table) -> None:
    optional = table.silent.keys()
    missing = sorted(shapes.keys() - files.keys() - optional)
    unexpected = sorted(files.keys() - shapes.keys() - table.copies.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{weights.where} does not fit {weights.described_by}: missing {_listed(missing)}, unexpected "
            f"{_listed(unexpected)}"
        )
    for name, file in files.items():
        shape, dtype = weights.entries[file]
        wanted = shapes[table.copies.get(name, name)]
        if shape != wanted:
            raise CheckpointError(f"{weights.where}: {file} has shape {shape}, {weights.described_by} wants {wanted}")
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{weights.where}: {file} is of type {dtype}: expected floating-point weights of 16 bits or more, not "
                f"quantised ones"
            )


def _check_copies(weights: Weights, files: Mapping[str, str], table: Table) -> None:
    for copy, original in table.copies.items():
        if copy in files:
            pair = [files[copy], files[original]]
            with weights.reader(pair) as read:
                one, other = read(pair[0]), read(pair[1])
                if one.data_ptr() != other.data_ptr() and not torch.equal(one, other):
                    raise CheckpointError(
                        f"{weights.where}: {pair[0]} is not {pair[1]}, though {weights.described_by} ties them: mend "
                        f"tie_word_embeddings or the weights"
                    )


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{names[:MAX_NAMES]}{more}"
