"""The peers' executor, and running whole models under a rule."""

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

import llama_surgery
from llama_surgery.errors import SurgeryError, UnsupportedModelError
from llama_surgery.evaluation.generation import continue_greedily
from llama_surgery.evaluation.logits import final_states
from llama_surgery.evaluation.peers import registry as learning
from llama_surgery.evaluation.peers.executor import PairCount, attend_by_rule, running, strips
from llama_surgery.evaluation.peers.maps import HeaviestBlocks, PooledGate
from llama_surgery.evaluation.peers.registry import PEERS
from llama_surgery.evaluation.peers.rows import SinkWindow
from llama_surgery.evaluation.peers.rule import Call, Everything, causal

RULES = [name for name in PEERS if name != "full"]
CAUSAL_PEERS = [name for name, peer in PEERS.items() if not peer.ahead]
LEARNED = {
    "seer": lambda: {"query_map": torch.randn(2, 4, 16, 8), "key_map": torch.randn(2, 4, 48, 8)},
    "duo": lambda: {"scores": torch.tensor([[0.1, 0.9], [0.8, 0.2]])},
}


@pytest.fixture
def call() -> Call:
    torch.manual_seed(1)
    keys = torch.randn(2, 4, 400, 16)
    return Call(torch.randn(2, 4, 400, 16), keys, 0.25, 0)


