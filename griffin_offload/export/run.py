"""An export from what is asked to what is written: checked and planned before any weight is read."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import OptionError
from ..files import refuse_inputs
from ..memory.out_of_memory import planned
from ..model_prior import known_selection
from ..offload.neuron_scores import find_room
from ..offload.skip_by_prompt import check_skip
from ..open_model import OpenModel
from ..options import AUTO, ExportFormat, OnLayer, Pruning, as_dict
from ..planning.plan import DEFAULT_SPARSITY, Plan, choose_plan
from ..planning.request import Request
from ..pruning.selection import Selection
from ..sources.resolve import weight_files
from ..version import __version__
from .pruned_model import Export, ExportJob, ExportSource
from .to_gguf import GGUF_MULTIPLE, checked_file, export_gguf, require_gguf
from .to_safetensors import checked_folder, export_checkpoint


@dataclass(frozen=True)
class ExportAsked:
    """What is asked for. `host_memory`: bytes for the hidden states of samples that wait; None: what there is."""

    source: ExportSource
    out: Path
    pruning: Pruning
    format: ExportFormat
    seed: int = 0
    force: bool = False
    on_layer: OnLayer | None = None
    host_memory: int | None = None

    @property
    def gguf(self) -> bool:
        return self.format.format == "gguf"

    @property
    def what(self) -> str:
        return "a GGUF file" if self.gguf else "a folder for transformers"

    @property
    def multiple(self) -> int:
        return self.format.multiple_of or (GGUF_MULTIPLE if self.gguf else 1)

    def hash(self, opened: OpenModel) -> str:
        """Of all that an export depends on: two of one hash are the same."""
        source, calibration = self.source, self.source.calibration
        samples = calibration and [calibration.to_json(), list(calibration.samples)]
        asked = [as_dict(self.pruning), as_dict(self.format), self.seed, source.prompt_ids, source.prompt_text, samples]
        told = [__version__, opened.facts, opened.dtype, asked]
        return hashlib.sha256(json.dumps(told, default=repr, sort_keys=True).encode()).hexdigest()[:32]


def write_export(opened: OpenModel, unload: Callable[[], None], asked: ExportAsked) -> Export:
    """Writes the model pruned as asked. `unload` gives back what is resident. Raises what Engine.export raises."""
    request = _request(opened, asked)
    request_hash = asked.hash(opened)
    real = (checked_file if asked.gguf else checked_folder)(asked.out, request_hash, asked.force)
    refuse_inputs(real, [opened.path, *weight_files(opened.path)])
    source = asked.source
    if source.calibration:
        folder = next(parent for parent in asked.out.absolute().parents if parent.is_dir())
        request, spill = find_room(opened.skeleton.layout, request, source.calibration, asked.host_memory, folder)
        source = replace(source, spill=spill)
    plan = _plan(opened, asked, request)
    if source.calibration:
        selection = Selection(seed=asked.seed)
    else:
        selection = known_selection(opened, unload, asked.pruning, asked.seed, plan)
    unload()
    reader = opened.reader(plan)
    where = (asked.out, request_hash, asked.force, asked.on_layer)
    job = ExportJob(opened.skeleton, reader, plan, selection, source, *where)
    try:
        with planned(opened.device, plan.peak, unload, plan.peaks):
            if asked.gguf:
                written = export_gguf(job, asked.format.gguf_type or "bf16", asked.multiple, opened.tokenizer)
            else:
                written = export_checkpoint(job)
            return replace(written, rest=plan.rest_to_json())
    finally:
        reader.close()


def _request(opened: OpenModel, asked: ExportAsked) -> Request:
    """What the plan is made for. Raises OptionError for what such an export cannot hold."""
    pruning, source = asked.pruning, asked.source
    if pruning.skip.share and not source.calibration:
        check_skip(opened.skeleton.layout, pruning.skip, export=True)
    if pruning.rest not in (None, AUTO, "drop"):
        raise OptionError(f"{asked.what} holds all neurons of a layer in one format: leave out rest {pruning.rest}")
    if asked.gguf:
        require_gguf(opened.config.model_type)
    return replace(
        opened.request(max(map(len, source.samples), default=1), 1),
        curves=None if pruning.allocation == AUTO else opened.allocation_curves(pruning),
        export=True,
        multiple=asked.multiple,
        fold=pruning.folds if source.samples else None,
        fold_samples=sum(map(len, source.calibration.samples)) if source.calibration else 0,
        skip=pruning.skip if pruning.skip.share else None,
    )


def _plan(opened: OpenModel, asked: ExportAsked, request: Request) -> Plan:
    """Raises BudgetError, and OptionError where there is nothing to choose."""
    sparsity = DEFAULT_SPARSITY if asked.pruning.sparsity is None else asked.pruning.sparsity
    plan = choose_plan(opened.sizes, request, sparsity, opened.name)
    if asked.source.calibration and not plan.prunes:
        raise OptionError(f"sparsity {plan.sparsity:g} keeps every neuron: there is nothing to choose")
    one_format = f"{asked.what} holds all neurons of a layer in one format"
    return replace(plan, why_rest="as asked" if asked.pruning.rest == "drop" else one_format)
