"""One training run from settings to summary."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.console import Console

from zoo.checkpoint import load_pretrained, save_pretrained
from zoo.kernels.errors import BackendError, ConfigError
from zoo.model import Model, create_model
from zoo.registry import architecture
from zoo.train import diagnostics
from zoo.train.callbacks import Books, Signals, StopRequested, StopRules
from zoo.train.checkpoint import AtomicCheckpointIO, Checkpoints, load_checkpoint
from zoo.train.config import OptimConfig, TrainConfig
from zoo.train.data import Batch, DataModule, Source, get_data
from zoo.train.errors import Interrupted, NonFiniteError, RunError, foreseen
from zoo.train.folder import RunFolder, claim, default_name, find
from zoo.train.logs import MetricsFile, RunLog
from zoo.train.module import SequenceModule
from zoo.train.objectives import MASK_RATE, OBJECTIVES, Masked, Objective, make_objective
from zoo.train.report import is_finished, print_table, summarise


def run(config: TrainConfig, *, console: Console | None = None, command: str | None = None) -> dict[str, Any]:
    """Trains, tests and saves one model, or goes on with a run that was cut short.

    Args:
        config: The settings, as `train_config` makes them.
        console: Where to print; the standard output unless said.
        command: The command line, for the summary.

    Returns:
        The summary, which is also in the run's folder.

    Raises:
        ConfigError, DataError, CheckpointError: The settings do not fit together, the data, or an earlier run.
        NonFiniteError: The loss became infinite or NaN; the last good checkpoint is kept.
        BackendError: A backend asked for by name cannot run here.
        RunError: Out of memory, or out of room on the disk.
        Interrupted: Ctrl-C or SIGTERM; checkpoint and summary are written.
    """
    started = time.monotonic()
    console = console or Console()
    device = pick_device(config.trainer.accelerator)
    data = DataModule(config.data, config.seed, config.trainer.segment_length)
    fallback = default_name(config.to_dict(data.source.name), _defaults(config, data.source.name))
    config = decide(config, data.source)

    with _deterministic(device), _quiet():
        # Data and model come before the folder: what cannot be made or run leaves no folder behind.
        data.prepare_data()
        torch.manual_seed(config.seed)
        model = create_model(config.arch, **config.model)
        module = SequenceModule(
            model,
            config.optim,
            max_steps=_decided(config.trainer.max_steps),
            seed=config.seed,
            objective=make_objective(
                config.objective, data.source.vocab_size, mask_rate=config.mask_rate, seed=config.seed
            ),
            slice_values=data.source.slice_values,
            joint_slices=data.source.joint_slices,
            bytes_per_label=_bytes_per_label(data) if config.objective == "causal" else None,
            carries=config.trainer.segment_length is not None,
        )
        _rehearse(module, data, _precision(config.trainer.precision, device), device)
        folder, earlier = _open(config, data.source.name, fallback)
        if earlier is not None and is_finished(earlier):
            console.print(f"{folder.path} is finished already; nothing to resume", soft_wrap=True)
            if not folder.diagnostics.exists():
                diagnostics.write(folder, module, data, device, load=True)
            print_table(console, earlier)
            return earlier
        if config.trainer.compile:
            model.compile()
        books = Books(data, device, started)
        checkpoints = Checkpoints(folder.checkpoints, config.trainer.keep_checkpoints)
        told = functools.partial(summarise, config, folder, module, data, books, checkpoints, command=command)
        try:
            resume_from = folder.newest_checkpoint()
            if config.init is not None and resume_from is None:
                _start_from(model, config.init)
            trainer = _trainer(config, folder, device, module, books, checkpoints, console, resume_from)
            console.print(
                _headline(config, data.source, model, device, folder, resume_from), highlight=False, soft_wrap=True
            )
            _fit(trainer, module, data, checkpoints, resume_from)
            codec = data.source.codec
            save_pretrained(model, folder.model, tokenizer=codec.to_dict() if codec else None)
            summary = told(step=module.global_step, status="finished")
            folder.write_summary(summary)
        # Lightning turns a KeyboardInterrupt into SystemExit.
        except (StopRequested, KeyboardInterrupt, SystemExit) as error:
            _write_if_possible(folder, told(step=module.global_step, status="interrupted"))
            raise Interrupted(module.global_step, folder.path) from error
        except Exception as error:
            mended = _explain(error, module.global_step, folder)
            _write_if_possible(folder, told(step=module.global_step, status="failed", error=str(mended or error)))
            if mended is None:
                raise
            raise mended from error
        diagnostics.write(folder, module, data, device)
    print_table(console, summary)
    return summary


def _fit(
    trainer: L.Trainer, module: SequenceModule, data: DataModule, checkpoints: Checkpoints, resume_from: Path | None
) -> None:
    """Trains, then tests the best weights, which the module has afterwards."""
    trainer.fit(module, datamodule=data, ckpt_path=resume_from)
    if checkpoints.best_step != trainer.global_step:
        best = load_checkpoint(checkpoints.path(checkpoints.best_step), module)
        module.load_state_dict(best["state_dict"])
    trainer.test(module, datamodule=data, verbose=False)


def _write_if_possible(folder: RunFolder, summary: dict[str, Any]) -> None:
    # What ended the run matters more than that its summary, on a full disk perhaps, cannot be written.
    with contextlib.suppress(OSError):
        folder.write_summary(summary)


@torch.no_grad()
def _rehearse(module: SequenceModule, data: DataModule, precision: Precision, device: torch.device) -> None:
    """One forward of two tokens: what cannot run here is refused before anything is written.

    Raises:
        BackendError: A backend is asked for by name that does not exist or cannot run.
        DataError: The objective cannot use the labels of these data.
    """
    batch = module.objective.prepare(next(iter(data.val_dataloader())), "val", 0)
    few: Batch = {name: batch[name][:1, :2].to(device) for name in ("inputs", "segment_ids") if name in batch}
    module.to(device)
    try:
        with precision.forward_context():
            module(few, module.incoming("val", few))
    except BackendError as error:
        reason = str(error).removesuffix("; or pass backend='auto'")
        raise BackendError(f"{reason}; arch.backend=auto takes one that runs") from error


def pick_device(accelerator: str) -> torch.device:
    """The device that `trainer.accelerator` means here.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ConfigError(
            f"trainer.accelerator=gpu cannot run here ({reason}): "
            f"trainer=auto, or trainer.accelerator=auto, uses what there is"
        )
    return torch.device("cuda", torch.cuda.current_device())


