"""What every test gets: no network, a cache of its own, quiet libraries, and the real models where there are any."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the hub's client, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests start processes
os.environ["GRIFFIN_CONFIG"] = os.devnull  # not the settings of whoever runs the tests
os.environ["GRIFFIN_DEVICE"] = "cpu"  # of every test, and of the processes that it starts, unless it is marked gpu

import pytest
import torch
from emulator import CARDS

if CARDS:
    from emulator.install import install

    install(CARDS)
    more = (str(Path(__file__).parent / "emulator" / "site"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, more))  # for the processes that tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU (quant/test_triton.py)

import transformers
from cases import Case
from tiny import COMMON, TINY
from torch.backends import mkldnn

# For every commit: the rules, the pure functions, three types against the oracle, each main command once.
QUICK = (
    "test_folders.py",
    "test_readme.py",
    "test_usage.py",
    "test_jsonl.py",
    "checkpoint/test_headers.py::test_the_good_header_is_good",
    "checkpoint/test_reader.py::test_every_layout_is_read_as_safetensors_does",
    "cli/test_generate.py::test_the_answer_alone_is_on_stdout_and_the_report_on_stderr",
    "cli/test_export_pruned.py::test_export_prints_the_folder_and_how_to_load_it",
    "cli/test_mem_report.py::test_mem_report_of_a_model",
    "cli/test_chat.py::test_chat_answers_each_line_of_a_pipe",
    "model/test_architectures.py::test_every_type[llama]",
    "model/test_architectures.py::test_every_type[phi3]",
    "model/test_architectures.py::test_every_type[mixtral]",
    "pruning/test_calibration_texts.py",
    "pruning/test_ffn_skip.py",
    "pruning/test_layer_allocation.py",
    "pruning/test_prior.py",
    "serving/test_asked.py",
    "serving/test_reply.py",
    "serving/test_worker.py",
    "quant/test_formats.py::test_a_product_in_float32_is_that_of_the_rounded_matrix",
)
# What measures time or memory, or the whole machine's.
ALONE = (
    "test_engine.py::test_pruned_takes_less_than_full_and_each_stays_inside_its_plan",
    "test_engine.py::test_what_does_not_fit_is_refused_and_what_is_suggested_works",
    "test_folders.py::test_help_is_quick_and_imports_nothing_heavy",
    "evaluation/bench/",
    "export/test_to_safetensors.py::test_the_pruned_model_is_never_held",
    "model/test_threads.py::test_busy_programs_do_not_stop_the_answer",
    "model/test_threads.py::test_free_cores_are_used",
    "offload/test_neuron_scores.py::test_the_peak_stays_below_the_plan_and_falls_with_states_on_disk",
    "planning/",
    "serving/test_soak.py",
)
_REAL_CACHE = os.environ.get("GRIFFIN_CACHE")

torch.set_num_threads(1)  # two threads on two busy cores wait for each other: 6 times slower even on the real models
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for names, mark in ((QUICK, pytest.mark.quick), (ALONE, pytest.mark.alone)):
            if item.nodeid.removeprefix("tests/").startswith(names):
                item.add_marker(mark)


@pytest.fixture(autouse=True)
def onednn_stays_on() -> Iterator[None]:
    """Whatever a test stops, breaks or runs side by side: the process's switch is back where it was."""
    yield
    assert mkldnn.enabled


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On emulated cards: whatever streams do without an order is a fault, and speeds are measured on small matrices."""
    if CARDS:
        from griffin_offload.model import format_speeds

        for name, value in {"GPU_SHAPE": (128, 128), "GPU_SIZE": 2**20, "LONG": 64}.items():
            monkeypatch.setattr(format_speeds, name, value)
    yield
    if CARDS:
        from emulator import streams

        found = [*streams.faults]
        streams.forget()
        assert not found


@pytest.fixture
def foreseen() -> list[BaseException]:
    """What a test has provoked of the handler for faults of Griffin's own: it takes out what it expects."""
    return []


@pytest.fixture(autouse=True)
def _no_fault_is_hidden(monkeypatch: pytest.MonkeyPatch, foreseen: list[BaseException]) -> Iterator[None]:
    """An exception that a user would see as one line fails the test, with its traceback, unless it was `foreseen`."""
    from griffin_offload.cli import _outcome

    told = _outcome.unforeseen

    def unforeseen(error: BaseException) -> str:
        foreseen.append(error)
        return told(error)

    monkeypatch.setattr(_outcome, "unforeseen", unforeseen)
    yield
    for error in foreseen:
        raise error


@pytest.fixture(scope="session")
def test_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of all tests that are not marked real."""
    return tmp_path_factory.mktemp("griffin-cache")


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, test_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("GRIFFIN_CACHE", str(test_cache))
    monkeypatch.setenv("GRIFFIN_STATE", str(test_cache / "state"))


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("GRIFFIN_DEVICE")  # the default is then the GPU, as for a user


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case(kind): the tiny model of a kind, with the oracle's answers, made when first asked for."""
    base = tmp_path_factory.mktemp("cases")
    return cache(lambda kind: Case(kind, base / kind))


@pytest.fixture(scope="session", params=COMMON)
def tiny(request: pytest.FixtureRequest, case: Callable[[str], Case]) -> Path:
    """A tiny checkpoint of each common architecture in turn; its folder is named by the model type."""
    return case(request.param).folder


@pytest.fixture(params=TINY)
def every(request: pytest.FixtureRequest, case: Callable[[str], Case]) -> Case:
    """The tiny model of every architecture in turn."""
    return case(request.param)


@pytest.fixture(scope="session")
def smol() -> Path:
    """SmolLM2-135M-Instruct's folder."""
    return _real_model("smollm2-135m", "GRIFFIN_TEST_SMOL")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270M's folder."""
    return _real_model("gemma-3-270m", "GRIFFIN_TEST_GEMMA")


def _real_model(alias: str, variable: str) -> Path:
    if folder := os.environ.get(variable):
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{variable}={folder} has no config.json")
        return Path(folder)

    from griffin_offload.errors import ModelNotFound
    from griffin_offload.sources.resolve import resolve

    with pytest.MonkeyPatch.context() as patch:  # wherever this is called from, look in the user's own cache
        if _REAL_CACHE is None:
            patch.delenv("GRIFFIN_CACHE", raising=False)
        else:
            patch.setenv("GRIFFIN_CACHE", _REAL_CACHE)
        try:
            return resolve(alias, fetch=False)
        except ModelNotFound as error:
            pytest.skip(f"{alias} is not on this machine (griffin pull {alias}, or set {variable}): {error}")
