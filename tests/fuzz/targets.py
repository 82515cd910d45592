"""What is fuzzed: for each kind of file that Griffin reads, valid inputs and the code that reads them.

A read may end with a result or with one of our errors; every other end is a finding."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from griffin_offload.cli import _settings as settings
from griffin_offload.cli.generate_many import fault
from griffin_offload.cli.main import griffin
from griffin_offload.cli.mem_report import show_last
from griffin_offload.cli.sessions import cells, entries
from tiny import CHAT_TEMPLATE, tiny_checkpoint
from tiny_gguf import write_gguf

from griffin_offload.chat import Chat
from griffin_offload.checkpoint.gguf.config import read_config, require_supported
from griffin_offload.checkpoint.gguf.header import read_gguf
from griffin_offload.checkpoint.gguf.link import read_link
from griffin_offload.checkpoint.headers import Checkpoint, read_header
from griffin_offload.checkpoint.which_files import INDEX
from griffin_offload.engine import Engine
from griffin_offload.jsonl import read_rows
from griffin_offload.model.chat_template import ChatTemplate
from griffin_offload.model.config_fields import override_fields
from griffin_offload.model.generation_fields import check_generation, load_generation_config
from griffin_offload.model.pretrained import check_layers, read_headers
from griffin_offload.model.skeleton import Skeleton
from griffin_offload.model.tokenizer import load_tokenizer
from griffin_offload.opening import _skeleton
from griffin_offload.options import Decoding, Pruning
from griffin_offload.pruning.layer_allocation import Curves, load_curves, save_curves, share_neurons
from griffin_offload.pruning.prior import load_prior, save_prior
from griffin_offload.report import save_last
from griffin_offload.session import open_session, save_session
from griffin_offload.sources.gguf_convert import link

ROWS = 300  # of the tiny model's embedding
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
SETTINGS = """temperature = 0.7
sparsity = 0.5
[generate]
max-new-tokens = 20
stop = ["a", "b"]
greedy = true
[eval.choice]
limit = 3
"""


@dataclass(frozen=True)
class Target:
    """`file`: its name in the folder of `Inputs`; `form`: of mutate.FORMS; `weight`: its share of the cases, the less
    the slower it is; `words`: keys and texts that mean something there."""

    name: str
    file: str
    form: str
    read: Callable[["Inputs", Path], Any]
    weight: int = 10
    words: tuple[str, ...] = ()


class Inputs:
    """A folder of valid inputs, made once; each process reads and writes in a copy of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self) -> "Inputs":
        model = tiny_checkpoint(self.root / "model", "llama", chat=True)
        (model / "chat_template.jinja").unlink()
        told = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": CHAT_TEMPLATE}))
        shutil.copytree(model, self.root / "whole")
        shards = tiny_checkpoint(self.root / "shards", "llama", shards=3)
        assert (shards / INDEX).is_file()
        write_gguf(model, self.root / "model.gguf", rope__scaling__type="none")
        (self.root / "template.jinja").write_text(CHAT_TEMPLATE)
        (self.root / "griffin.toml").write_text(SETTINGS)
        rows = [{"id": 1, "prompt": "a"}, {"id": "b", "messages": QUESTION}, {"prompt": "c", "system": "d"}]
        (self.root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        curves = Curves("key", (0.0, 0.5, 1.0), 0.5, ((0.3, 0.2, 0.0),) * 3, "sha", 8, 8, 2, "float32")
        save_curves(self.root / "curves.json", curves)
        with self.environment():
            engine = Engine(model, device="cpu")
            chat = Chat(engine, Pruning(sparsity=0.5, prior="off"), Decoding(max_new_tokens=3))
            save_last(chat.ask("Hello").report, self.root / "cache")
            session = save_session(chat, "talk")
            shutil.copy(session.path, self.root / "talk.safetensors")
            prior = engine.prior()
            assert prior
            save_prior(self.root / "prior.safetensors", prior)
            link(self.root / "model.gguf", self.root / "linked")
        return self

    def copy(self, root: Path) -> "Inputs":
        return Inputs(Path(shutil.copytree(self.root, root)))

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Griffin's own folders in this one, and no network."""
        names = {"CACHE": "cache", "STATE": "state", "CONFIG": "griffin.toml"}
        ours = {f"GRIFFIN_{name}": str(self.root / place) for name, place in names.items()}
        ours |= {"GRIFFIN_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
        before = dict(os.environ)
        os.environ.update(ours)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def seed(self, target: Target) -> bytes:
        return (self.root / target.file).read_bytes()

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.root / "whole", device="cpu")

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.root / "whole")


def _config(inputs: Inputs, path: Path) -> None:
    headers = read_headers(path.parent)
    config, checkpoint = headers.config, headers.checkpoint
    override_fields(path.parent, config)
    check_layers(path.parent, config, checkpoint)


def _model(inputs: Inputs, path: Path) -> Skeleton:
    import torch

    from griffin_offload.checkpoint.reader import Reader
    from griffin_offload.model.compute_dtype import compute_dtype

    headers = read_headers(path.parent)
    config, checkpoint = headers.config, headers.checkpoint
    override_fields(path.parent, config)
    check_layers(path.parent, config, checkpoint)
    dtype, _ = compute_dtype(checkpoint, "cpu", None)
    assert isinstance(dtype, torch.dtype)
    return _skeleton(path.parent, config, checkpoint, dtype, Reader())


def _generation(inputs: Inputs, path: Path) -> None:
    settings, _ = load_generation_config(path.parent, ROWS)
    check_generation(settings, {}, ROWS)


