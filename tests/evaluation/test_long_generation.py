import dataclasses

import pytest
import torch

import llama_surgery
from llama_surgery import SurgeryConfig
from llama_surgery.errors import SurgeryError
from llama_surgery.evaluation.generation import continue_greedily
from llama_surgery.evaluation.long_generation import (
    Written,
    _summary,
    first_difference,
    long_generation,
    repetition,
    write_on,
)

SPARSE = SurgeryConfig(chunk_size=32, page_size=8, window=16, tile=8, theta=0.4, theta_decode=0.4)
OPEN = dataclasses.replace(SPARSE, theta=0.0, theta_decode=0.0)


def greedy(model, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Token by token without a cache, and the lead of the likeliest."""
    ids, margins = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return ids[-count:], margins


def test_texts_are_greedy_and_margins_those_of_the_distribution(tiny_llama) -> None:
    windows = torch.randint(5, 4000, (2, 40), generator=torch.Generator().manual_seed(1))
    steps = []
    written = write_on(tiny_llama, windows, 6, lambda *step: steps.append(step))
    assert steps == [("generation", 1, 2), ("generation", 2, 2)]
    for window, text in zip(windows.tolist(), written, strict=True):
        tokens, margins = greedy(tiny_llama, window, 6)
        assert text.tokens == tokens
        assert text.margins == pytest.approx(margins, abs=1e-3)


def test_texts_end_where_the_model_ends_them(tiny_llama) -> None:
    window = torch.randint(5, 4000, (1, 40), generator=torch.Generator().manual_seed(1))
    (free,) = write_on(tiny_llama, window, 6)
    tiny_llama.generation_config.eos_token_id = [3, free.tokens[2]]
    (text,) = write_on(tiny_llama, window, 6)
    stop = free.tokens.index(free.tokens[2]) + 1
    assert text.tokens == free.tokens[:stop] and len(text.margins) == stop
    (along,) = write_on(tiny_llama, window, 6, along=[text.tokens])
    assert along.tokens == along.likeliest == text.tokens


def test_agreement_reads_along_and_sees_a_single_change(tiny_llama) -> None:
    window = torch.randint(5, 4000, (1, 40), generator=torch.Generator().manual_seed(2))
    tiny_llama.generation_config.eos_token_id = None
    text, _ = greedy(tiny_llama, window[0].tolist(), 5)
    (along,) = write_on(tiny_llama, window, 5, along=[text])
    assert along.likeliest == text
    text[2] = (text[2] + 1) % 4096
    (along,) = write_on(tiny_llama, window, 5, along=[text])
    told = [a == b for a, b in zip(along.likeliest, text, strict=True)]
    assert along.tokens == text
    assert told[:3] == [True, True, False]
    # From there on the model goes on from the changed token.
    for place in (3, 4):
        (following,), _ = greedy(tiny_llama, window[0].tolist() + text[:place], 1)
        assert told[place] == (following == text[place])


def test_prompts_of_different_lengths_make_one_batch(tiny_llama) -> None:
    tiny_llama.generation_config.eos_token_id = None
    prompts = [[7, 8, 9, 10, 11], [300, 20]]
    rows = continue_greedily(tiny_llama, prompts, 4)
    assert rows == [greedy(tiny_llama, prompt, 4)[0] for prompt in prompts]
    cut = continue_greedily(tiny_llama, prompts, 4, enough=lambda index, row: len(row) > 2 * index)
    assert [len(row) for row in cut] == [1, 3]


def test_repetition_counts_runs_that_occurred_before() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    # Runs of four: 1212, 2121, 1212 again, 2121 again.
    assert repetition([1, 2, 1, 2, 1, 2, 1]) == 0.5


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_summary_of_known_texts() -> None:
    dense = [
        Written([1, 2, 3, 4], [1, 2, 3, 4], [0.5, 0.25, 1.0, 2.0]),
        Written([1, 2], [1, 2], [3.0, 4.0]),
    ]
    operated = [Written([1, 9, 3], [1, 9, 3], [0.0] * 3), Written([1, 2, 3], [1, 2, 3], [0.0] * 3)]
    along = [Written([1, 2, 3, 4], [1, 7, 3, 4], [0.0] * 4), Written([1, 2], [1, 2], [0.0] * 2)]
    found = _summary(dense, operated, along)
    assert found["compared"] == 6 and found["agreement"] == pytest.approx(5 / 6)
    assert found["agreement_by_text"] == [0.75, 1.0]
    assert found["first_difference"] == [1, 2]
    assert found["margin_there"] == [0.25, None]
    assert found["margin"] == 1.5
    assert (found["length_dense"], found["length_operated"]) == (3, 3)


def test_everything_open_writes_the_dense_text_and_sparse_does_not(tiny_llama, tokenizer, texts) -> None:
    tiny_llama.generation_config.eos_token_id = None
    before = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
    found = long_generation(
        tiny_llama,
        tokenizer,
        texts=texts,
        length=160,
        new_tokens=24,
        count=2,
        configs={"open": OPEN, "sparse": SPARSE},
        seed=1,
    )
    assert not llama_surgery.is_operated(tiny_llama)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_llama.state_dict().items())
    everything, sparse = found["open"], found["sparse"]
    assert everything["agreement"] == 1 and everything["first_difference"] == [None, None]
    assert everything["margin_there"] == [None, None]
    assert everything["prompt_tokens"] == 136 and everything["compared"] == 48
    assert sparse["agreement"] < 1 and "repetition_dense" in sparse
    place, margin = sparse["first_difference"][0], sparse["margin_there"][0]
    assert place is not None and margin is not None and margin >= 0


def test_no_room_for_a_prompt_is_refused(tiny_llama, tokenizer, texts) -> None:
    with pytest.raises(SurgeryError, match="100 new tokens of 100"):
        long_generation(
            tiny_llama, tokenizer, texts=texts, length=100, new_tokens=100, count=1, configs={"a": SPARSE}
        )
