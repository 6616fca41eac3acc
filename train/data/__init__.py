"""Data: the same batches for every architecture, from a config and a seed."""

from zoo.codec import ByteCodec, Codec, TokenizerCodec, codec_from_dict
from zoo.train.data.assoc_recall import AssocRecall, AssocRecallConfig
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
from zoo.train.data.copying import Copying, CopyingConfig
from zoo.train.data.depth_curve import DepthCurve, DepthCurveConfig
from zoo.train.data.induction import Induction, InductionConfig
from zoo.train.data.listops import ListOps, ListOpsConfig
from zoo.train.data.mad import (
    MadCompressCausal,
    MadCompressCausalConfig,
    MadMemorize,
    MadMemorizeConfig,
    MadSelcopy,
    MadSelcopyConfig,
)
from zoo.train.data.mad_recall import MadFuzzy, MadFuzzyConfig, MadNoisy, MadNoisyConfig, MadRecall, MadRecallConfig
from zoo.train.data.mqar import MQAR, MQARConfig
from zoo.train.data.needle import Needle, NeedleConfig, Passkey, PasskeyConfig
from zoo.train.data.pystdlib import PyStdlib, PyStdlibConfig
from zoo.train.data.ruler import Ruler, RulerConfig
from zoo.train.data.selective_copying import SelectiveCopying, SelectiveCopyingConfig
from zoo.train.data.state_tracking import Parity, ParityConfig, Word, WordConfig
from zoo.train.data.stream import IGNORE, Batch, BatchHash, BatchStream, EvalBatches
from zoo.train.data.text import PackedText, PackedTextConfig, Text, TextConfig

__all__ = [
    "IGNORE",
    "MQAR",
    "SPLITS",
    "AssocRecall",
    "AssocRecallConfig",
    "Batch",
    "BatchHash",
    "BatchStream",
    "ByteCodec",
    "Codec",
    "Copying",
    "CopyingConfig",
    "DataConfig",
    "DataModule",
    "DepthCurve",
    "DepthCurveConfig",
    "Entry",
    "EvalBatches",
    "Induction",
    "InductionConfig",
    "ListOps",
    "ListOpsConfig",
    "MQARConfig",
    "MadCompressCausal",
    "MadCompressCausalConfig",
    "MadFuzzy",
    "MadFuzzyConfig",
    "MadMemorize",
    "MadMemorizeConfig",
    "MadNoisy",
    "MadNoisyConfig",
    "MadRecall",
    "MadRecallConfig",
    "MadSelcopy",
    "MadSelcopyConfig",
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
    "Ruler",
    "RulerConfig",
    "SelectiveCopying",
    "SelectiveCopyingConfig",
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