def decide(config: TrainConfig, source: Source[Any]) -> TrainConfig:
    """The settings with everything that was left to the dataset or the objective filled in.

    Raises:
        ConfigError: The vocabulary asked for is too small for the data, or settings contradict the objective.
    """
    objective = OBJECTIVES[config.objective]
    needed = source.vocab_size + objective.extra_tokens
    vocab_size = config.model.get("vocab_size", needed)
    if vocab_size < needed:
        mask = ", the mask token included" if objective.extra_tokens else ""
        raise ConfigError(
            f"arch.vocab_size={vocab_size} is too small for data={source.name}, which has {needed} token "
            f"ids{mask}: raise it or leave it out"
        )
    causal = config.model.get("causal", objective.causal)
    if objective is Objective and not causal:
        raise ConfigError(
            "arch.causal=false sees the tokens that objective=causal asks it to predict: leave arch.causal out, or set "
            "objective=masked or objective=classify"
        )
    if objective is Masked and causal:
        raise ConfigError(
            "arch.causal=true sees one side only of the tokens that objective=masked hides: leave arch.causal out"
        )
    if objective is not Masked and config.mask_rate is not None:
        raise ConfigError(f"mask_rate={config.mask_rate} means nothing to objective={config.objective}: leave it out")
    if config.trainer.segment_length is not None:
        _check_segments(config, source, causal)
    recipe, trainer = source.recipe, config.trainer
    factor = architecture(config.arch).mixer.learning_rate_factor
    max_steps = trainer.max_steps or recipe.max_steps
    val_every = min(trainer.val_every or math.ceil(max_steps / 10), max_steps)
    return dataclasses.replace(
        config,
        model={**config.model, "vocab_size": vocab_size, "causal": causal},
        mask_rate=(config.mask_rate or MASK_RATE) if objective is Masked else None,
        trainer=dataclasses.replace(trainer, max_steps=max_steps, val_every=val_every),
        optim=dataclasses.replace(config.optim, lr=config.optim.lr or recipe.lr * factor),
    )


def _check_segments(config: TrainConfig, source: Source[Any], causal: bool) -> None:
    """Refuses what a state cannot be carried through.

    Raises:
        ConfigError: It would look both ways, the data are no running text, or the windows cannot be cut so.
    """
    length = config.trainer.segment_length
    asked = f"trainer.segment_length={length}"
    if config.objective != "causal" or not causal:
        which = f"objective={config.objective}" if config.objective != "causal" else "arch.causal=false"
        raise ConfigError(f"{asked} carries a state, which only models that read one way have: leave it or {which} out")
    if not source.running:
        raise ConfigError(
            f"{asked} reads on from batch to batch, but the rows of data={source.name} are no running text: leave it "
            f"out, or take data such as pystdlib"
        )
    if source.config.seq_len % length:
        raise ConfigError(
            f"{asked} does not divide data.seq_len={source.config.seq_len}, the windows that the text is kept in: set "
            f"data.seq_len={length} as well"
        )
    arch = architecture(config.arch)
    wrapper = arch.mixer.make_wrapper(arch.config.from_dict({**config.model, "vocab_size": 1}, config.arch))
    if wrapper is not None and wrapper.strict and max(source.batch_size, source.eval_batch_size) > 1:
        raise ConfigError(
            f"{asked} meets documents that end at different tokens in a batch's rows, through which {config.arch} "
            f"cannot carry the blocks of landmark beside other mixers: set data.batch_size=1 and data.eval_batch_size=1"
        )


