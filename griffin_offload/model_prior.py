"""The prior that every model has without asking: how much its neurons give to a text that ships with Griffin.

It is measured once, by a reading of the weights of its own, when neurons are first dropped, and stays in the cache."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .checkpoint.key import checkpoint_key
from .errors import BudgetError, GriffinError
from .memory.heap import trim_heap
from .memory.out_of_memory import planned
from .offload.neuron_scores import find_room, sum_scores
from .open_model import OpenModel
from .options import OnLayer, Pruning
from .paths import cache_folder
from .planning.plan import Plan, choose_plan
from .pruning.calibration import Calibration
from .pruning.prior import Prior, prior_path, save_prior
from .pruning.selection import Selection
from .pruning.shipped_text import shipped_samples, shipped_text_hash

Unload = Callable[[], None]


def known_selection(opened: OpenModel, unload: Unload, pruning: Pruning, seed: int | None, plan: Plan) -> Selection:
    """How a plan's neurons are chosen; the model's own prior is measured where it has a say."""
    return with_known_prior(opened, unload, opened.selection(pruning, seed, plan), pruning, plan)


def with_known_prior(
    opened: OpenModel,
    unload: Unload,
    selection: Selection,
    pruning: Pruning,
    plan: Plan,
    on_layer: OnLayer | None = None,
) -> Selection:
    """A plan's selection, with the model's own prior where that has a say: measured now, if no earlier run has."""
    if selection.prior or not opened.takes_prior(pruning, plan):
        return selection
    return replace(selection, prior=known_prior(opened, unload, on_layer))


def known_prior(opened: OpenModel, unload: Unload, on_layer: OnLayer | None = None) -> Prior | None:
    """The model's own prior, measured now if no earlier run has; None where the budget has no room to measure it.

    `unload` gives back what is resident, which a measurement needs. Raises what a prompt pass raises."""
    if prior := opened.stored_prior():
        return prior
    opened = replace(opened, context=None)  # the prior is the model's, whatever this run's context
    longest = opened.sizes.context - 1
    samples = [ids[:longest] for ids in shipped_samples(opened.tokenizer, opened.prompts.has_chat_template)]
    calibration = Calibration(samples, facts={"source": "Griffin's own text", "text_sha256": shipped_text_hash()})
    try:
        prior = score_samples(opened, unload, calibration, on_layer)
    except BudgetError:
        return None
    trim_heap()  # what the pass freed would count beside the next
    with suppress(GriffinError):  # where nothing can be written, the next run measures again
        save_prior(prior_path(cache_folder(), checkpoint_key(opened.checkpoint)), prior)
    return prior


def score_samples(
    opened: OpenModel,
    unload: Unload,
    calibration: Calibration,
    on_layer: OnLayer | None = None,
    host_memory: int | None = None,
) -> Prior:
    """Scores of every neuron over many samples, from one reading of the weights. Nothing is resident after it.

    `host_memory`, `unload`: as of Engine.score_samples and above. Raises what Engine.score_samples raises."""
    request = replace(opened.request(calibration.longest, 1), export=True)
    folder, layout = Path(tempfile.gettempdir()), opened.skeleton.layout
    request, spill = find_room(layout, request, calibration, host_memory, folder)
    plan = choose_plan(opened.sizes, request, 0.0, opened.name)
    unload()
    reader = opened.reader(plan)
    try:
        with planned(opened.device, plan.peak, unload):
            prior = sum_scores(opened.skeleton, reader, plan, calibration, spill, opened.device, on_layer)
    finally:
        reader.close()
    return replace(prior, facts={**opened.facts, **prior.facts})
