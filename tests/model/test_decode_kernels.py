"""Which kernels a forward's products run by: torch's own for one token while decoding, oneDNN's for all else."""

from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint
from torch.backends import mkldnn

from griffin_offload import Engine
from griffin_offload.model.decode_kernels import own_kernels

PROMPT = [5, 9, 3, 7, 12, 4]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_checkpoint(tmp_path_factory.mktemp("gemv") / "m", "llama", dtype=torch.bfloat16))


def test_only_one_token_after_others_runs_by_torchs_own_kernels(engine: Engine) -> None:
    seen: list[tuple[int, bool]] = []
    head = engine.skeleton.model.get_output_embeddings()
    first = engine.skeleton.modules[0]
    handles = [
        first.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[1], mkldnn.enabled))),
        head.register_forward_hook(lambda *_: seen.append((0, mkldnn.enabled))),
    ]
    plain: dict[str, Any] = {"method": "griffin", "no_fidelity": True}
    try:
        engine.generate(PROMPT, sparsity=0.5, max_new_tokens=3, **plain)
        assert seen == [(len(PROMPT), True), (0, True), *[(1, False), (0, False)] * 2]
        assert mkldnn.enabled
        seen.clear()
        engine.generate(PROMPT[:1], sparsity=0.5, max_new_tokens=2, **plain)
        assert seen == [(1, True), (0, True), (1, False), (0, False)]
        seen.clear()
        engine.generate_batch([PROMPT, PROMPT[::-1]], sparsity=0.5, max_new_tokens=2, **plain)
        assert [enabled for _, enabled in seen] == [True] * 4
    finally:
        for handle in handles:
            handle.remove()


def test_the_switch_goes_back_whatever_happens(engine: Engine) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    answer = engine.generate(PROMPT, sparsity=0.5, method="griffin", max_new_tokens=3, on_text=stop)
    assert answer.finish_reason == "interrupted"
    assert mkldnn.enabled
    head = engine.skeleton.model.get_output_embeddings()

    def fail(*_: object) -> None:
        if not mkldnn.enabled:
            raise KeyboardInterrupt

    handle = head.register_forward_pre_hook(fail)
    try:
        assert engine.generate(PROMPT, sparsity=0.5, method="griffin", max_new_tokens=3).finish_reason == "interrupted"
    finally:
        handle.remove()
    assert mkldnn.enabled
    mkldnn.enabled = False
    try:
        with own_kernels():
            assert not mkldnn.enabled
        assert not mkldnn.enabled
    finally:
        mkldnn.enabled = True


def test_a_product_is_the_same_but_for_its_rounding() -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(500, 333).bfloat16(), torch.randn(1, 333).bfloat16()
    with own_kernels():
        out = torch.nn.functional.linear(x, matrix)
    exact = x.float() @ matrix.float().T
    assert (out - exact).norm() < 0.003 * exact.norm()


def test_not_while_layers_stream_and_other_forwards_run_between(engine: Engine) -> None:
    cache = engine.sweep(PROMPT, max_new_tokens=3, sparsity=0.5, method="griffin").past_key_values
    model, layer = engine.skeleton.model, engine.skeleton.modules[0]
    seen: list[bool] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: seen.append(mkldnn.enabled))
    try:
        with torch.no_grad():
            model(torch.tensor([[3]]), past_key_values=cache)
            layer._hf_hook = object()  # as accelerate leaves it on a layer that is streamed
            model(torch.tensor([[3]]), past_key_values=cache)
    finally:
        handle.remove()
        del layer._hf_hook
    assert seen == [False, True]
