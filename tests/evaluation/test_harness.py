"""Griffin under lm-eval, on tasks made of local files: nothing is fetched."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny import BOS, BOS_ID, EOS_ID, text_paragraph, tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.errors import OptionError, PromptError
from griffin_offload.evaluation.choice import answer, read_questions
from griffin_offload.evaluation.scoring.score import score
from griffin_offload.evaluation.scoring.variant import FULL, Variant

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'griffin-offload[eval]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what lm-eval imports
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from griffin_offload.evaluation import harness
    from griffin_offload.evaluation.harness import GriffinLM

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

ROWS = [
    {"context": "Alice was beginning to get very", "choices": ["tired", "happy indeed", "old"], "answer": 0},
    {"context": "Down, down,", "choices": ["down", "up and away"], "answer": 1},
    {"context": "The sky is", "choices": ["blue", "green"], "answer": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{max_gen_toks: 6, until: ["zz"]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("harness") / "llama", "llama", chat=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data, cache=folder / "cache"))
    return folder


def model(folder: Path, **options: Any) -> GriffinLM:
    return GriffinLM(str(folder), dtype="float32", **options)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


def evaluate(task: str, tasks: Path, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(tasks=[task], task_manager=manager, **options)


@pytest.mark.parametrize("mode", ["gen", "class"])
def test_a_task_of_choices_is_what_griffin_eval_choice_finds(llama: Path, tasks: Path, mode: str) -> None:
    arguments = f"pretrained={llama},sparsity=0.75,rest=drop,mode={mode},dtype=float32"
    found = evaluate("tiny_choice", tasks, model="griffin", model_args=arguments, log_samples=True)
    questions = read_questions(tasks / "rows.jsonl")
    (wanted,) = answer(Engine(llama, dtype="float32"), questions, [Variant(0.75, method="griffin")], mode)
    results = found["results"]["tiny_choice"]
    assert results["acc,none"] == pytest.approx(wanted.accuracy)
    assert results["acc_stderr,none"] == pytest.approx(wanted.standard_error)
    assert results["acc_norm,none"] == pytest.approx(wanted.accuracy_normalised)
    samples = sorted(found["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    for sample, totals in zip(samples, wanted.log_likelihoods, strict=True):
        assert [float(response[0]) for response in sample["filtered_resps"]] == pytest.approx(totals, abs=1e-4)


def test_a_task_that_generates_gets_the_engines_answers(llama: Path, tasks: Path) -> None:
    found = evaluate("tiny_generate", tasks, model=model(llama, sparsity=0.5), log_samples=True)
    engine = Engine(llama, dtype="float32")
    for sample in found["samples"]["tiny_generate"]:
        ids = engine.encode(sample["doc"]["context"], raw=True)
        wanted = engine.generate(ids, sparsity=0.5, max_new_tokens=6, do_sample=False).text
        assert sample["resps"] == [[wanted.split("zz")[0]]]


def test_the_full_model_scores_as_lm_evals_own(llama: Path) -> None:
    """At sparsity 0, the numbers of lm-eval's own `hf` model: tokens, truncation, empty contexts, rolling windows."""
    ours = model(llama, sparsity=0)
    theirs = HFLM(str(llama), dtype="float32", device="cpu", batch_size=1)
    texts = [("Alice was ", "beginning"), ("", "to get very tired"), ("a " * 300, "b c"), (f"{BOS}Down", ", down")]
    requests = [request("loglikelihood", *text) for text in texts]
    found, wanted = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    for index in (0, 1, 3):
        assert found[index][0] == pytest.approx(wanted[index][0], abs=1e-3)
        assert found[index][1] == wanted[index][1]
    assert found[2][0] < 0, "too long a context loses its beginning"
    rolling = [request("loglikelihood_rolling", text) for text in ("Alice was beginning", "")]
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3
    )


def test_pairs_are_cut_as_lm_eval_cuts_them(llama: Path) -> None:
    lm = model(llama)
    for context, continuation in [("Alice was ", "tired"), ("Down,\n", " down"), ("inte", "nse"), ("a", "b")]:
        assert lm._encode_pair(context, continuation) == TemplateLM._encode_pair(lm, context, continuation)


