"""The registry of datasets and the data module in Lightning's hands."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch.nn import functional as F

from zoo.kernels.errors import ConfigError
from zoo.train.data import (
    MQAR,
    BatchHash,
    DataConfig,
    DataModule,
    MQARConfig,
    Source,
    base,
    create_source,
    get_data,
    list_data,
    register_data,
)


def test_the_datasets_are_known_by_name():
    assert {"mqar", "pystdlib", "text"} <= set(list_data())
    entry = get_data("mqar")
    assert (entry.name, entry.source, entry.config) == ("mqar", MQAR, MQARConfig)
    assert create_source(MQARConfig()).name == "mqar"


def test_an_unknown_name_names_near_misses():
    with pytest.raises(ConfigError, match="did you mean 'mqar'"):
        get_data("mqr")


def test_a_new_dataset_is_one_decorated_class_and_a_clash_is_an_error(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @dataclass(kw_only=True)
    class ToyConfig(DataConfig):
        pass

    with pytest.raises(ConfigError, match="belongs to no registered dataset"):
        create_source(ToyConfig())

    @register_data("toy", config=ToyConfig)
    class Toy(Source[ToyConfig]):
        def __init__(self, config):
            self.config = config

        def load(self, split):
            return []

    assert "toy" in list_data()
    assert isinstance(create_source(ToyConfig()), Toy)
    for name, config in (("toy", DataConfig), ("toy2", ToyConfig)):
        with pytest.raises(ConfigError, match="clashes with data=toy"):
            register_data(name, config=config)(Toy)


@pytest.mark.parametrize("name", list_data())
def test_settings_work_as_hydra_structured_configs(name):
    entry = get_data(name)
    merged = OmegaConf.merge(OmegaConf.structured(entry.config), OmegaConf.from_dotlist(["batch_size=8"]))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, entry.config)
    assert config.batch_size == 8


@pytest.mark.parametrize("name", list_data())
def test_every_setting_has_a_help_line(name):
    for field in get_data(name).config.__dataclass_fields__.values():
        assert field.metadata.get("help"), field.name


def test_bad_common_settings_are_one_clear_line():
    for name in ("batch_size", "eval_batch_size", "num_examples", "validation_examples", "test_examples"):
        with pytest.raises(ConfigError, match=rf"data\.{name}=0 is not valid: expected at least 1"):
            DataConfig(**{name: 0})
    with pytest.raises(ConfigError, match="num_workers=-1"):
        DataConfig(num_workers=-1)


class Bigram(LightningModule):
    """Just enough of a model for a trainer."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(64, 64)
        self.hash = BatchHash()
        self.tested = 0

    def training_step(self, batch, index):
        self.hash.update(batch)
        return F.cross_entropy(self.table(batch["inputs"]).flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)

    def validation_step(self, batch, index):
        self.validated = index + 1

    def test_step(self, batch, index):
        self.tested += len(batch["inputs"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
def test_lightning_takes_the_loaders_as_they_are():
    data = DataModule(MQARConfig(num_examples=300, test_examples=70, eval_batch_size=32), seed=1)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=12, val_check_interval=6, check_val_every_n_epoch=None, **quiet)
    module = Bigram()
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert (module.validated, module.tested) == (16, 70)
    expected = BatchHash()
    stream = DataModule(data.config, seed=1).train_dataloader()
    for index in range(12):  # twelve steps are two and a half epochs of these data
        expected.update(stream.batch(index))
    assert module.hash.state == expected.state
