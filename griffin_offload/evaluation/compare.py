"""Ways to leave out feed-forward weights, side by side: GRIFFIN (arXiv:2404.01365), skipped blocks as in FFN-SkipLLM
(arXiv:2404.03865), and static models from calibration texts (Bandari et al. 2024, arXiv:2410.07461).

All leave out the same share of the feed-forward neurons or blocks. Calibration and test never share data: they use the
two halves of one text, different articles, different problems."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from ..engine import Engine
from ..jsonl import Row
from ..offload.skip_by_prompt import can_skip
from ..options import OFF, FfnSkip, OnLayer
from ..pruning.calibration import Calibration
from ..pruning.calibration_texts import CalibrationText, draw_samples
from ..pruning.prior import Prior
from ..workspace import workspace
from .arithmetic import few_shot, problems
from .calibrate import CONTINUE_TOKENS, PROMPT_TOKENS, calibrate
from .figures.observe import text_tokens
from .perplexity import encode_text, windows
from .scoring.score import check_pairs, score
from .scoring.scored import Pair, Scored, mean_and_error
from .scoring.variant import FULL, Variant
from .summarise import ROUGE, answer_row, rouge_scorer

KEYS = ("task", "way", "share", "id")
TASKS = ("text", "arithmetic", "summaries")
PACKAGE = Path(__file__).parent.parent
ONLY_SCORED = ("random", "layers")  # ablations that no engine answers with


@dataclass(frozen=True)
class Data:
    """Texts to test on and to calibrate with. `text`: one long text, half for each; `articles`: rows as of
    `eval summarise`, of which the first `test_articles` test; `test_problems`: arithmetic problems to test on, each
    after `shots` worked ones."""

    text: str
    articles: Sequence[Row] = ()
    test_articles: int = 16
    test_problems: int = 100
    shots: int = 8
    prompt_tokens: int = 512
    continue_tokens: int = 128
    test_windows: int = 8
    samples: int = 32
    tokens: int = 512
    seed: int = 0

    @property
    def _half(self) -> int:
        return self.text.find("\n", len(self.text) // 2) + 1 or len(self.text) // 2

    def windows(self, engine: Engine) -> list[Pair]:
        """Windows of the first half, each after the BOS token where the tokenizer puts one."""
        begins = engine.encode("a", raw=True)[:1] == [engine.tokenizer.bos_token_id]
        ids, before = encode_text(engine, self.text[: self._half], bos=begins)
        pairs = windows(ids, self.prompt_tokens, self.continue_tokens, self.test_windows)
        return [([*before, *context], continuation) for context, continuation in pairs]

    def problems(self, engine: Engine) -> list[Pair]:
        all_of_them = self._problems()
        return few_shot(engine, all_of_them[self.shots : self.shots + self.test_problems], all_of_them[: self.shots])

    def _problems(self) -> list[dict[str, str]]:
        return problems(self.shots + self.test_problems + 40 * self.samples, self.seed)

    def sources(self) -> dict[str, tuple[list[CalibrationText], dict[str, Any]]]:
        """For each static model, its calibration texts and options of draw_samples."""
        text = CalibrationText("text", self.text[self._half :])
        code = CalibrationText("code", "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py"))))
        sums = CalibrationText("arithmetic", self._problems()[self.shots + self.test_problems :])
        found: dict[str, tuple[list[CalibrationText], dict[str, Any]]] = {"text": ([text], {})}
        if articles := self.articles[self.test_articles :]:
            rows = [{"text": f"{row['article']}{row['summary_gt']}"} for row in articles]
            found["summaries"] = [CalibrationText("summaries", rows)], {}
        found["arithmetic"] = [sums], {}
        found["arithmetic, no reasoning"] = [sums], {"rationale": False}
        found["arithmetic, one pair each"] = [sums], {"form": "qa"}
        found["arithmetic, questions"] = [sums], {"form": "question"}
        found["code"] = [code], {}
        summaries = found["summaries"][0] if "summaries" in found else []
        found["all of these"] = [text, *summaries, sums, code], {}
        found["ellipses"] = [CalibrationText("ellipses", "... " * (self.samples * self.tokens))], {}
        return found


def calibration(engine: Engine, data: Data, on_layer: OnLayer | None = None) -> dict[str, Calibration]:
    """The samples of each static model, by its name: `data.samples` of at most `data.tokens` tokens."""
    common = {"samples": data.samples, "tokens": data.tokens, "seed": data.seed, "bos": engine.tokenizer.bos_token_id}
    found = {}
    for name, (sources, options) in data.sources().items():
        drawn = draw_samples(lambda text: engine.encode(text, raw=True, cut=True), sources, **common, **options)
        found[name] = Calibration(drawn.ids, facts=drawn.facts)
    draw = Random(f"tokens {data.seed}")
    words = text_tokens(engine)
    found["random tokens"] = Calibration([draw.choices(words, k=data.tokens) for _ in range(data.samples)])
    found["text, Wanda's score"] = replace(found["text"], score="wanda")
    return found


def ways(share: float, priors: Mapping[str, Prior], sensitivity: bool = True, skips: bool = True) -> dict[str, Variant]:
    """All ways to leave out a share, by name. `skips`: those that skip blocks too."""
    found = {"GRIFFIN": Variant(share, method="griffin")}
    dropped = Variant(share, rest="drop", prior=OFF, fold=False)
    if sensitivity:
        found["GRIFFIN, shared by sensitivity"] = replace(dropped, allocation="sensitivity")
    if "text" in priors:
        found["GRIFFIN with a prior of text"] = replace(dropped, prior=priors["text"])
        found["prompt whole, then static: text"] = replace(dropped, prior=priors["text"], prior_weight=1.0)
    skip = FfnSkip(share)
    if skips:
        found |= {
            "blocks skipped by token": Variant(0.0, skip=skip),
            "blocks skipped by prompt": Variant(0.0, skip=replace(skip, mode="prompt")),
            "blocks skipped at random": Variant(0.0, skip=skip, ablation="random"),
            "whole layers skipped by token": Variant(0.0, skip=skip, ablation="layers"),
        }
    found |= {
        "prompt whole, then magnitude": replace(dropped, selection="magnitude"),
        "prompt whole, then random": replace(dropped, selection="random"),
    }
    for name, prior in priors.items():
        found[f"static: {name}"] = replace(dropped, prior=prior, prior_weight=1.0, static=True)
    return found


def compare(
    engine: Engine,
    data: Data,
    shares: Sequence[float],
    tasks: Sequence[str] = TASKS,
    *,
    skip: Any = None,
    on_layer: OnLayer | None = None,
) -> Iterator[Row]:
    """Rows of measurements, each named by its "task", "way", "share" and "id": one for each window of the text, problem
    or article. Those that `skip(row)` knows are not measured.

    The first way is "dense", with share 0. Where blocks cannot be skipped, the ways that skip them are left out.
    Raises what scoring, `calibrate` and Engine.generate raise."""
    pairs = {"text": data.windows(engine), "arithmetic": data.problems(engine)}
    for task in set(tasks) & set(pairs):  # what cannot be scored is refused before anything is read
        check_pairs(engine, pairs[task])
    if engine.opened.curves() is None:
        calibrate(engine, prompt_tokens=min(PROMPT_TOKENS, engine.context_length - CONTINUE_TOKENS))
    static = calibration(engine, data)
    priors = {name: engine.score_samples(samples, on_layer) for name, samples in static.items()}
    skips = can_skip(engine.skeleton.layout)
    compared = {("dense", 0.0): FULL}
    compared |= {(name, share): way for share in shares for name, way in ways(share, priors, skips=skips).items()}
    resident = {name: way.plan(engine, 1, 1).resident_bytes for name, way in compared.items()}
    for task in tasks:
        if task == "summaries":
            rows = _summaries(engine, data, compared, static, skip, on_layer)
        else:
            rows = _scores(engine, pairs[task], task, compared, skip, on_layer)
        for row in rows:
            yield {**row, "resident_bytes": resident[row["way"], row["share"]]}


Compared = Mapping[tuple[str, float], Variant]


def _scores(
    engine: Engine, pairs: Sequence[Pair], task: str, compared: Compared, skip: Any, on_layer: OnLayer | None
) -> Iterator[Row]:
    names = [{"task": task, "way": way, "share": share} for way, share in compared]
    if skip and all(skip({**name, "id": number}) for name in names for number in range(len(pairs))):
        return
    variants = list(compared.values())
    if task == "arithmetic":  # its answers are shorter than the warm-up
        variants = [replace(variant, skip=replace(variant.skip, warmup=0)) for variant in variants]
    scored = score(engine, pairs, variants, on_layer=on_layer)
    for number, of_pair in enumerate(scored):
        for name, one in zip(names, of_pair, strict=True):
            if not (skip and skip({**name, "id": number})):
                yield {**name, "id": number, **(_of_text(one) if task == "text" else _of_answer(one))}


def _of_text(scored: Scored) -> Row:
    return {
        "loss": -scored.log_probability.mean().item(),
        "agreement": scored.agrees.float().mean().item(),
        "kl": scored.kl.mean().item(),
    }


def _of_answer(scored: Scored) -> Row:
    return {"exact": float(scored.greedy.all()), "log_likelihood": scored.log_probability.sum().item()}


def _summaries(
    engine: Engine,
    data: Data,
    compared: Compared,
    static: Mapping[str, Calibration],
    skip: Any,
    on_layer: OnLayer | None,
) -> Iterator[Row]:
    """Each article, summarised in each way: by a static model as an export of it answers."""
    articles, scorer = data.articles[: data.test_articles], rouge_scorer()
    for (name, share), variant in compared.items():
        of_way = {"task": "summaries", "way": name, "share": share}
        left = [row for row in articles if not (skip and skip({**of_way, "id": row["id"]}))]
        if variant.ablation in ONLY_SCORED or not left:
            continue
        with workspace(Path(tempfile.gettempdir())) as folder:
            answering, way = engine, variant
            if variant.static:
                samples = static[name.removeprefix("static: ")]
                export, _ = engine.export_static(samples, folder / "static", sparsity=share, on_layer=on_layer)
                answering, way = Engine(export.path, device=engine.device, device_memory=engine.budget), FULL
            for row in left:
                answer = answer_row(answering, row, way, scorer, on_layer=on_layer)
                yield {**of_way, "id": row["id"], **answer}


@dataclass(frozen=True)
class Result:
    """`values`: by measure, the mean of a way's rows and its standard error. `resident_bytes`: of the weights that make
    an answer.

    "perplexity": exp of the mean loss (its error is the loss's, nats); "agreement" and "kl": with the full model;
    "exact": share of right answers; "log_likelihood": of the right answer, nats; ROUGE: 0 to 100."""

    way: str
    share: float
    resident_bytes: int
    values: Mapping[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"way": self.way, "share": self.share, "resident_bytes": self.resident_bytes}
        for name, (mean, error) in self.values.items():
            values |= {name: mean, f"{name}_standard_error": error}
        return values


def fault(row: Row) -> str | None:
    """What a row lacks of those that `compare` makes, or None."""
    kinds: dict[str, Any] = {"task": str, "way": str, "share": int | float, "resident_bytes": int}
    wrong = (name for name, kind in kinds.items() if not isinstance(row.get(name), kind))
    return next((f'no "{name}" of a comparison' for name in wrong), None)


def results(rows: Sequence[Row]) -> list[Result]:
    """The rows of `compare`, summed up by way and share, in the order in which these first came."""
    by_way: dict[tuple[str, float, int], dict[str, list[float]]] = {}
    for row in rows:
        ours = by_way.setdefault((row["way"], row["share"], row["resident_bytes"]), {})
        for name in ("loss", "agreement", "kl", "exact", "log_likelihood", *ROUGE):
            if name in row:
                ours.setdefault(name, []).append(row[name])
    found = []
    for (way, share, resident), columns in by_way.items():
        values = {name: mean_and_error(column) for name, column in columns.items()}
        if "loss" in values:
            loss, error = values.pop("loss")
            values = {"perplexity": (math.exp(loss), error), **values}
        found.append(Result(way, share, resident, values))
    return found