def _tokenizer(inputs: Inputs, path: Path) -> None:
    tokenizer = load_tokenizer(path.parent)
    ChatTemplate(tokenizer, "model").apply(QUESTION, add_generation_prompt=True)


def _template(inputs: Inputs, path: Path) -> None:
    inputs.tokenizer.chat_template = path.read_bytes().decode("utf-8", "replace")
    ChatTemplate(inputs.tokenizer, "model").apply(QUESTION, add_generation_prompt=True)


def _gguf_header(inputs: Inputs, path: Path) -> None:
    file = read_gguf(path, path.name)
    require_supported(file, path.name)
    file.require_apart()
    read_config(file, path.name)


def _gguf(inputs: Inputs, path: Path) -> None:
    out = inputs.root / "out"
    shutil.rmtree(out, ignore_errors=True)
    link(path, out)


def _prior(inputs: Inputs, path: Path) -> None:
    inputs.engine.opened.check_prior(load_prior(path))


def _curves(inputs: Inputs, path: Path) -> None:
    if curves := load_curves(path):
        share_neurons(curves, [16, 16, 16], 0.5)


def _sessions(inputs: Inputs, path: Path) -> None:
    for entry in entries():
        cells(entry)
    session = open_session("talk")
    session.options(Pruning)
    session.options(Decoding)
    _as_read(session.facts)


def _resumed(inputs: Inputs, path: Path) -> None:
    session = open_session("talk")
    session.resume(inputs.engine, session.options(Pruning), session.options(Decoding))


def _as_read(facts: Mapping[str, Any]) -> None:
    json.dumps(dict(facts))


def _last(inputs: Inputs, path: Path) -> None:
    with redirect_stdout(io.StringIO()):
        show_last(False)


def _settings(inputs: Inputs, path: Path) -> None:
    context = click.Context(griffin)
    groups = griffin.list_commands(context)
    for name in ("generate", "chat"):
        command = griffin.get_command(context, name)
        assert command
        found = settings.settings_of(command, (name,), groups, {"temperature": None, "sparsity": None})
        settings.default_map(command, found)


CONFIG = (
    *("quantization_config", "auto_map", "attn_implementation", "_attn_implementation", "text_config", "dtype"),
    *("rope_parameters", "rope_scaling", "layer_types", "num_labels", "id2label", "model_type", "vocab_size"),
    *("num_hidden_layers", "transformers_weights", "sliding_window", "head_dim", "llama", "gpt2", "gemma3", "mamba"),
    *("quant_method", "gptq", "fp8", "bits", "llama3", "factor", "yarn", "experts_implementation", "torch_dtype"),
)
GENERATION = (
    *("watermarking_config", "eos_token_id", "stop_strings", "custom_generate", "compile_config", "cache_config"),
    *("suppress_tokens", "sequence_bias", "bad_words_ids", "temperature", "top_k", "forced_bos_token_id", "max_length"),
)
TOKENIZER = (
    *("auto_map", "tokenizer_class", "added_tokens_decoder", "chat_template", "extra_special_tokens", "backend"),
    *("processor_class", "model_max_length", "PreTrainedTokenizerFast", "LlamaTokenizer", "bos_token", "content"),
    *("normalizer", "pre_tokenizer", "post_processor", "decoder", "Regex", "Sequence", "ByteLevel", "Split", "BPE"),
)
GGUF = (
    *("general.architecture", "general.alignment", "general.type", "split.count", "llama.expert_count"),
    *("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.key_length", "llama.vocab_size"),
    *("llama.attention.sliding_window", "llama.rope.freq_base", "llama.rope.dimension_count", "adapter.type"),
    *("tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_eos_token", "tokenizer.chat_template"),
)
TEMPLATE = (
    "{{",
    "}}",
    "{%",
    "%}",
    "for ",
    "if ",
    "messages",
    "loop",
    "raise_exception(",
    "range(",
    "|tojson",
    "['role']",
)
TARGETS = {
    target.name: target
    for target in (
        Target("safetensors", "model/model.safetensors", "safetensors", lambda _, path: read_header(path), 200),
        Target("index", f"shards/{INDEX}", "json", lambda _, path: Checkpoint.open(path.parent), 100),
        Target("config", "model/config.json", "json", _config, 40, CONFIG),
        Target("model", "model/config.json", "json", _model, 4, CONFIG),
        Target("generation config", "model/generation_config.json", "json", _generation, 60, GENERATION),
        Target("tokenizer config", "model/tokenizer_config.json", "json", _tokenizer, 4, TOKENIZER),
        Target("tokenizer", "model/tokenizer.json", "json", _tokenizer, 4, TOKENIZER),
        Target("chat template", "template.jinja", "bytes", _template, 20, TEMPLATE),
        Target("gguf header", "model.gguf", "gguf", _gguf_header, 60, GGUF),
        Target("gguf", "model.gguf", "gguf", _gguf, 2, GGUF),
        Target("gguf note", "linked/griffin_source.json", "json", lambda _, path: read_link(path.parent), 60),
        Target("prior", "prior.safetensors", "safetensors", _prior, 100),
        Target("curves", "curves.json", "json", _curves, 100),
        Target("session", "state/sessions/talk.safetensors", "safetensors", _sessions, 60),
        Target("resumed session", "state/sessions/talk.safetensors", "safetensors", _resumed, 10),
        Target("last report", "cache/last.json", "json", _last, 20),
        Target("settings", "griffin.toml", "bytes", _settings, 60, ("[", "]", "=", "generate", '"', "inf", "1e400")),
        Target("rows", "rows.jsonl", "lines", lambda _, path: read_rows(path, lambda row: fault(row, False)), 100),
    )
}
