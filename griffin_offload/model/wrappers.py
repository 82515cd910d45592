"""Which multimodal wrappers are opened, and which are refused: data, and nothing heavy is imported."""

from ..errors import UnsupportedArchitecture
from .refused import REFUSED_WRAPPERS

# Wrappers whose text model was tried against the wrapper's own (tests/model/test_multimodal.py).
WRAPPERS = frozenset(
    """aria aya_vision cohere2_vision cohere_compass cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 fun_asr_nano
    fuyu gemma3 gemma4 gemma4_unified glm46v glm4v glm4v_moe glm_ocr glmasr glmga got_ocr2 granite4_vision
    granite_docling granite_speech granite_speech_plus hunyuan_vl hyperclovax_vision_v2 idefics2 idefics3 internvl
    janus kimi_k25 lfm2_vl lfm3_vl lighton_ocr llava llava_next llava_next_video llava_onevision minicpm_ocr
    minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 moss_transcribe_diarize nemotron_h_omni ovis2 paddleocr_vl
    pp_chart2table qianfan_ocr qwen2_5_omni qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe
    qwen3_asr qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe smolvlm vibevoice_asr video_llama_3
    video_llava vipllava voxtral""".split()  # noqa: SIM905
)


def refuse_wrapper(model_type: str) -> None:
    """Raises UnsupportedArchitecture, with the reason, for a wrapper that is refused."""
    if model_type in REFUSED_WRAPPERS:
        raise UnsupportedArchitecture(f"model type {model_type!r} is not supported: {REFUSED_WRAPPERS[model_type]}")
