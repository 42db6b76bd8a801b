"""A head's tree: what it says about itself, and that it is the one the model used."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llama_surgery
from llama_surgery.errors import SurgeryError, TextError
from llama_surgery.report.extract import head_tree
from llama_surgery.report.tree import HeadTree, forest_view, page_colours
from llama_surgery.surgery.compat import CACHE_NAME

#: Four pages of two tokens; "b" and "g" share page B, and so on.
TREE = HeadTree(1, 0, list("abcdefgh"), [0, 4, 1, 6, 3, 2, 5, 7], 2)


def test_pages_hold_every_token_once_in_reading_order() -> None:
    assert TREE.pages() == [[0, 4], [1, 6], [2, 3], [5, 7]]
    assert TREE.page_of() == [0, 1, 2, 2, 0, 3, 1, 3]


def test_a_tree_survives_json() -> None:
    assert HeadTree.from_dict(TREE.to_dict()) == TREE


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"order": [0, 0, 1, 6, 3, 2, 5, 7]}, "not a permutation"),
        ({"colour": "red"}, "colour"),
        ({"arity": 3}, "arity"),
    ],
)
def test_a_damaged_tree_is_refused(change: dict, told: str) -> None:
    with pytest.raises(SurgeryError, match=told):
        HeadTree.from_dict({**TREE.to_dict(), **change})


def test_the_view_nests_pages_and_keeps_the_text_whole() -> None:
    view = forest_view(TREE)
    assert "".join(run["text"] for run in view["text"]) == "abcdefgh"
    assert view["depth"] == 2
    first_ball = view["root"]["children"][0]["children"]
    assert [page["name"] for page in first_ball] == ["A", "B"]
    assert [run["text"] for run in first_ball[0]["runs"]] == ["a", "e"]


def test_pages_of_a_ball_look_more_alike_than_pages_of_two() -> None:
    colours = [[int(strong[i : i + 2], 16) for i in (1, 3, 5)] for strong, _ in page_colours(TREE)]

    def apart(a: int, b: int) -> int:
        return sum((x - y) ** 2 for x, y in zip(colours[a], colours[b], strict=True))

    assert 0 < apart(0, 1) < apart(1, 2)
    assert 0 < apart(2, 3) < apart(0, 3)


class Letters:
    """A tokenizer of single characters, slow as far as the extraction knows."""

    is_fast = False

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return chr(ids[0] + 64)


@pytest.fixture
def operated() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )
    ).eval()  # fmt: skip
    config = llama_surgery.SurgeryConfig(chunk_size=16, page_size=4, window=4, tile=4)
    return llama_surgery.operate(model, config)


def test_the_tree_is_the_one_in_the_models_cache(operated: LlamaForCausalLM) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    tree = head_tree(operated, Letters(), text, layer=1, kv_head=1)
    cache = llama_surgery.paged_cache(operated)
    with torch.inference_mode():
        operated(torch.tensor([Letters()(text)["input_ids"]]), **{CACHE_NAME: cache})
    assert tree.order == cache.layers[1].stores[0].layout.order[1, 0].tolist()
    assert len(tree.tokens) == 16 and tree.page_size == 4


@pytest.mark.parametrize(
    ("text", "layer", "kv_head", "error", "told"),
    [
        ("short", 0, 0, TextError, "5 tokens.*16"),
        ("x" * 20, 7, 0, SurgeryError, r"layer=7.*\[0, 1\]"),
        ("x" * 20, 0, 9, SurgeryError, "kv_head=9.*has 2"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    operated: LlamaForCausalLM, text: str, layer: int, kv_head: int, error: type, told: str
) -> None:
    with pytest.raises(error, match=told):
        head_tree(operated, Letters(), text, layer=layer, kv_head=kv_head)
