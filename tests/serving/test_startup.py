"""Starting: kills and restarts, tensor ranks, and what must stop a start with its reason."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.harness import NEW, SPARSE, Reference, Server, complete, exported

from llama_surgery.topology.router import PageRouter

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]


def learned(layers: int) -> dict[int, PageRouter]:
    """Corrections as learning gives them, if with random numbers: for all layers but the first."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer: PageRouter(
            offset=0.5 * torch.randn(4, 2, generator=generator),
            mean_weight=1 + 0.1 * torch.randn(4, 2, 64, generator=generator),
            variance_weight=1 + 0.1 * torch.randn(4, 2, 64, generator=generator),
            key_map=torch.eye(64) + 0.05 * torch.randn(4, 64, 64, generator=generator),
            summary=0.3 * torch.randn(4, 2, generator=generator),
        )
        for layer in range(1, layers)
    }


def test_killed_server_restarts(reference: Reference, demo_model_path: Path, tmp_path: Path) -> None:
    """A model with learned corrections. On the second start the cache is so small that sequences which need
    one more block while they write are preempted and computed again."""
    routers = learned(8)
    folder = exported(reference.model, demo_model_path, tmp_path, SPARSE, routers)
    prompts = [reference.prompts(1, n, n, seed=n)[0] for n in (1000, 1010, 2020, 2030, 1500, 1510)]
    want = reference.write(prompts, SPARSE, 4 * NEW, routers)
    small = ("--num-gpu-blocks-override", "16", "--max-model-len", "4096")
    server = Server(folder, tmp_path / "log.txt", *small)
    server.start().kill()
    server.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt, 4 * NEW), prompts))
        preempted = server.metric("vllm:num_preemptions_total")
    finally:
        server.kill()
    assert preempted > 0
    what = f"learned corrections, killed and restarted, {preempted:.0f} preemptions"
    reference.assert_equal(what, prompts, want, got)


def test_two_tensor_ranks(reference: Reference, demo_model_path: Path, tmp_path: Path) -> None:
    routers = learned(8)
    folder = exported(reference.model, demo_model_path, tmp_path, SPARSE, routers)
    prompts = reference.prompts(6, 300, 2500, seed=2)
    want = reference.write(prompts, SPARSE, NEW, routers)
    server = Server(folder, tmp_path / "log.txt", "--tensor-parallel-size", "2", OMP_NUM_THREADS="1").start()
    try:
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(lambda prompt: complete(server.client(), prompt), prompts))
    finally:
        server.kill()
    reference.assert_equal("learned corrections, two tensor ranks", prompts, want, got)


def refusal(folder: Path, log: Path, *options: str, **environment: str) -> str:
    """What a server printed that must not start."""
    server = Server(folder, log, *options, **environment)
    server.launch()
    status = server.wait()
    if status is None:
        server.kill()
    assert status, f"it started, or ended with {status}:\n{server.text()[-3000:]}"
    return server.text()


def test_unsupported_option_stops_the_start(sparse_folder: Path, tmp_path: Path, summary: list[str]) -> None:
    reason = "--kv-cache-dtype fp8: quantised keys and values are not supported"
    assert reason in refusal(sparse_folder, tmp_path / "log.txt", "--kv-cache-dtype", "fp8")
    summary.append(f"refused at start-up: {reason}")


def test_kernels_asked_for_by_name_are_not_replaced(
    reference: Reference, demo_model_path: Path, tmp_path: Path, summary: list[str]
) -> None:
    config = dataclasses.replace(SPARSE, backend="triton")
    folder = exported(reference.model, demo_model_path, tmp_path, config)
    reason = "backend='triton' cannot serve this model: it needs a GPU"
    assert reason in refusal(folder, tmp_path / "log.txt")
    summary.append(f"refused at start-up: {reason}")


def test_without_the_plugin_there_is_no_server(
    sparse_folder: Path, tmp_path: Path, summary: list[str]
) -> None:
    told = refusal(sparse_folder, tmp_path / "log.txt", VLLM_PLUGINS="none")
    assert "Model architectures ['SurgeryLlamaForCausalLM'] are not supported" in told
    summary.append("without the plugin: no server, SurgeryLlamaForCausalLM is not supported")


def test_broken_plugin_stops_the_start(sparse_folder: Path, tmp_path: Path, summary: list[str]) -> None:
    """The engine itself only logs that a plugin could not be imported, and goes on."""
    broken = "import sys\nsys.modules['llama_surgery.serving.vllm.plugin'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(broken, encoding="utf-8")
    told = refusal(sparse_folder, tmp_path / "log.txt", PYTHONPATH=str(tmp_path))
    assert "Failed to load plugin llama_surgery" in told
    assert "Model architectures ['SurgeryLlamaForCausalLM'] are not supported" in told
    summary.append("plugin that cannot be imported: no server, the log says that it failed to load")