def learned(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return LEARNED.get(name, dict)()


@pytest.mark.parametrize("name", RULES)
def test_full_budget_is_dense_and_the_floor_is_lower(name: str, call: Call) -> None:
    tensors, peer = learned(name), PEERS[name]
    values = torch.randn(2, 4, 400, 8)
    expected = F.scaled_dot_product_attention(call.queries, call.keys, values, is_causal=True, scale=0.25)
    count = PairCount()
    rule = peer.make(peer.number(1.0, 400, tensors), tensors)
    torch.testing.assert_close(attend_by_rule(rule, call, values, count), expected)
    assert count.densities() == {"prefill": 1.0}
    densities = []
    for x in (0.0, 0.3, 0.6, 0.9):
        count = PairCount()
        out = attend_by_rule(peer.make(peer.number(x, 400, tensors), tensors), call, values, count)
        assert out.isfinite().all()  # every row sees something
        densities.append(count.densities()["prefill"])
    assert densities == sorted(densities) and densities[0] < 0.99


@pytest.mark.parametrize("name", PEERS)
def test_strips_change_nothing(name: str, call: Call) -> None:
    tensors, peer = learned(name), PEERS[name]
    values = torch.randn(2, 4, 400, 8)
    rule = peer.make(peer.number(0.4, 400, tensors), tensors)
    outs, counts = [], []
    for elements in (2**30, 2 * 4 * 400 * 130):
        count = PairCount()
        outs.append(attend_by_rule(rule, call, values, count, elements))
        counts.append(count.densities())
    torch.testing.assert_close(outs[0], outs[1])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", CAUSAL_PEERS)
def test_later_tokens_change_nothing(name: str, call: Call) -> None:
    tensors, peer = learned(name), PEERS[name]
    rule = peer.make(peer.number(0.4, 400, tensors), tensors)
    short = Call(call.queries[:, :, :211], call.keys[:, :, :211], call.scale, 0)
    masks = [
        (rule.visible(c, rule.prepare(c), 0, c.stop) & causal(0, c.stop, c.keys.device)).expand(2, 4, -1, -1)
        for c in (call, short)
    ]
    assert torch.equal(masks[0][:, :, :211, :211], masks[1])


@pytest.mark.parametrize("name", CAUSAL_PEERS)
def test_a_decode_step_sees_what_its_row_sees_in_prefill(name: str, call: Call) -> None:
    tensors, peer = learned(name), PEERS[name]
    rule = peer.make(peer.number(0.4, 400, tensors), tensors)
    step = Call(call.queries[:, :, -1:], call.keys, call.scale, 0)
    whole = rule.visible(call, rule.prepare(call), 0, 400).expand(2, 4, 400, 400)
    alone = rule.visible(step, rule.prepare(step), 399, 400).expand(2, 4, 1, 400)
    assert torch.equal(whole[:, :, -1:], alone)


def test_strips_are_whole_blocks(call: Call) -> None:
    assert list(strips(call, 64, 2 * 4 * 400 * 130)) == [(0, 128), (128, 256), (256, 384), (384, 400)]
    step = Call(call.queries[:, :, -70:], call.keys, call.scale, 0)
    assert list(strips(step, 64, 1)) == [(330, 384), (384, 400)]


def test_a_model_follows_a_rule_and_comes_back(tiny_llama: PreTrainedModel) -> None:
    ids = torch.randint(4096, (100,), generator=torch.Generator().manual_seed(0))
    before = final_states(tiny_llama, ids)[0]
    prompt = ids[:60].tolist()
    said = continue_greedily(tiny_llama, [prompt, prompt[::-1]], 4)
    with running(tiny_llama, Everything()) as count:
        torch.testing.assert_close(final_states(tiny_llama, ids)[0], before)
        assert continue_greedily(tiny_llama, [prompt, prompt[::-1]], 4) == said
        assert count.densities() == {"prefill": 1.0, "decode": 1.0}
    with running(tiny_llama, SinkWindow(window=10, sinks=2)) as count:
        assert not torch.allclose(final_states(tiny_llama, ids)[0], before)
        pairs = sum(min(row + 1, 12) for row in range(100))
        assert count.densities() == {"prefill": pairs / 5050}
        continue_greedily(tiny_llama, [prompt], 3)
        # The first of three tokens comes from the prompt; steps at positions 60 and 61 make the others.
        assert count.densities()["decode"] == 24 / (61 + 62)
    assert torch.equal(final_states(tiny_llama, ids)[0], before)


def test_what_rules_cannot_run_on_is_refused(tiny_llama: PreTrainedModel) -> None:
    with running(tiny_llama, Everything()), pytest.raises(UnsupportedModelError, match="equal length"):
        continue_greedily(tiny_llama, [[1, 2, 3], [4, 5]], 1)
    with (
        llama_surgery.operated(tiny_llama),
        pytest.raises(SurgeryError, match="dense model"),
        running(tiny_llama, Everything()),
    ):
        pass


def test_the_gate_learns_where_attention_goes(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "STEPS", 150)
    monkeypatch.setattr(PooledGate, "block", 16)
    ids = torch.randint(4096, (2, 256), generator=torch.Generator().manual_seed(0))
    trained = learning.train_gate(tiny_llama, ids)
    assert trained["query_map"].shape == (2, 4, 16, 64) and trained["key_map"].shape == (2, 4, 48, 64)

    class Judge(Everything):
        """How many of the oracle's blocks a gate finds."""

        agreed, of = 0, 0

        def __init__(self, maps: dict[str, torch.Tensor]) -> None:
            self.maps = maps

        def prepare(self, call: Call) -> None:
            best = HeaviestBlocks(4, 16).prepare(call)
            chosen = PooledGate(4, **self.maps, block=16).prepare(call)
            self.agreed += int((best & chosen).sum())
            self.of += int(best.sum())

    shares = []
    for maps in (trained, {name: torch.randn_like(x) for name, x in trained.items()}):
        judge = Judge(maps)
        with running(tiny_llama, judge):
            final_states(tiny_llama, ids[0])
        shares.append(judge.agreed / judge.of)
    assert shares[0] > shares[1] + 0.05


def test_retrieval_is_attention_to_the_copied_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "PASSAGE", 2)
    recorder = learning._CopyRecorder(group=2)
    recorder.source = 3
    # Eight tokens, the last two copied from 3 and 4. Head 0 looks there, head 1 one further.
    queries = torch.zeros(1, 2, 8, 8)
    queries[0, 0, 6, 3] = queries[0, 0, 7, 4] = queries[0, 1, 6, 4] = queries[0, 1, 7, 5] = 1
    recorder.prepare(Call(queries, torch.eye(8).expand(1, 2, 8, 8) * 100, 1.0, layer=4))
    assert recorder.sums[4].tolist() == pytest.approx([1.0])


def test_retrieval_scores_are_the_same_again(tiny_llama: PreTrainedModel) -> None:
    ids = torch.randint(4096, (2, 600), generator=torch.Generator().manual_seed(0))
    scores = learning.retrieval_scores(tiny_llama, ids, 2)["scores"]
    assert scores.shape == (2, 2) and scores.min() >= 0 and scores.max() <= 1
    assert torch.equal(learning.retrieval_scores(tiny_llama, ids, 2)["scores"], scores)
