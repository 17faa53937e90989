"""One small table per family of models."""

from tracelens.backends.architectures.gemma import GEMMA3
from tracelens.backends.architectures.gpt2 import GPT2
from tracelens.backends.architectures.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA3, GPT2)
FAMILY_OF = {model_type: family for family in FAMILIES for model_type in family.model_types}
