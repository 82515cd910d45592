"""`griffin generate`: answer one prompt, or a file of them. The answer streams to stdout, the rest goes to stderr."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..many.rows import PromptForm
from ..options import MOST, Decoding, Pruning, as_dict
from . import _console as console
from ._flags import CountOrAuto, address, count, file, json_option, quiet_option, switch
from ._opening import Opening, opens_engine
from ._options import takes
from ._outputs import check_outputs
from ._page import check_page, recorded, write_page
from ._print import echo
from ._report import choice_note, remember
from ._text import ending, looks_like_a_file, read_prompt, refuse_missing_file, takes_form
from .generate_many import Job, generate_many

if TYPE_CHECKING:
    from ..planning.plan import Plan


@click.command("generate", short_help="Answer one prompt, or a file of them.")
@click.argument("words", nargs=-1, metavar="[PROMPT]")
@click.option("--prompt", metavar="TEXT", help="The prompt, as the argument is. What is piped in goes before it.")
@click.option("--prompt-file", metavar="FILE", help="A UTF-8 text file with the prompt; - for stdin.")
@takes_form
@opens_engine(host_memory=True)
@takes(Pruning, Decoding)
@address(
    "--input",
    'Many prompts: a JSONL file of {"prompt": ...} or {"messages": [...]}; with the extra ray also Parquet, a folder '
    "of either, or an address such as s3://BUCKET/NAME.",
    "source",
)
@address(
    "--output",
    "With --input: the JSONL file of answers. After a stop, the same command continues where it stopped. With the "
    "extra ray also an address, where the file is put once it is whole.",
)
@count(
    "--batch-size",
    None,
    "With --input: read the model once for N prompts, which then share their kept neurons; auto: for as many as fit "
    "the memory with the neurons and formats that one gets. [default: 1; with --per-prompt auto]",
    metavar="N|auto",
    type=CountOrAuto(1, MOST),
)
@count(
    "--workers",
    None,
    "With --input: processes that answer, each on a GPU of its own, or on its share of the CPU. "
    "[default: one for each GPU; one on the CPU]",
)
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="With --input: have the nodes of a Ray cluster answer, at HOST:PORT; auto: at $RAY_ADDRESS, or of a Ray that "
    "runs on this machine, or of one that is started for this run. --workers counts those of all nodes.",
)
@switch("--per-prompt", "With --batch-size: keep neurons for each prompt, as if it were alone.")
@switch("--force", "Start over and replace what --output holds.")
@file("--report", "Also write the run as a page: memory over time, the plan, the layers, the answer.", "page")
@json_option("Print one JSON object instead of text.")
@quiet_option
def command(
    *,
    words: tuple[str, ...],
    prompt: str | None,
    prompt_file: str | None,
    form: PromptForm,
    open_engine: Opening,
    pruning: Pruning,
    decoding: Decoding,
    as_json: bool,
    page: Path | None,
    **many: Any,
) -> None:
    """Answer one prompt, or a file of them.

    The model is read once, for the prompt; the answer comes from the neurons that the prompt uses.
    """
    if words and prompt is not None:
        raise click.UsageError("the prompt is given twice: leave out --prompt, or the argument")
    prompt = " ".join(words) if words else prompt
    check_outputs("output", "page")
    if (many["source"] is None) != (many["output"] is None):
        raise click.UsageError("--input and --output go together")
    if many["source"] is not None:
        if prompt is not None or prompt_file is not None:
            raise click.UsageError("--input gives the prompts: leave out the other prompt")
        if page:
            raise click.UsageError("--report shows the run of one prompt: leave out --input")
        output = many.pop("output")
        job = Job(output=Path(output), form=form, as_json=as_json, **many)
        answer_file(job, output, open_engine, pruning, decoding)
        return
    if many["batch_size"] not in (None, 1) or any(
        many[name] not in (None, False) for name in ("workers", "cluster", "per_prompt", "force")
    ):
        raise click.UsageError("--batch-size, --workers, --cluster, --per-prompt and --force need --input and --output")
    if prompt is not None:
        refuse_missing_file(prompt, "--prompt", "--prompt-file FILE reads one")
    if prompt is not None and looks_like_a_file(prompt):
        console.note(f"the prompt is the text {prompt}: --prompt-file {prompt} would read a file")
    text = read_prompt(prompt, prompt_file)
    if page:
        check_page(page)
    engine = open_engine()
    ids = form.encode(engine, text)

    def on_plan(plan: "Plan") -> None:
        if note := choice_note(pruning, plan, engine.dtype):
            console.note(note)
        if engine.opened.lacks_prior(pruning, plan):
            console.note("which neurons this model uses in general is measured first, once: one more reading")

    show = None if as_json else console.stream
    with console.layer_progress() as on_layer, recorded(page, engine.device) as samples:
        answer = engine.generate(ids, pruning, decoding, on_text=show, on_layer=on_layer, on_plan=on_plan)
    echo(json.dumps(answer.to_json()) if as_json else "")
    longer = "--max-new-tokens N allows more"
    if end := ending(answer, decoding.max_new_tokens, engine.context_length, longer):
        console.note(f"the answer is {end}")
    console.report(answer.report)
    remember(answer.report)
    if page:
        write_page(page, answer, samples, text, {**as_dict(pruning), **as_dict(decoding)})
    if answer.finish_reason == "interrupted":
        raise KeyboardInterrupt


def answer_file(job: Job, output: Path | str, opening: Opening, pruning: Pruning, decoding: Decoding) -> None:
    """Answer a file of prompts; it and the answers may be elsewhere. `output`: job's, or an address, as a text."""
    from ..many.elsewhere import is_elsewhere, read_elsewhere, refuse_inside, written_elsewhere

    if isinstance(output, Path):
        refuse_inside(output, str(job.source))
    if is_elsewhere(str(job.source)):
        job = replace(job, content=read_elsewhere(str(job.source)))
    if isinstance(output, Path):
        generate_many(job, opening, pruning, decoding)
        return
    with written_elsewhere(output) as local:
        generate_many(replace(job, output=local), opening, pruning, decoding)
    console.note(f"its copy is {output}")
