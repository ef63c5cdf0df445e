"""A Llama forward pass in pure NumPy, the key-value cache an explicit argument: the definition to compare with."""

from refengine.checkpoint import open_checkpoint
from refengine.config import Config
from refengine.conversation import Conversation
from refengine.errors import InputError
from refengine.generate import generate, teacher_forced
from refengine.kvcache import KVCache
from refengine.model import forward
from refengine.ops import OPS, Ops
from refengine.weights import Weights

__all__ = [
    "OPS",
    "Config",
    "Conversation",
    "InputError",
    "KVCache",
    "Ops",
    "Weights",
    "forward",
    "generate",
    "open_checkpoint",
    "teacher_forced",
]
