"""What the JSON files of a checkpoint can make transformers do: run nothing, fetch nothing, read nothing elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, tiny_checkpoint, tiny_prompt
from tiny_wrappers import TINY as WRAPPERS
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from griffin_offload import Engine
from griffin_offload.errors import CheckpointError, GriffinError
from griffin_offload.model.config_allowed import NEVER, allowed_config, known_fields
from griffin_offload.model.pretrained import load_config, read_config
from griffin_offload.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.fault

CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
KERNEL = "evil/kernel"
# A field of a file -> a value that some code of transformers would act on.
CONFIG: dict[str, Any] = {
    "auto_map": CODE,
    "attn_implementation": KERNEL,
    "_attn_implementation": KERNEL,
    "_attn_implementation_internal": KERNEL,
    "experts_implementation": KERNEL,
    "_experts_implementation_internal": KERNEL,
    "_name_or_path": "evil/model",
    "name_or_path": "evil/model",
    "architectures": ["EvilForCausalLM"],
    "custom_pipelines": {"text-generation": {"impl": "evil.Evil", "pt": ["AutoModelForCausalLM"]}},
    "backbone": "evil/backbone",
    "backbone_config": {"model_type": "resnet", "backbone": "evil/backbone", "use_timm_backbone": True},
    "use_timm_backbone": True,
    "trust_remote_code": True,
    "text_config": {"model_type": "llama", "auto_map": CODE},
    "vision_config": {"model_type": "clip_vision_model", "auto_map": CODE},
    "_commit_hash": "evil",
    "custom_generate": "evil/generate",
    "generation_config": {"custom_generate": "evil/generate"},
    "kernel_config": {"kernel_mapping": {"RMSNorm": "evil/kernel:Evil"}},
    "peft_config": {"base_model_name_or_path": "evil/model"},
    "adapter_path": "evil/adapter",
}
GENERATION: dict[str, Any] = {
    "custom_generate": "evil/generate",
    "auto_map": CODE,
    "trust_remote_code": True,
    "assistant_model": "evil/model",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "compile_config": {"backend": "evil", "fullgraph": True},
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto"},
    "generation_kwargs": {"custom_generate": "evil/generate"},
}
TOKENIZER: dict[str, Any] = {
    "auto_map": {"AutoTokenizer": [None, "evil.Evil"]},
    "backend": "evil",
    "processor_class": "EvilProcessor",
    "chat_template_file": "/etc/passwd",
    "vocab_file": "/etc/passwd",
    "tokenizer_file": "/etc/passwd",
    "added_tokens_file": "/etc/passwd",
    "special_tokens_map_file": "/etc/passwd",
    "custom_tokenizer": "evil.Evil",
    "name_or_path": "evil/model",
    "chat_template": "{{ messages.__class__.__mro__ }}{{ cycler.__init__.__globals__['os'].system('true') }}",
}
CASES = [
    *(("config.json", key, value) for key, value in CONFIG.items()),
    *(("generation_config.json", key, value) for key, value in GENERATION.items()),
    *(("tokenizer_config.json", key, value) for key, value in TOKENIZER.items()),
]
# Opens each checkpoint, and answers; prints what was opened, run, imported and asked for meanwhile.
WATCH = """
import os, socket, sys, warnings
warnings.simplefilter("ignore")
root, evil = sys.argv[1], sys.argv[2]
sys.path.append(evil)  # where an import of "evil" would find it
from griffin_offload import Engine, GriffinError
Engine(os.path.join(root, "plain")).generate([1, 5, 6], sparsity=0.5, prior="off", max_new_tokens=2)  # imports the rest
NEVER = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.exec", "os.system", "os.posix_spawn",
         "os.fork", "pickle.find_class")
seen = []

def hook(event, arguments):
    told = str(arguments[0]) if arguments else ""
    if event in NEVER or (event == "ctypes.dlopen" and arguments[0] is not None):
        seen.append(f"{event} {arguments!r:.200}")
    elif event == "import" and "evil" in told:
        seen.append(f"import {told}")
    elif event == "open" and (told.startswith(("/etc", evil)) or told.endswith((".py", ".bin", ".pkl", ".so"))):
        if not told.startswith((sys.prefix, sys.base_prefix)):
            seen.append(f"open {told}")
    elif event == "exec" and getattr(arguments[0], "co_filename", "").startswith((root, evil)):
        seen.append(f"exec {arguments[0].co_filename}")

sys.addaudithook(hook)
for name in sorted(os.listdir(root)):
    seen.clear()
    try:
        engine = Engine(os.path.join(root, name))
        engine.generate(engine.encode("Hello"), sparsity=0.5, prior="off", max_new_tokens=2)
        end = "answers"
    except GriffinError as error:
        end = "refuses"
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    print(name, end, *seen, sep="\\t")
seen.clear()
try:
    import evil
except SystemExit:
    pass
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
print("control", *seen, sep="\\t")
"""


def hostile(folder: Path, file: str, key: str, value: Any, kind: str = "llama") -> Path:
    """A checkpoint with one more field, and code for whoever would run it."""
    tiny_checkpoint(folder, kind, chat=True)
    facts = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**facts, key: value}))
    (folder / "evil.py").write_text("raise SystemExit('evil')")
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By case: how it ended, and what was seen."""
    root, evil = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("evil")
    tiny_checkpoint(root / "plain", "llama", chat=True)
    (evil / "evil.py").write_text("raise SystemExit('evil')")
    for file, key, value in CASES:
        hostile(root / f"{file}:{key}", file, key, value)
    ours = {"GRIFFIN_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = {**os.environ, **ours, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", WATCH, str(root), str(evil)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}


