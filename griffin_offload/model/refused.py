"""Causal model types of transformers that Griffin refuses, and why."""

_HALF = "only the decoder half of an encoder-decoder model: no checkpoint of its own writes text"
_ENCODER = "a bidirectional encoder: no checkpoint of it writes text from left to right"
_RECURRENT = "recurrent: it has no KV cache and no feed-forward block"
_AUDIO = "an audio model: its decoder writes sounds, not text"
_INSIDE = "a multimodal wrapper: the text model inside is {}; save that part alone (its text_config, its weights)"
REFUSED = {
    **dict.fromkeys(
        """bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr
        whisper""".split(),  # noqa: SIM905
        _HALF,
    ),
    **dict.fromkeys(
        """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""".split(),  # noqa: SIM905
        _ENCODER,
    ),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), _RECURRENT),
    **dict.fromkeys(("moshi", "musicgen", "musicgen_melody"), _AUDIO),
    "dots3_note": _INSIDE.format("dots3_note_text"),
    "emu3": _INSIDE.format("emu3_text_model"),
    "fuyu": _INSIDE.format("persimmon"),
    "gemma3": _INSIDE.format("gemma3_text"),
    "gemma3n": _INSIDE.format("gemma3n_text"),
    "gemma4": _INSIDE.format("gemma4_text"),
    "gemma4_unified": _INSIDE.format("gemma4_unified_text"),
    "got_ocr2": _INSIDE.format("qwen2"),
    "llama4": _INSIDE.format("llama4_text"),
    "mllama": _INSIDE.format("mllama_text_model"),
    "moss_transcribe_diarize": _INSIDE.format("qwen3"),
    "qwen3_5": _INSIDE.format("qwen3_5_text"),
    "qwen3_5_moe": _INSIDE.format("qwen3_5_moe_text"),
    "qwen4_exp": _INSIDE.format("qwen4_exp_text"),
    "bamba": "in transformers itself, a pass with its cache differs from one without",
    "bitnet": "a norm over the neurons stands before the down projection, so that dropping some changes the others",
    "blt": "three stacks of layers over bytes and patches, with cross attention between them",
    "cpmant": "it puts prompt tokens of its own before every input, and a pass with its cache differs from one without",
    "dbrx": "its experts are held in a form of their own, which is not read yet",
    "deepseek_v4": "hyper-connections, and a router that needs the token ids in every layer",
    "dots3_note_text": "indexed attention with a cache of its own",
    "gemma3n_text": "its activation compares each neuron with all others, so that dropping some changes the others",
    "gemma4_assistant": "a drafter that reads another model's KV cache",
    "gemma4_unified_assistant": "a drafter that reads another model's KV cache",
    "git": "it describes images",
    "hrm_text": "its layers run several times in one forward, so that reading each once is not possible",
    "inkling2_text": "convolution states, and a residual attention over its blocks",
    "inkling_text": "convolution states, and shared experts that its router scales inside z",
    "jetmoe": "its experts are held in a form of their own, and its attention is a mixture too",
    "llama4_text": "its experts are held in a form of their own: every one runs on all tokens",
    "longcat_flash": "two attentions, two dense blocks and a mixture with idle experts in every layer",
    "minimax": "linear attention with a cache class of its own",
    "openai-gpt": "it has no KV cache: every token runs the whole text again",
    "phi4_multimodal": "text, vision and audio in one module",
    "qwen4_exp_text": "hyper-connections and n-gram embeddings",
    "recurrent_gemma": "recurrent state is kept inside its modules, not in a cache",
    "reformer": "reversible layers with hashed attention and a cache of its own",
    "rwkv": "recurrent: a neuron's input depends on the token before, and there is no KV cache",
    "xlm": "it has no causal KV cache",
    "xlnet": "a permutation language model, with a memory instead of a KV cache",
    "zamba": "its recurrent layers share one transformer block",
    "zamba2": "its recurrent layers share transformer blocks",
    "zaya": "its router's state is handed from layer to layer",
}
