"""Where the feed-forward neurons live, per `model_type`: data, not subclasses.

A neuron j is row j of every *up* module (gate and up, or fc1; weight and bias) and column j of the *down* module.
The input of the down module is GRIFFIN's z in every architecture.
"""

from dataclasses import dataclass

from .errors import UnsupportedArchitecture


@dataclass(frozen=True)
class FeedForward:
    """Module paths inside a model. `size` is the config's name for the number of neurons."""

    layers: str
    up: tuple[str, ...]
    down: str
    size: str = "intermediate_size"


GATED = FeedForward("model.layers", up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj")
UNGATED = FeedForward("model.layers", up=("mlp.up_proj",), down="mlp.down_proj")
FC = FeedForward("model.layers", up=("mlp.fc1",), down="mlp.fc2")

FEED_FORWARD = {
    "arcee": UNGATED,
    "gemma": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    "granite": GATED,
    "llama": GATED,
    "mistral": GATED,
    "olmo2": GATED,
    "opt": FeedForward("model.decoder.layers", up=("fc1",), down="fc2", size="ffn_dim"),
    "phi": FC,
    "qwen2": GATED,
    "qwen3": GATED,
    "smollm3": GATED,
    "stablelm": GATED,
    "starcoder2": FeedForward("model.layers", up=("mlp.c_fc",), down="mlp.c_proj"),
}


def feed_forward(model_type: str) -> FeedForward:
    """The entry of a `model_type`. Raises UnsupportedArchitecture, naming the supported ones."""
    try:
        return FEED_FORWARD[model_type]
    except KeyError:
        known = ", ".join(sorted(FEED_FORWARD))
        raise UnsupportedArchitecture(f"model type {model_type!r} is not supported; supported: {known}") from None
