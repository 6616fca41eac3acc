"""Data: the same batches for every architecture, from a config and a seed."""

from zoo.codec import ByteCodec, Codec, TokenizerCodec, codec_from_dict
from zoo.train.data.base import (
    SPLITS,
    DataConfig,
    DataModule,
    Entry,
    Source,
    create_source,
    get_data,
    list_data,
    register_data,
)
from zoo.train.data.listops import ListOps, ListOpsConfig
from zoo.train.data.mqar import MQAR, MQARConfig
from zoo.train.data.needle import Needle, NeedleConfig, Passkey, PasskeyConfig
from zoo.train.data.pystdlib import PyStdlib, PyStdlibConfig
from zoo.train.data.state_tracking import Parity, ParityConfig, Word, WordConfig
from zoo.train.data.stream import IGNORE, Batch, BatchHash, BatchStream, EvalBatches
from zoo.train.data.text import PackedText, PackedTextConfig, Text, TextConfig

__all__ = [
    "IGNORE",
    "MQAR",
    "SPLITS",
    "Batch",
    "BatchHash",
    "BatchStream",
    "ByteCodec",
    "Codec",
    "DataConfig",
    "DataModule",
    "Entry",
    "EvalBatches",
    "ListOps",
    "ListOpsConfig",
    "MQARConfig",
    "Needle",
    "NeedleConfig",
    "PackedText",
    "PackedTextConfig",
    "Parity",
    "ParityConfig",
    "Passkey",
    "PasskeyConfig",
    "PyStdlib",
    "PyStdlibConfig",
    "Source",
    "Text",
    "TextConfig",
    "TokenizerCodec",
    "Word",
    "WordConfig",
    "codec_from_dict",
    "create_source",
    "get_data",
    "list_data",
    "register_data",
]
