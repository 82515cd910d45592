"""What Griffin knows of each model type, as data.

Neuron j is row j of every *up* module (gate and up, or fc1; weight and bias) and column j of the *down* module. The
input of the down module is GRIFFIN's z in every architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UnsupportedArchitecture
from .refused import REFUSED


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block of a decoder layer: module paths in the layer.

    `halves`: gate and up are one module, so that neuron j is rows j and F + j."""

    up: tuple[str, ...]
    down: str
    halves: bool = False


@dataclass(frozen=True)
class Experts:
    """Routed experts in transformers: the path of a module with 3-D parameters, whose dim 0 is the expert."""

    path: str


@dataclass(frozen=True)
class Architecture:
    """What Griffin knows of a model type.

    `layers`: path of the decoder layers. `blocks`: every block that a layer may have -> the config's field for its
    number of neurons, which an export changes; '' if there is none.
    `own_mask`: its code reads the attention mask itself, so its attention cannot run in pieces.
    `similarity`: whether the state that enters a block is the state that leaves the layer, less the output of the
    layer's last module (FFN-SkipLLM needs it); or the config's field and value with which it is.
    `static`: whether its code does the same for every token of an answer, without asking the device for a number, so
    that a CUDA graph can replay it (static_step.py).
    `state_by_token`: its code goes on from a recurrent state by one token alone; several begin without one."""

    layers: str
    blocks: Mapping[FeedForward | Experts, str]
    own_mask: bool = False
    similarity: bool | tuple[str, object] = True
    static: bool = True
    state_by_token: bool = False

    def tells_similarity(self, config: Any) -> bool:
        """Whether `similarity` holds for a model with this config."""
        if isinstance(self.similarity, bool):
            return self.similarity
        field, value = self.similarity
        return bool(getattr(config, field, value) == value)


