"""The shapes of the models that the catalogue knows: the fields of a config that decide sizes and memory. Data only.

Where a shape comes from stands above it. Those without a note are the published config.json, and their parameters are
the published number; of others the parameters are counted from the shape (tests/sources/test_resolve.py does both)."""

from typing import Any

# The numbers of a row below.
_SIZES = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
    max_position_embeddings""".split()  # noqa: SIM905


def _config(model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    common = {"model_type": model_type, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return common | dict(zip(_SIZES, sizes, strict=True)) | more


def opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    config = _config("opt", hidden, 4 * hidden, layers, heads, heads, 50272, 2048, tie_word_embeddings=True)
    del config["intermediate_size"], config["num_key_value_heads"]
    return config | {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}


TIED = {"tie_word_embeddings": True}
GEMMA = TIED | {"head_dim": 256}
GEMMA_3 = GEMMA | {"sliding_window": 512}
GEMMA_3_LARGE = GEMMA | {"sliding_window": 1024}
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


# google-deepmind/gemma, gemma/gm/nn/_gemma.py and gemma4/_gemma4.py; the vocabulary is that of transformers' config.
GEMMA_3_4B = _config("gemma3_text", 2560, 10240, 34, 8, 4, 262208, 131072, **GEMMA_3_LARGE)
GEMMA_3_12B = _config("gemma3_text", 3840, 15360, 48, 16, 8, 262208, 131072, **GEMMA_3_LARGE)
GEMMA_3_27B = _config("gemma3_text", 5376, 21504, 62, 32, 16, 262208, 131072, **GEMMA_3_LARGE | {"head_dim": 128})
GEMMA_4_E2B = _config(
    "gemma4_text",
    *(1536, 6144, 35, 8, 1, 262144, 131072),
    num_kv_shared_layers=20,
    use_double_wide_mlp=True,
    layer_types=[*["sliding_attention"] * 4, "full_attention"] * 7,
    **GEMMA,
)
GEMMA_4_E4B = _config(
    "gemma4_text", 2560, 10240, 42, 8, 2, 262144, 131072, num_kv_shared_layers=18, use_double_wide_mlp=False, **GEMMA
)
GEMMA_4_31B = _config(
    "gemma4_text",
    *(5376, 21504, 60, 32, 16, 262144, 262144),
    num_global_key_value_heads=4,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
    **GEMMA_3_LARGE,
)


def _hybrid(count: int, attention: set[int]) -> list[str]:
    """Layer types of Granite 4's hybrids."""
    return ["attention" if layer in attention else "mamba" for layer in range(count)]


# NVIDIA-NeMo/Megatron-Bridge, ministral3_provider.py and mistral_provider.py, as of the day they were added;
# transformers' Mistral3Config has the same of Mistral Small 3.1, and its Ministral3Config of the 8B.
MISTRAL_SMALL_3 = _config("mistral", 5120, 32768, 40, 32, 8, 131072, 32768, **MISTRAL)
MISTRAL_SMALL_31 = MISTRAL_SMALL_3 | {"max_position_embeddings": 131072}
MINISTRAL_3_3B = _config("ministral3", 3072, 9216, 26, 32, 8, 131072, 262144, head_dim=128, **TIED)
MINISTRAL_3_8B = _config("ministral3", 4096, 14336, 34, 32, 8, 131072, 262144, head_dim=128)
MINISTRAL_3_14B = _config("ministral3", 5120, 16384, 40, 32, 8, 131072, 262144, head_dim=128)

# radixark/miles, scripts/models/qwen3*.py (Qwen3.6 and 3.8 are as 3.5), THUDM/slime for the 0.8B; the heads of the
# linear attention are transformers' default (9B) or those of published configs in tests of other projects.
QWEN3_4B_2507 = QWEN3_4B | {"max_position_embeddings": 262144}


def _qwen35(hidden: int, neurons: int, layers: int, heads: tuple[int, int, int], tied: bool) -> dict[str, Any]:
    """`heads`: of attention, of keys and values there, of values in linear attention."""
    sizes = hidden, neurons, layers, heads[0], heads[1], 248320, 262144
    more = {"head_dim": 256, "linear_num_value_heads": heads[2], "tie_word_embeddings": tied}
    return _config("qwen3_5_text", *sizes) | more


