"""Engines on a GPU, with CUDA graphs and asynchronous scheduling, against generate().

Models are a small random one and a trained one: the demo's, or that of the variable SERVE_MODEL, a folder
with a checkpoint and its tokenizer.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")

from tests.serving.harness import NEW, Reference, exported

from llama_surgery import SurgeryConfig
from llama_surgery.text import encode

pytestmark = [
    pytest.mark.serve,
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

#: Of the random model, whose heads are sharp: θ = 0.1 reads nearly everything.
RANDOM = SurgeryConfig(chunk_size=256, page_size=32, window=64, theta=30)
TRAINED = SurgeryConfig(theta=0.1)
#: Longest prompt, and tokens of the engine's cache: so few that sequences wait or are preempted.
LONGEST, ROOM = 30_000, 49_152
#: Logits that may change places by rounding: with it a page may be read or not.
TIE = 5e-3


@dataclasses.dataclass
class Subject:
    """A model as transformers has it and as it is served."""

    source: Path
    served: Path
    config: SurgeryConfig
    reference: Reference

    @property
    def longest(self) -> int:
        return min(LONGEST, self.reference.model.config.max_position_embeddings - 2 * NEW)

    def start(self, dtype: str) -> Any:
        """An engine in this process."""
        # The engine's own attention multiplies float32 as TensorFloat-32 otherwise.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TRITON_F32_DEFAULT": "ieee"}
        os.environ["VLLM_LOG_STATS_INTERVAL"] = "3600"  # what is read is told at the end
        from vllm import LLM

        return LLM(
            str(self.served),
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=self.longest + 2 * NEW,
            max_num_seqs=16,
            max_num_batched_tokens=8192,
            gpu_memory_utilization=0.3,
            num_gpu_blocks_override=ROOM // self.config.chunk_size,
            compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        )


def draw(folder: Path) -> None:
    """A random model of two layers, sharp enough to attend unevenly."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    model.save_pretrained(folder)


def subject(
    kind: str, demo_model_path: Path, folder: Path, summary: list[str], config: SurgeryConfig | None = None
) -> Subject:
    source = Path(os.environ.get("SERVE_MODEL") or demo_model_path)
    if kind == "random":
        source = folder / "source"
        draw(source)
        text = torch.randint(1, 4096, (2 * LONGEST,)).tolist()
    else:
        book = (demo_model_path.parent / "text" / "evaluation.txt").read_text(encoding="utf-8")
        text = encode(transformers.AutoTokenizer.from_pretrained(source), book)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig()  # no penalties: the engine is asked for none
    config = config or (RANDOM if kind == "random" else TRAINED)
    served = exported(model, source, folder, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Subject(source, served, config, Reference(model.to(device), text, summary, TIE))


@pytest.fixture(scope="module", params=["random", "trained"])
def model(
    request: pytest.FixtureRequest, demo_model_path: Path, tmp_path_factory: Any, summary: list[str]
) -> Subject:
    return subject(request.param, demo_model_path, tmp_path_factory.mktemp(request.param), summary)


@pytest.fixture(scope="module")
def engine(model: Subject) -> Iterator[Any]:
    yield model.start("float32")


def ask(
    engine: Any, prompts: list[list[int]], new: int = NEW, *, dense: Sequence[bool] = (), **options: Any
) -> list[Any]:
    """The engine's answers to all prompts at once, operated or, where so asked for, dense."""
    from vllm import SamplingParams

    options |= {"max_tokens": new, "temperature": 0, "detokenize": False, "ignore_eos": True}
    modes = dense or [False] * len(prompts)
    sampling = [SamplingParams(extra_args={"llama_surgery_dense": mode}, **options) for mode in modes]
    return engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)


def tokens(answers: list[Any]) -> list[list[int]]:
    return [list(answer.outputs[0].token_ids) for answer in answers]


def operated_layers(engine: Any) -> list[Any]:
    context = engine.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer.surgery for layer in context.values() if hasattr(layer, "surgery")]


def test_engine_writes_what_generate_writes(model: Subject, engine: Any) -> None:
    options = engine.llm_engine.vllm_config
    assert options.compilation_config.cudagraph_mode.name == "FULL_DECODE_ONLY"
    assert options.scheduler_config.async_scheduling
    layers = operated_layers(engine)
    assert {layer.executor.name for layer in layers} == {"Triton kernels"}
    reference, what = model.reference, f"on a GPU, {model.source.name}, "
    prompts = reference.prompts(16, 50, model.longest)
    want = reference.write(prompts, model.config)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    for step in (8192, 1024):
        scheduler.max_num_scheduled_tokens = step
        engine.reset_prefix_cache()
        reference.assert_equal(
            f"{what}16 at once, {step} a step", prompts, want, tokens(ask(engine, prompts))
        )
    for _ in range(2):  # the others may have been in the way of these
        again = ask(engine, prompts[-2:])
    cached = sum(answer.num_cached_tokens for answer in again)
    assert cached > model.longest
    told = f"{what}two again, {cached} tokens in the cache"
    reference.assert_equal(told, prompts[-2:], want[-2:], tokens(again))
    reference.summary.append(f"{what}{layers[0].engine.take(0)}")


