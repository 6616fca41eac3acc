"""What the memory of a trained model did with a few test batches: numbers in a file, and one picture.

Letters: B rows, T tokens, Q questions, H heads, C blocks of a document, k blocks that a token reads.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.checkpoint import load_pretrained
from zoo.console import report
from zoo.kernels import backends
from zoo.layers.landmark_tokens import LandmarkTokens
from zoo.train.data import DataModule
from zoo.train.errors import foreseen
from zoo.train.folder import RunFolder
from zoo.train.module import SequenceModule

BATCHES, ROWS = 8, 32
"""How much of the test is looked at: up to so many batches, and so many rows in all of them together."""
MEMORY_PARTS = ("compressed memory", "memory", "own segment")
BLOCK_KINDS = ("retrieved", "landmark_weights")
_COLOURS = ("#cc79a7", "#e69f00", "#0072b2")  # from the palette of Okabe and Ito


def write(
    folder: RunFolder, module: SequenceModule, data: DataModule, device: torch.device, *, load: bool = False
) -> None:
    """Writes what `collect` finds on a finished run into its folder, with a picture.

    What goes wrong here takes nothing from the run: it is told in one line on stderr.

    Args:
        folder: Of the run.
        module: What was trained.
        data: Its data.
        device: Where to read.
        load: Take the weights from the folder first.
    """
    try:
        if load:
            module.model.load_state_dict(load_pretrained(folder.model).state_dict())
        found = collect(module, data, device)
        if found:
            folder.write_diagnostics(found)
            title = f"{module.model.architecture} on {data.source.name}"
            draw(found, title, folder.diagnostics.with_suffix(".png"))
    except Exception as error:
        report(error, foreseen, head=f"warning: {folder.path} is finished, but without diagnostics")


@torch.no_grad()
def collect(module: SequenceModule, data: DataModule, device: torch.device) -> dict[str, Any]:
    """What `Model.diagnose` shows on test batches, summed up as plain numbers.

    Batches are spread over the test; of running text they are the first ones, read with the state carried along.

    Args:
        module: What was trained.
        data: Its data.
        device: Where to read.

    Returns:
        By kind and layer; nothing where the architecture has nothing to show.

        - "memory_mass": the shares of attention that go to each of `MEMORY_PARTS`.
        - "retrieved", or "landmark_weights" where all blocks are read, if the data know where their answers stand
          (`Source.answer_positions`): "found", the share of heads that read the answer's block at the question, or the
          weight they give to it; "alike", the same if all blocks were treated alike; "questions", from how many; and
          "read", triples (block of the answer, block read, share). Each label is a question, asked at the token that
          predicts it; those asked in the answer's own block are left out. Blocks are numbered from the beginning of the
          row.
        - Other kinds: the mean.
    """
    model = module.model.to(device).eval()
    loader = data.test_dataloader()
    every = 1 if module.carries else max(1, len(loader) // BATCHES)
    means: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    reads: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    state, some = None, -(-ROWS // min(BATCHES, len(loader)))
    for number, batch in islice(enumerate(loader), 0, BATCHES * every, every):
        positions = data.source.answer_positions(batch)
        batch = module.objective.prepare(batch, "test", number)
        tokens = batch["inputs"][:some].to(device)
        ids = batch["segment_ids"][:some].to(device) if "segment_ids" in batch else None
        if module.carries:
            state = state or model.init_state(len(tokens), device=device)
        shown = model.diagnose(tokens, segment_ids=ids, state=state)
        if not shown:
            return {}
        if state is not None:
            state = model.read(tokens, state, ids)[1]
        for name, value in shown.items():
            kind, _, layer = name.rpartition("/")
            if kind.rpartition("/")[2] not in BLOCK_KINDS:
                value = value.float().flatten(0, -2) if kind.endswith("memory_mass") else value.float().flatten()
                means[kind][layer].append(value.mean(0).cpu().numpy())
            elif positions is not None:
                assert isinstance(model.wrapper, LandmarkTokens), "whoever shows blocks has a wrapper that makes them"
                reads[kind][layer].append(_questions(kind, value.cpu(), positions[:some], model.wrapper.block_size))
    found: dict[str, Any] = {
        kind: {layer: _named(kind, np.mean(values, axis=0)) for layer, values in layers.items()}
        for kind, layers in means.items()
    }
    for kind, layers in reads.items():
        of_layers = {layer: _blocks(values) for layer, values in layers.items()}
        found |= {kind: of_layers} if all(of_layers.values()) else {}
    return found


def _named(kind: str, mean: np.ndarray) -> Any:
    return dict(zip(MEMORY_PARTS, mean.tolist(), strict=True)) if kind.endswith("memory_mass") else float(mean)


def _questions(kind: str, shown: Tensor, positions: Tensor, block_size: int) -> np.ndarray:
    """For each question the block of its answer, its own, and what it reads of each block, (Q, 2 + C) float64."""
    rows, times = (positions >= 0).nonzero(as_tuple=True)
    weights = shown[rows, times]  # (Q, k), (Q, H, k) or (Q, H, C)
    if kind.endswith("retrieved"):
        blocks = max(1, int(weights.max()) + 1) if weights.numel() else 1
        weights = F.one_hot(weights.clamp(min=0), blocks) * (weights >= 0)[..., None]
        weights = weights.sum(-2)  # (Q, C) or (Q, H, C)
    weights = weights.double().flatten(1, -2).mean(1) if weights.ndim > 2 else weights.double()
    places = torch.stack((positions[rows, times], times), dim=1) // block_size
    return torch.cat((places, weights), dim=1).numpy()


def _blocks(batches: list[np.ndarray]) -> dict[str, Any] | None:
    """The summary of one layer, see `collect`; None where no question stands in another block than its answer."""
    width = max(int(batch[:, :2].max(initial=0)) + 3 for batch in batches)
    width = max(width, *(batch.shape[1] for batch in batches))
    questions = np.concatenate([np.pad(batch, ((0, 0), (0, width - batch.shape[1]))) for batch in batches])
    questions = questions[questions[:, 0] < questions[:, 1]]
    if not len(questions):
        return None
    answer, own, weights = questions[:, 0].astype(int), questions[:, 1], questions[:, 2:]
    read = []
    for block in np.unique(answer):
        shares = weights[answer == block].mean(0)
        read += [[int(block), int(at), float(shares[at])] for at in np.flatnonzero(shares)]
    return {
        "found": float(weights[np.arange(len(answer)), answer].mean()),
        "alike": float((weights.sum(1) / own).mean()),
        "questions": len(questions),
        "read": read,
    }


def draw(found: dict[str, Any], title: str, out: Path) -> None:
    """Draws what `collect` found; does nothing where matplotlib is not installed, or nothing can be drawn.

    Args:
        found: As returned by `collect`.
        title: Above the picture.
        out: A PNG file.
    """
    masses = [(kind, layers) for kind, layers in found.items() if kind.endswith("memory_mass")]
    blocks = [
        (f"{kind}, layer {layer}", told)
        for kind, layers in found.items()
        if kind.endswith(BLOCK_KINDS)
        for layer, told in layers.items()
    ]
    panels = len(masses) + len(blocks)
    if not panels or backends.missing("matplotlib", "'subquadratic-zoo[plots]'"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * panels, 3.6), dpi=120, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels))
    figure.suptitle(title, fontsize=10)
    for panel, (kind, layers) in zip(axes, masses, strict=False):
        bottom = np.zeros(len(layers))
        for part, colour in zip(MEMORY_PARTS, _COLOURS, strict=True):
            heights = np.array([layers[layer][part] for layer in layers])
            panel.bar(list(layers), heights, bottom=bottom, color=colour, label=part)
            bottom += heights
        panel.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1))
        panel.set_title(kind.replace("_", " "), fontsize=9, pad=20)
        panel.legend(
            fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False, columnspacing=0.8
        )
    for panel, (name, told) in zip(axes[len(masses) :], blocks, strict=True):
        answer, block, share = np.array(told["read"]).reshape(-1, 3).T
        highest = max(answer.max(initial=0), block.max(initial=0)) + 1
        panel.plot([-0.5, highest], [-0.5, highest], color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.scatter(answer, block, s=60 * share, color=_COLOURS[2], alpha=0.7, linewidths=0)
        panel.set(xlabel="block of the answer", ylabel="block read")
        panel.set_title(f"{name.replace('_', ' ')}\nfound {told['found']:.2f}, alike {told['alike']:.2f}", fontsize=9)
    figure.savefig(out, metadata={"Software": None})