QWEN35_08B = _qwen35(1024, 3584, 24, (8, 2, 16), tied=True)
QWEN35_4B = _qwen35(2560, 9216, 32, (16, 4, 32), tied=True)
QWEN35_9B = _qwen35(4096, 12288, 32, (16, 4, 32), tied=False)
QWEN35_27B = _qwen35(5120, 17408, 64, (24, 4, 48), tied=False)

# Lightning-AI/litgpt, litgpt/config.py.
PHI_4 = _config("phi3", 5120, 17920, 40, 40, 10, 100352, 16384, pad_token_id=None)
PHI_4_MINI = _config("phi3", 3072, 8192, 32, 24, 8, 200064, 131072, pad_token_id=None, **TIED)
OLMO_2_7B = _config("olmo2", 4096, 11008, 32, 32, 32, 100352, 4096)
OLMO_2_13B = _config("olmo2", 5120, 13824, 40, 40, 40, 100352, 4096)

# AI-Hypercomputer/maxtext, configs/models/olmo3-*.yml.
OLMO_3_7B = _config("olmo3", 4096, 11008, 32, 32, 32, 100278, 65536, sliding_window=4096)
OLMO_3_32B = _config("olmo3", 5120, 27648, 64, 40, 8, 100278, 65536, sliding_window=4096)

# transformers' defaults for the type.
SMOLLM3_3B = _config("smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, **TIED)

# transformers' defaults for the type, and zyzshishui/slime, scripts/models/glm4-9B.sh; radixark/miles,
# scripts/models/glm4.5-106B-A12B.py.
GLM_4_9B = _config("glm4", 4096, 13696, 40, 32, 2, 151552, 32768, head_dim=128, attention_bias=True)
GLM_45_AIR = _config(
    "glm4_moe",
    *(4096, 10944, 46, 96, 8, 151552, 131072),
    head_dim=128,
    attention_bias=True,
    moe_intermediate_size=1408,
    n_routed_experts=128,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=1,
)

# Published config.json of ibm-granite/granite-4.0-micro and -h-micro as others copied them, and the header of the GGUF
# file of -h-tiny.
GRANITE_4 = TIED | {"num_local_experts": 0, "shared_intermediate_size": 8192, "position_embedding_type": "rope"}
GRANITE_4_MICRO = _config(
    "granitemoehybrid", 2560, 8192, 40, 40, 8, 100352, 131072, **GRANITE_4, layer_types=_hybrid(40, set(range(40)))
)
GRANITE_4_H = {
    "layer_types": _hybrid(40, {5, 15, 25, 35}),
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "position_embedding_type": "nope",
}
GRANITE_4_H_MICRO = _config(
    "granitemoehybrid", 2048, 8192, 40, 32, 8, 100352, 131072, mamba_n_heads=64, **GRANITE_4 | GRANITE_4_H
)
GRANITE_4_H_TINY = _config(
    "granitemoehybrid",
    *(1536, 512, 40, 12, 4, 100352, 131072),
    mamba_n_heads=48,
    num_experts_per_tok=6,
    **GRANITE_4 | GRANITE_4_H | {"num_local_experts": 64, "shared_intermediate_size": 1024},
)


# NVIDIA-NeMo/Megatron-Bridge, recipes/nemotronh/h100/nemotron_nano_v2.py and nemotron_3_nano_4b.py. Nemotron 70B has
# the shape of Llama 3.1 70B (Lightning-AI/litgpt, litgpt/config.py).
def _nemotron(hidden: int, neurons: int, pattern: str, mamba_heads: int, context: int) -> dict[str, Any]:
    """`pattern`: a letter for each layer; M: recurrent, -: feed-forward, *: attention."""
    kinds = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
    return _config(
        "nemotron_h",
        *(hidden, neurons, len(pattern), 40, 8, 131072, context),
        head_dim=128,
        layer_types=[kinds[letter] for letter in pattern],
        mamba_num_heads=mamba_heads,
        mamba_head_dim=80,
        ssm_state_size=128,
        n_groups=8,
    )


NEMOTRON_3_4B = _nemotron(3136, 12544, "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", 96, 262144)
NEMOTRON_2_9B = _nemotron(4480, 15680, "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 128, 131072)
NEMOTRON_2_12B = _nemotron(5120, 20480, "M-M-M-M*-" + "M-M-M-M*-" * 5 + "M-M-M-M-", 128, 131072)