def test_what_is_watched_is_seen(watched: dict[str, list[str]]) -> None:
    told = " ".join(watched["control"])
    assert all(what in told for what in ("import evil", "evil.py", "socket.connect"))


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, key, _ in CASES])
def test_a_field_makes_transformers_do_nothing(watched: dict[str, list[str]], file: str, key: str) -> None:
    end, *seen = watched[f"{file}:{key}"]
    assert end in ("answers", "refuses")
    assert not seen


@pytest.mark.parametrize("key", ["auto_map", "architectures", "attn_implementation", "backbone", "_name_or_path"])
def test_a_checkpoint_with_such_a_field_answers(watched: dict[str, list[str]], key: str) -> None:
    assert watched[f"config.json:{key}"][0] == "answers"


@pytest.mark.parametrize("named", ["load", "nn", "__doc__", "no_such", 7, ["float32"], "Tensor", "manual_seed"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_none(tmp_path: Path, key: str, named: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is .* which is no dtype of torch"):
        Engine(hostile(tmp_path / "m", "config.json", key, named))


@pytest.mark.parametrize("named", ["float32", "bfloat16", "torch.float32", "auto", None])
def test_a_dtype_of_torch(tmp_path: Path, named: Any) -> None:
    folder = hostile(tmp_path / "m", "config.json", "dtype", named)
    if named in ("float32", "bfloat16", None):
        assert Engine(folder).generate(tiny_prompt(4), sparsity=0.5, prior="off", max_new_tokens=1).token_ids


CLASSES = ["AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "pipeline", "__doc__", "os", 7, ["x"]]


@pytest.mark.parametrize("named", CLASSES, ids=str)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_tokenizers_class_that_is_none(tmp_path: Path, file: str, named: Any) -> None:
    """transformers takes any class of its own, and calls its from_pretrained: a model's reads pickles."""
    folder = hostile(tmp_path / "m", file, "tokenizer_class", named)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"which is no tokenizer's class|does not describe|cannot be used"):
        load_tokenizer(folder)


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", None])
def test_a_tokenizers_class_that_is_one(tmp_path: Path, named: str | None) -> None:
    folder = hostile(tmp_path / "m", "tokenizer_config.json", "tokenizer_class", named)
    assert load_tokenizer(folder)("Hello")["input_ids"]


HOSTILE_VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "quantization_that_imports": lambda f: f.update(quantization_config={"quant_method": "torchao", "q": "evil.E"}),
    "quantization_a_list": lambda f: f.update(quantization_config=["gptq"]),
    "quantization_method_a_list": lambda f: f.update(quantization_config={"quant_method": ["gptq"]}),
    "type_a_path": lambda f: f.update(model_type="../evil"),
    "type_a_list": lambda f: f.update(model_type=["llama"]),
    "type_of_an_encoder": lambda f: f.update(model_type="bert"),
    "activation_a_path": lambda f: f.update(hidden_act="evil.Evil"),
    "activation_a_number": lambda f: f.update(hidden_act=7),
    "window_a_list": lambda f: f.update(sliding_window=[1, "x"]),
    "window_a_text": lambda f: f.update(sliding_window="x"),
    "layer_types_unknown": lambda f: f.update(layer_types=["evil"] * 3),
    "layer_types_a_number": lambda f: f.update(layer_types=7),
    "rope_a_list": lambda f: f.update(rope_parameters=[1]),
    "rope_of_a_type_unknown": lambda f: f.update(rope_parameters={"rope_type": "evil"}),
    "heads_a_list": lambda f: f.update(num_attention_heads=[4]),
    "layers_a_text": lambda f: f.update(num_hidden_layers="3"),
    "layers_nan": lambda f: f.update(num_hidden_layers=float("nan")),
    "by_layer_a_list": lambda f: f.update(per_layer_config=[1]),
}


@pytest.mark.parametrize("name", HOSTILE_VALUES)
def test_values_of_another_type_are_one_line(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama")
    facts = json.loads((folder / "config.json").read_text())
    HOSTILE_VALUES[name](facts)
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(GriffinError) as caught:
        Engine(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", [*TINY, *WRAPPERS])
def test_every_types_own_fields_reach_it(kind: str, tmp_path: Path) -> None:
    """A config that was saved is read as before, but for fields that its class does not have."""
    model_type = (TINY.get(kind) or {}).get("model_type", kind)
    config = AutoConfig.for_model(**{"model_type": model_type, **(TINY.get(kind) or {})})
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    after = load_config(tmp_path, read_config(tmp_path)).to_dict()
    known = known_fields(type(config))
    for name, value in before.items():
        if name in known and name not in NEVER:
            assert after[name] == value, name


def test_what_reaches_a_config_inside_a_config() -> None:
    inner = {"model_type": "llama", "hidden_size": 8}
    facts = {"model_type": "llava", "evil": 1, "text_config": {**inner, "evil": 1, "auto_map": CODE}}
    assert allowed_config(facts, CONFIG_MAPPING["llava"]) == {"model_type": "llava", "text_config": inner}


@pytest.mark.parametrize("value", ["x", [1], True, {}])
def test_a_longest_input_that_is_no_number(value: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", chat=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": value}))
    with pytest.raises(CheckpointError, match="model_max_length is no number"):
        load_tokenizer(folder)
