"""BigBird with its masked-language-model head, in the layout of transformers."""

from __future__ import annotations

from typing import Any

from zoo.architectures.bigbird import BigBirdConfig
from zoo.pretrained.convert import Table
from zoo.pretrained.encoders import INERT, RENAMES, encoder_table, read_encoder, write_encoder
from zoo.pretrained.family import Family, Published, insist

TRANSFORM = "cls.predictions.transform"
HEAD = {"transform.0": f"{TRANSFORM}.dense", "transform.2": f"{TRANSFORM}.LayerNorm"}


def read(theirs: Published) -> dict[str, Any]:
    """See `Family.read`."""
    for key, only in {"attention_type": "block_sparse", "rescale_embeddings": False, "use_bias": True}.items():
        theirs.only(key, only)
    return read_encoder(theirs, "gelu_new", None) | {
        "max_positions": theirs("max_position_embeddings", 4096),
        "block_size": theirs("block_size", 64),
        "n_random_blocks": theirs("num_random_blocks", 3),
        "plan": "transformers",
    }


def write(config: BigBirdConfig) -> dict[str, Any]:
    """See `Family.write`."""
    insist(config, "big_bird", plan="transformers")
    return write_encoder(config, "big_bird", 0, None) | {
        "architectures": ["BigBirdForMaskedLM"],
        "model_type": "big_bird",
        "pad_token_id": 0,
        "attention_type": "block_sparse",
        "block_size": config.block_size,
        "num_random_blocks": config.n_random_blocks,
    }


def table(config: BigBirdConfig, theirs: Published) -> Table:
    """See `Family.table`."""
    result = encoder_table(config, theirs, "bert", 0, HEAD, "cls.predictions.bias", 2)
    # The masked model has it and does not read it.
    result.silent["bert.pooler.weight"] = (config.d_model, config.d_model)
    result.silent["bert.pooler.bias"] = (config.d_model,)
    return result


FAMILY = Family("big_bird", "bigbird", read, table, write, model_types=("big_bird",), renames=RENAMES, inert=INERT)
