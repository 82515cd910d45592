"""Causal model types of transformers that Griffin refuses, and why."""

_HALF = "only the decoder half of an encoder-decoder model: no checkpoint of its own writes text"
_ENCODER = "a bidirectional encoder: no checkpoint of it writes text from left to right"
_RECURRENT = "recurrent: it has no KV cache and no feed-forward block"
_AUDIO = "an audio model: its decoder writes sounds, not text"
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

_NO_CLASS = "the text model inside has no class of its own in transformers, and no known type computes the same"
_ABOUT_IMAGES = "it writes about an image or a sound that it always gets: its forward takes no text alone"
_READS_IMAGES = "it reads an image with an encoder, and its decoder looks at that in every layer"
_TIMM = "transformers builds its vision tower with the timm library, and the text model was not tried without it"
_SHARED = "text and images share one model, which is in no table of Griffin's"
_TEXT_TOO = "the text model inside is {}: {}"
# Multimodal wrappers that do not run; model/multimodal.py has those that do.
REFUSED_WRAPPERS = {
    **dict.fromkeys(
        """cosmos3_edge deepseek_ocr2 glm5_next mistral_large4 molmo2 muse_glimmer muse_spark step3p7
        unlimited_ocr""".split(),  # noqa: SIM905
        _NO_CLASS,
    ),
    **dict.fromkeys(
        """blip blip-2 instructblip instructblipvideo kyutai_speech_to_text nemo_speechlm
        voxtral_realtime""".split(),  # noqa: SIM905
        _ABOUT_IMAGES,
    ),
    **dict.fromkeys(
        """florence2 kosmos-2 kosmos-2.5 pix2struct pp_formulanet t5gemma2 udop
        vision-encoder-decoder""".split(),  # noqa: SIM905
        _READS_IMAGES,
    ),
    **dict.fromkeys(("fast_vlm", "perception_lm"), _TIMM),
    **dict.fromkeys(("chameleon", "emu3", "mistral4"), _SHARED),
    **{
        wrapper: _TEXT_TOO.format(text, REFUSED[text])
        for wrapper, text in {
            "dots3_note": "dots3_note_text",
            "gemma3n": "gemma3n_text",
            "inkling2": "inkling2_text",
            "inkling_mm_model": "inkling_text",
            "llama4": "llama4_text",
            "qwen4_exp": "qwen4_exp_text",
        }.items()
    },
    **{kind: REFUSED[kind] for kind in ("git", "phi4_multimodal")},
    "diffusion_gemma": "it writes by diffusion, a block of tokens at a time",
    "ernie4_5_vl_moe": "its mixtures have experts for text and experts for images",
    "evolla": "it writes about proteins, which its layers look at",
    "idefics": "its layers look at images by cross attention",
    "mllama": "its layers look at images by cross attention",
    "paligemma": "it reads a prompt in both directions (use_bidirectional_attention)",
    "pi0": "it moves robots",
    "shieldgemma2": "it judges images: its head says yes or no",
}
