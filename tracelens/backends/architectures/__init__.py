"""One small table per family of models."""

from collections.abc import Mapping

from tracelens.backends.architectures.bloom import BLOOM
from tracelens.backends.architectures.cohere import COHERE, COHERE2, COHERE_QK_NORM
from tracelens.backends.architectures.deepseek_v3 import DEEPSEEK_V3
from tracelens.backends.architectures.falcon import FALCON_PARALLEL, FALCON_SEQUENTIAL, FALCON_TWO_NORMS
from tracelens.backends.architectures.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
from tracelens.backends.architectures.glm import GLM, GLM4
from tracelens.backends.architectures.gpt2 import GPT2
from tracelens.backends.architectures.gpt_neox import GPT_NEOX_PARALLEL, GPT_NEOX_SEQUENTIAL
from tracelens.backends.architectures.gpt_oss import GPT_OSS
from tracelens.backends.architectures.granite import GRANITE
from tracelens.backends.architectures.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from tracelens.backends.architectures.llama4 import LLAMA4
from tracelens.backends.architectures.mixtral import MIXTRAL
from tracelens.backends.architectures.olmo import OLMO
from tracelens.backends.architectures.olmo2 import OLMO2, OLMO3
from tracelens.backends.architectures.olmoe import OLMOE
from tracelens.backends.architectures.opt import OPT
from tracelens.backends.architectures.phi import PHI
from tracelens.backends.architectures.phi3 import PHI3
from tracelens.backends.architectures.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE
from tracelens.backends.architectures.qwen3_next import QWEN3_NEXT
from tracelens.backends.architectures.smollm3 import SMOLLM3
from tracelens.backends.base import Family

FAMILIES = (
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES, PHI3, OLMO2),
    *(GRANITE, COHERE_QK_NORM, COHERE, COHERE2, GLM, GLM4, PHI, SMOLLM3, OLMO, OLMO3, GEMMA),
    *(GPT2, GPT_NEOX_SEQUENTIAL, GPT_NEOX_PARALLEL, OPT, BLOOM),
    *(FALCON_SEQUENTIAL, FALCON_TWO_NORMS, FALCON_PARALLEL),
    *(GPT_OSS, OLMOE, QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE, DEEPSEEK_V3, LLAMA4),
)
FAMILIES_OF: Mapping[str, tuple[Family, ...]] = {
    model_type: tuple(family for family in FAMILIES if model_type in family.model_types)
    for model_type in dict.fromkeys(kind for family in FAMILIES for kind in family.model_types)
}
"""By ``model_type``; of several the first that serves a configuration has it."""