GATED = FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
UNGATED = FeedForward(("mlp.up_proj",), "mlp.down_proj")
FUSED = FeedForward(("mlp.gate_up_proj",), "mlp.down_proj", halves=True)
WI = FeedForward(("mlp.Wi",), "mlp.Wo", halves=True)
FC = FeedForward(("mlp.fc1",), "mlp.fc2")
LAYER_FC = FeedForward(("fc1",), "fc2")
C_FC = FeedForward(("mlp.c_fc",), "mlp.c_proj")
FC_IN = FeedForward(("mlp.fc_in",), "mlp.fc_out")
H_TO_4H = FeedForward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
FEED_FORWARD = FeedForward(("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj")
W1_W3 = FeedForward(("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2")
FFN = FeedForward(("ffn.up_proj",), "ffn.down_proj")
FFN_LIST = FeedForward(("ffn.0",), "ffn.2")
SHARED_LINEAR = FeedForward(("shared_mlp.input_linear",), "shared_mlp.output_linear", halves=True)
ROUTED = Experts("mlp.experts")
SPARSE_ROUTED = Experts("block_sparse_moe.experts")
FEED_FORWARD_ROUTED = Experts("feed_forward.experts")


def _gated(path: str) -> FeedForward:
    return FeedForward((f"{path}.gate_proj", f"{path}.up_proj"), f"{path}.down_proj")


SHARED_EXPERT, SHARED_EXPERTS, SHARED_MLP = map(_gated, ("mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp"))
SHARED_FUSED = FeedForward(("mlp.shared_experts.gate_up_proj",), "mlp.shared_experts.down_proj", halves=True)
SIZE, ROUTED_SIZE, SHARED_SIZE = "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"
LLAMA = Architecture("model.layers", {GATED: SIZE})
UP_DOWN = Architecture("model.layers", {UNGATED: SIZE})
GLM = Architecture("model.layers", {FUSED: SIZE})
GPT2 = Architecture("transformer.h", {C_FC: "n_inner"})
GPTJ = Architecture("transformer.h", {FC_IN: "n_inner"})
MIXTRAL = Architecture("model.layers", {ROUTED: SIZE})
QWEN_MOE = Architecture("model.layers", {GATED: SIZE, ROUTED: ROUTED_SIZE, SHARED_EXPERT: SHARED_SIZE})
DEEPSEEK = Architecture("model.layers", {GATED: SIZE, ROUTED: ROUTED_SIZE, SHARED_EXPERTS: ROUTED_SIZE})
LAGUNA = Architecture("model.layers", {GATED: SIZE, ROUTED: ROUTED_SIZE, SHARED_EXPERTS: SHARED_SIZE})
GRANITE_MOE = Architecture("model.layers", {SPARSE_ROUTED: SIZE, SHARED_LINEAR: "shared_intermediate_size"})
JAMBA = Architecture("model.layers", {FEED_FORWARD: SIZE, FEED_FORWARD_ROUTED: SIZE})
LFM2 = Architecture("model.layers", {W1_W3: SIZE, FEED_FORWARD_ROUTED: ROUTED_SIZE})
ARCHITECTURES = {
    **dict.fromkeys(
        """cohere cohere2 cohere_compass_text cwm diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text helium
        hunyuan_v1_dense hyperclovax internlm3 iquestcoder llama ministral ministral3 mistral olmo olmo2 olmo3
        olmo_hybrid qwen2 qwen3 qwen3_5_text seed_oss smollm3 stablelm vaultgemma youtu""".split(),  # noqa: SIM905
        LLAMA,
    ),
    "doge": replace(LLAMA, own_mask=True),
    # What is added is scaled.
    **dict.fromkeys(("granite", "granite_swa"), replace(LLAMA, similarity=("residual_multiplier", 1.0))),
    "minicpm3": replace(LLAMA, similarity=False),
    "gemma4_unified_text": replace(LLAMA, similarity=False),  # the sum is scaled
    **dict.fromkeys(("apertus", "arcee", "jais2", "nemotron"), UP_DOWN),
    **dict.fromkeys(("glm", "glm4", "phi3"), GLM),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), GPT2),
    **dict.fromkeys(("codegen", "gptj"), GPTJ),
    **dict.fromkeys(("flex_olmo", "minimax_m2", "mixtral", "olmoe", "phimoe", "gpt_oss"), MIXTRAL),
    **dict.fromkeys(
        ("beam", "flint", "mellum", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"),
        QWEN_MOE,
    ),
    "mimo_v2_flash": QWEN_MOE,
    **dict.fromkeys(
        """afmoe axk1 bailing_hybrid deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite hy_v3
        kimi_linear solar_open""".split(),  # noqa: SIM905
        DEEPSEEK,
    ),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"), replace(DEEPSEEK, own_mask=True)),
    **dict.fromkeys(("kolibri1", "laguna"), LAGUNA),
    **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoeshared"), GRANITE_MOE),
    "granitemoehybrid": replace(GRANITE_MOE, similarity=("residual_multiplier", 1.0)),
    "falcon_h1": JAMBA,
    "jamba": replace(JAMBA, state_by_token=True),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), LFM2),
    "aria_text": Architecture("model.layers", {ROUTED: SIZE, SHARED_EXPERTS: SIZE}),
    "biogpt": Architecture("biogpt.layers", {LAYER_FC: SIZE}),
    "bloom": Architecture("transformer.h", {H_TO_4H: ""}, similarity=False),  # the block adds the residual itself
    "cohere2_moe": Architecture(
        "model.layers", {GATED: "prefix_dense_intermediate_size", ROUTED: SIZE, SHARED_EXPERTS: SIZE}
    ),
    "ctrl": Architecture("transformer.h", {FFN_LIST: "dff"}),
    "falcon": Architecture(  # else attention's output is added in the block's own memory
        "transformer.h", {H_TO_4H: "ffn_hidden_size"}, similarity=("parallel_attn", False)
    ),
    "gemma4_text": Architecture(  # the sum is scaled
        "model.layers", {GATED: SIZE, Experts("experts"): ROUTED_SIZE}, similarity=False
    ),
    "gpt_neo": Architecture("transformer.h", {C_FC: SIZE}, static=False),
    "gpt_neox": Architecture("gpt_neox.layers", {H_TO_4H: SIZE}),
    "gpt_neox_japanese": Architecture("gpt_neox_japanese.layers", {H_TO_4H: ""}),
    "hunyuan_v1_moe": Architecture("model.layers", {ROUTED: SIZE, SHARED_MLP: SIZE}),
    "minimax_m3_vl_text": Architecture(
        "model.layers",
        {FUSED: "dense_intermediate_size", ROUTED: SIZE, SHARED_FUSED: "shared_intermediate_size"},
    ),
    "modernbert-decoder": Architecture("model.layers", {WI: SIZE}),
    "mpt": Architecture(  # the block adds the residual itself
        "transformer.blocks", {FFN: ""}, similarity=False, static=False
    ),
    "nanochat": Architecture("model.layers", {FC: SIZE}),
    "nemotron_h": Architecture(
        "model.layers",
        {
            FeedForward(("mixer.up_proj",), "mixer.down_proj"): SIZE,
            Experts("mixer.experts"): ROUTED_SIZE,
            FeedForward(
                ("mixer.shared_experts.up_proj",), "mixer.shared_experts.down_proj"
            ): "moe_shared_expert_intermediate_size",
        },
    ),
    "opt": Architecture(  # else a norm comes after the sum
        "model.decoder.layers", {LAYER_FC: "ffn_dim"}, similarity=("do_layer_norm_before", True)
    ),
    "persimmon": Architecture("model.layers", {H_TO_4H: SIZE}),
    "phi": Architecture("model.layers", {FC: SIZE}),
    "starcoder2": Architecture("model.layers", {C_FC: SIZE}),
    "xglm": Architecture("model.layers", {LAYER_FC: "ffn_dim"}, static=False),
}


def architecture(model_type: str) -> Architecture | None:
    """The entry of a `model_type`, or None if it is not known. Raises UnsupportedArchitecture, with the reason, for a
    type that is refused."""
    if model_type in REFUSED:
        raise UnsupportedArchitecture(f"model type {model_type!r} is not supported: {REFUSED[model_type]}")
    return ARCHITECTURES.get(model_type)