def _start_from(model: Model, init: str) -> None:
    """Gives the model the weights of another one.

    Raises:
        ConfigError: They do not fit.
    """
    weights, own = load_pretrained(init).state_dict(), model.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        theirs, ours = (tuple(side[name].shape) if name in side else "missing" for side in (weights, own))
        if theirs != ours:
            raise ConfigError(
                f"init={init} does not fit the settings of arch: {name} is {theirs} there and {ours} here: "
                f"change only settings that leave the weights as they are"
            )
    model.load_state_dict(weights)


def _open(config: TrainConfig, data_name: str, fallback: str) -> tuple[RunFolder, dict[str, Any] | None]:
    """The run's folder, new or found again, and the summary in it, if any."""
    tree, runs_dir = config.to_dict(data_name), Path(config.runs_dir)
    found = find(runs_dir, config.name, fallback, tree) if config.resume else None
    if found is not None:
        return found, found.read_summary()
    folder = claim(runs_dir, config.name, fallback)
    folder.write_config(tree)
    return folder, None


def _trainer(
    config: TrainConfig,
    folder: RunFolder,
    device: torch.device,
    module: SequenceModule,
    books: Books,
    checkpoints: Checkpoints,
    console: Console,
    resume_from: Path | None,
) -> L.Trainer:
    settings = config.trainer
    max_steps, val_every = _decided(settings.max_steps), _decided(settings.val_every)
    step = int(resume_from.stem.partition("-")[2]) if resume_from else 0
    return L.Trainer(
        accelerator="cuda" if device.type == "cuda" else "cpu",
        devices=1,
        # Without the environment a SLURM job would be requeued and saved by Lightning's rules, not ours.
        plugins=[_precision(settings.precision, device), AtomicCheckpointIO(module), LightningEnvironment()],
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        val_check_interval=val_every * settings.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=settings.eval_batches or 1.0,
        limit_test_batches=settings.eval_batches or 1.0,
        num_sanity_val_steps=0,
        inference_mode=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.path,
        logger=[
            MetricsFile(folder.metrics, step),
            TensorBoardLogger(
                folder.path, name="", version="tensorboard", default_hp_metric=False, purge_step=step + 1
            ),
        ],
        callbacks=[
            books,
            RunLog(console, books, max_steps, settings.log_every),
            StopRules(settings, books),
            checkpoints,
            Signals(settings, checkpoints),
        ],
    )


def _precision(name: str, device: torch.device) -> Precision:
    if name == "fp32":
        return Precision()
    # Handed over ready-made, because Lightning turns fp16 on a CPU into bf16 behind the user's back.
    return MixedPrecision("16-mixed" if name == "fp16-mixed" else "bf16-mixed", device.type)


def _bytes_per_label(data: DataModule) -> dict[str, float]:
    sizes = {"val": data.bytes_per_label("validation"), "test": data.bytes_per_label("test")}
    return {split: size for split, size in sizes.items() if size is not None}


def _defaults(config: TrainConfig, data_name: str) -> dict[str, dict[str, Any]]:
    classes = {"arch": architecture(config.arch).config, "data": get_data(data_name).config, "optim": OptimConfig}
    defaults = {
        group: {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(cls)
        }
        for group, cls in classes.items()
    }
    defaults["arch"]["causal"] = OBJECTIVES[config.objective].causal
    return defaults


def _headline(
    config: TrainConfig,
    source: Source[Any],
    model: torch.nn.Module,
    device: torch.device,
    folder: RunFolder,
    resume_from: Path | None,
) -> str:
    params = sum(p.numel() for p in model.parameters())
    objective = "" if config.objective == "causal" else f", {config.objective}"
    if config.trainer.segment_length is not None:
        objective = f", a state carried over segments of {config.trainer.segment_length:,} tokens"
    where = f"{config.trainer.precision} on {device.type}"
    verb = f"resumed from {resume_from.name}" if resume_from else f"{config.trainer.max_steps:,} steps"
    return (
        f"{config.arch} on {source.name}{objective}: {params:,} parameters, {where}, "
        f"lr {config.optim.lr:g}, {verb} -> {folder.path}"
    )


def _explain(error: Exception, step: int, folder: RunFolder) -> RunError | None:
    """The error that a person at the command line should see, or None where nothing is known of it."""
    if isinstance(error, NonFiniteError):
        kept = folder.newest_checkpoint()
        return error.with_hint(f"{kept} holds the last good weights" if kept else "no checkpoint was written before")
    return foreseen(error, f" after step {step}", folder.path)


def _decided(value: int | None) -> int:
    assert value is not None
    return value


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms inside, the caller's choice outside again."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # On a GPU a few backward kernels of torch have no deterministic form; better to run than to refuse.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # Every kernel here writes what it allocates, so filling it first would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's banners and tips off the terminal, and what it warns of that is meant here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have a deterministic implementation", UserWarning)
        # The gradient scaler may skip the very first step.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        # Lightning's own code, with a torch newer than it.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        try:
            yield
        finally:
            logger.setLevel(level)