def test_prefix_in_common(model: Subject, engine: Any) -> None:
    reference, opening = model.reference, model.longest * 2 // 3
    ends = [reference.text[at : at + count] for at, count in ((1, 100), (2, 900), (3, model.longest // 10))]
    prompts = [reference.text[-opening:] + end for end in ends]
    want = reference.write(prompts, model.config)
    engine.reset_prefix_cache()
    answers = [ask(engine, [prompt])[0] for prompt in prompts]
    whole = opening // model.config.chunk_size * model.config.chunk_size
    assert [answer.num_cached_tokens for answer in answers] == [0, whole, whole]
    what = f"on a GPU, {model.source.name}, a prefix of {opening} tokens in the cache"
    reference.assert_equal(what, prompts, want, tokens(answers))
    reference.assert_equal(f"{what}, all at once", prompts, want, tokens(ask(engine, prompts)))


def test_dense_requests(model: Subject, engine: Any) -> None:
    """Beside operated ones with the same prompts, then all again out of the cache."""
    reference, what = model.reference, f"on a GPU, {model.source.name}, operated and dense in turn"
    prompts = reference.prompts(6, 50, model.longest // 3, seed=1)
    pairs = zip(reference.write(prompts, model.config), reference.write(prompts, None), strict=True)
    asked = [prompt for prompt in prompts for _ in range(2)]
    want = [answer for pair in pairs for answer in pair]
    # What a trained model says next seldom hangs on the far field.
    assert want[::2] != want[1::2] or model.config is TRAINED
    engine.reset_prefix_cache()
    for again in ("", ", again"):
        answers = ask(engine, asked, dense=[False, True] * len(prompts))
        reference.assert_equal(what + again, asked, want, tokens(answers))
    cached = [sum(answer.num_cached_tokens for answer in answers[mode::2]) for mode in range(2)]
    assert cached[0] == cached[1] > 0


def test_sparse_decode_steps(demo_model_path: Path, tmp_path: Path, summary: list[str]) -> None:
    """In CUDA graphs, one request dense among them; then steps that fill chunks and read these."""
    config = dataclasses.replace(RANDOM, theta_decode=10)
    model = subject("random", demo_model_path, tmp_path, summary, config)
    reference, engine = model.reference, model.start("float32")
    assert engine.llm_engine.vllm_config.compilation_config.cudagraph_mode.name == "FULL_DECODE_ONLY"
    prompts = reference.prompts(16, 50, model.longest // 3)
    got = tokens(ask(engine, prompts, dense=[True, *[False] * 15]))
    want = [*reference.write(prompts[:1], None), *reference.write(prompts[1:], config)]
    reference.assert_equal("on a GPU, sparse decode steps, 16 at once", prompts, want, got)
    reference.summary.append(f"on a GPU, sparse decode steps, {operated_layers(engine)[0].engine.take(0)}")
    new, few = 2 * config.chunk_size, prompts[5:7]
    got = tokens(ask(engine, few, new))
    want = reference.write(few, config, new)
    reference.assert_equal(f"on a GPU, {new} sparse decode steps", few, want, got)


def first_token(model: Any, reference: Reference, prompt: list[int], config: SurgeryConfig) -> torch.Tensor:
    """(vocab,) float32 log-probabilities of what the operated model writes first."""
    from llama_surgery import eject, operate

    ids = torch.tensor([prompt], device=model.device)
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    operate(model, config)
    try:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **options)
    finally:
        eject(model)
    return found.logits[0][0].float().log_softmax(-1)


def test_bfloat16(demo_model_path: Path, tmp_path: Path, summary: list[str]) -> None:
    """The engine is no further from float32 than transformers is in bfloat16, but for chance."""
    model = subject("trained", demo_model_path, tmp_path, summary)
    reference, config = model.reference, model.config
    prompts = reference.prompts(16, 50, model.longest)
    exact = [first_token(reference.model, reference, prompt, config) for prompt in prompts]
    half = reference.model.to(torch.bfloat16)
    own = [first_token(half, reference, prompt, config) for prompt in prompts]
    engine = model.start("bfloat16")
    assert {layer.executor.name for layer in operated_layers(engine)} == {"Triton kernels"}
    told = [
        max(answer.outputs[0].logprobs[0].items(), key=lambda found: found[1].logprob)
        for answer in ask(engine, prompts, 1, logprobs=1)
    ]
    errors = [abs(found.logprob - float(x[token])) for x, (token, found) in zip(exact, told, strict=True)]
    theirs = [float((y.max() - x[y.argmax()]).abs()) for x, y in zip(exact, own, strict=True)]
    same = sum(int(x.argmax()) == token for x, (token, _) in zip(exact, told, strict=True))
    mean, usual = sum(errors) / len(errors), sum(theirs) / len(theirs)
    summary.append(
        f"on a GPU, {model.source.name} in bfloat16, 16 prompts of 50 to {model.longest} tokens: {same} of "
        f"them go on as in float32, log-probabilities off by {mean:.4f} in the mean, {max(errors):.4f} at "
        f"most, transformers' by {usual:.4f} and {max(theirs):.4f}"
    )
    assert mean <= 2 * usual + 0.02, summary[-1]
