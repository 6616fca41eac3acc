"""A model zoo of sub-quadratic sequence architectures. Importing it needs torch alone."""

from zoo._version import __version__
from zoo.checkpoint import load_pretrained, save_pretrained
from zoo.config import ModelConfig
from zoo.generation import generate
from zoo.kernels.errors import ZooError
from zoo.long_context import set_cache, set_rope_scaling
from zoo.mixer import Mixer
from zoo.model import Model, ModelOutput, ModelState, create_model, state_bytes
from zoo.pretrained.hub import push_to_hub
from zoo.pretrained.tokenizer import load_tokenizer
from zoo.registry import list_models, register
from zoo.scoring import score

__all__ = [
    "Mixer",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "ModelState",
    "ZooError",
    "__version__",
    "create_model",
    "generate",
    "list_models",
    "load_pretrained",
    "load_tokenizer",
    "push_to_hub",
    "register",
    "save_pretrained",
    "score",
    "set_cache",
    "set_rope_scaling",
    "state_bytes",
]