def test_a_long_rolling_text_is_cut_into_windows(llama: Path) -> None:
    engine = Engine(llama, dtype="float32")
    ids = engine.encode(text_paragraph(20), raw=True)
    lm = model(llama, sparsity=0, max_length=31)
    (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text_paragraph(20))], disable_tqdm=True)
    pairs, done = [([BOS_ID], ids[:30])], 30
    while done < len(ids):
        after = ids[done : done + 30]
        end = done + len(after)
        pairs.append((ids[end - 31 : done], after))  # the full context, of which the last window needs more
        done = end
    wanted = sum(scored.log_probability.sum().item() for (scored,) in score(engine, pairs, [FULL]))
    assert len(pairs) > 2
    assert found == pytest.approx(wanted, abs=1e-3)


def test_a_rolling_text_cannot_be_pruned(llama: Path) -> None:
    with pytest.raises(OptionError, match="griffin eval perplexity"):
        model(llama, sparsity=0.5).loglikelihood_rolling([request("loglikelihood_rolling", "text")])


def test_an_answer_ends_before_what_stops_it(llama: Path) -> None:
    lm = model(llama, sparsity=0.5)
    asked = {"max_gen_toks": 12, "until": []}
    (whole,) = lm.generate_until([request("generate_until", "Alice was", asked)], disable_tqdm=True)
    stop = whole[len(whole) // 2 :][:2]
    asked = {"max_gen_toks": 12, "until": [stop, ""]}
    (cut,) = lm.generate_until([request("generate_until", "Alice was", asked)], disable_tqdm=True)
    assert cut == whole.split(stop)[0]
    assert len(cut) < len(whole)


def test_sampling_is_passed_on(llama: Path) -> None:
    lm = model(llama, sparsity=0.5, seed=1)
    asked = {"max_gen_toks": 12, "do_sample": True, "temperature": 3.0}
    (drawn,) = lm.generate_until([request("generate_until", "Alice was", asked)], disable_tqdm=True)
    greedy = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    (likeliest,) = lm.generate_until([request("generate_until", "Alice was", greedy)], disable_tqdm=True)
    assert drawn != likeliest


def test_the_chat_template_is_the_models(llama: Path, tmp_path: Path) -> None:
    lm = model(llama)
    turns = [{"role": "user", "content": "Hi"}]
    text = lm.apply_chat_template(turns)
    assert text == f"{BOS}<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert lm.tok_encode(text) == lm.engine.encode_chat(turns), "one <s>, not two"
    base = model(tiny_checkpoint(tmp_path / "base", "llama"))
    with pytest.raises(PromptError, match="no chat template"):
        base.apply_chat_template(turns)


def test_an_empty_context_is_the_first_token(llama: Path) -> None:
    lm = model(llama, sparsity=0)
    assert (lm.prefix_token_id, lm.eot_token_id) == (BOS_ID, EOS_ID)
    lm.tokenizer.bos_token = None
    assert lm.prefix_token_id == EOS_ID


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mode": "best"}, "gen, class"), ({"sparsity": 2}, "outside"), ({"selection": "best"}, "topk")],
)
def test_bad_arguments(llama: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        model(llama, **options)


def test_too_long_a_continuation_or_answer(llama: Path) -> None:
    lm = model(llama, max_length=20)
    with pytest.raises(PromptError, match="at most 19"):
        lm.loglikelihood([request("loglikelihood", "a", " b" * 40)], disable_tqdm=True)
    with pytest.raises(PromptError, match="max_gen_toks 20"):
        lm.generate_until([request("generate_until", "a", {"max_gen_toks": 20, "until": []})], disable_tqdm=True)


def test_the_module_is_lm_evals_command_with_griffin_in_it(llama: Path, tasks: Path) -> None:
    arguments = ["--model", "griffin", "--model_args", f"pretrained={llama},sparsity=0.5,dtype=float32"]
    done = subprocess.run(
        [sys.executable, "-m", harness.__name__, *arguments, "--tasks", "tiny_choice", "--include_path", str(tasks)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tasks / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert "griffin ({'pretrained':" in done.stdout
    assert re.search(r"^\|tiny_choice\|.*\|acc +\|", done.stdout, re.MULTILINE)


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OptionError("no such thing")

    monkeypatch.setattr(harness, "cli_evaluate", refuse)
    with pytest.raises(SystemExit, match=r"^error: no such thing$"):
        harness.main()


def test_without_lm_eval_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "griffin_offload.evaluation.harness")
    with pytest.raises(OptionError, match=r"pip install 'griffin-offload\[eval\]'"):
        import griffin_offload.evaluation.harness  # noqa: F401
