"""Rows that see everything are the model's own attention: the same answers and counts, and no layout."""

import dataclasses
import threading

import pytest
import torch
from tests.surgery.tiny import SPARSE, build, in_pieces, llama, logits, pad, positions, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from llama_surgery import operate, operated, paged_cache, statistics
from llama_surgery.surgery import buffers as buffers_module
from llama_surgery.surgery import store as store_module
from llama_surgery.surgery.compat import CACHE_NAME
from llama_surgery.surgery.cudnn import without_cudnn
from llama_surgery.surgery.operation import reset_statistics

EXACT = {"rtol": 1e-9, "atol": 1e-9}
OWN = dataclasses.replace(SPARSE, theta_decode=0.0, backend="auto")
BY_NAME = dataclasses.replace(OWN, backend="gather")


def both(run, config=OWN, model=llama):
    """What ``run(model)`` gives with the model's own attention and without."""
    found = []
    for each in (config, dataclasses.replace(config, backend="gather")):
        with operated(model(), each) as patient:
            reset_statistics(patient)
            found.append(run(patient))
    return found


def same(run, config=OWN, **options):
    one, other = both(run, config, **options)
    torch.testing.assert_close(one, other, **EXACT)


def test_short_prompts_are_bit_for_bit_the_dense_model():
    ids = tokens(64 + 32)  # no chunk is closed yet
    dense = logits(llama(), ids)
    with operated(llama(), OWN) as model:
        assert torch.equal(logits(model, ids), dense)
        assert torch.equal(logits(model, ids, use_cache=False), dense)


@pytest.mark.parametrize("until", [0, 64, 128, 256])
@pytest.mark.parametrize("cuts", [[], [40], [96, 136], [128], [8, 200, 201, 202]])
def test_pieces(until, cuts):
    """Positions below ``dense_until`` in front of others, in one call and in several."""
    same(lambda model: in_pieces(model, tokens(2, 230), cuts)[0], dataclasses.replace(OWN, dense_until=until))


@pytest.mark.parametrize("until", [0, 128])
def test_without_a_cache(until):
    config = dataclasses.replace(OWN, dense_until=until)
    same(lambda model: logits(model, tokens(2, 230), use_cache=False), config)


@pytest.mark.parametrize("until", [0, 128])
def test_padding(until):
    ids, mask = pad([tokens(150), tokens(90, seed=1)], [10, 70], 160)
    run = {"attention_mask": mask, "position_ids": positions(mask)}
    kept = mask[..., None].bool()
    same(lambda m: logits(m, ids, **run).where(kept, 0.0), dataclasses.replace(OWN, dense_until=until))


@pytest.mark.parametrize("prompt", [50, 100, 203])
def test_generate(prompt):
    ids = tokens(2, prompt)

    def run(model):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False, num_beams=2
        )
        return out.double()

    same(run)


def test_sparse_rows_after_dense_steps():
    """Steps fill chunks that nothing has asked for; a later prompt reads them sparsely."""

    def run(model):
        first, cache = in_pieces(model, tokens(230), [100, *range(101, 140)])
        return torch.cat((first, in_pieces(model, tokens(100, seed=2), [], cache)[0]), 1)

    same(run)


@pytest.mark.parametrize("kept", [30, 64, 100, 128, 190])
def test_crop(kept):
    """Into chunks in tree order, and into chunks that are not."""

    def run(model):
        _, cache = in_pieces(model, tokens(200), [40, 41, 180, 181, 182])
        cache.crop(kept - 200)
        return in_pieces(model, tokens(120, seed=3), [1, 2], cache)[0]

    same(run)


def test_sequences_part_and_are_chosen():
    def run(model):
        _, cache = in_pieces(model, tokens(2, 150), [100, 101])
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        row = tokens(3, 40, seed=4)
        mask = torch.ones(3, 190, dtype=torch.int64)
        mask[1, 150:160] = 0
        out = model(
            row,
            **{CACHE_NAME: cache},
            attention_mask=mask,
            position_ids=positions(mask)[:, 150:],
            use_cache=True,
        )
        with torch.no_grad():
            out = out.logits.where(mask[:, 150:, None].bool(), 0.0)
        return out

    with torch.no_grad():
        same(run)


@pytest.mark.parametrize(
    "config", [OWN, dataclasses.replace(OWN, theta=0.0), dataclasses.replace(OWN, dense_until=128)]
)
def test_counts(config):
    def run(model):
        in_pieces(model, tokens(2, 230), [72, 200, 201])
        return statistics(model).to_dict()

    one, other = both(run, config)
    assert one == other


def test_nothing_is_laid_out_for_rows_that_see_everything(monkeypatch):
    asked = []
    plain = buffers_module.build_layout
    monkeypatch.setattr(
        buffers_module, "build_layout", lambda *a, **k: asked.append(a[0].shape) or plain(*a, **k)
    )
    with operated(llama(), dataclasses.replace(OWN, dense_until=256)) as model:
        _, cache = in_pieces(model, tokens(300)[:250], [240, 241, 242])
        assert not asked
        in_pieces(model, tokens(50), [], cache)
        assert [shape[1] for shape in asked] == [256, 256]  # a layer each, when a row first asked


def test_eager_attention_is_left_alone():
    """It would hold all weights of a prompt in memory at once."""
    model = build("Llama", attn_implementation="eager")
    ids = tokens(200)
    with operated(model, OWN):
        one = logits(model, ids)
    with operated(model, BY_NAME):
        torch.testing.assert_close(one, logits(model, ids), **EXACT)


def test_a_cache_of_another_call():
    """The cache that ``paged_cache`` makes does as well."""
    with operated(llama(), OWN) as model:
        cache = paged_cache(model)
        one = in_pieces(model, tokens(120), [60], cache)[0]
        torch.testing.assert_close(one, in_pieces(model, tokens(120), [60])[0], **EXACT)


def test_gradients_of_an_earlier_call():
    """Reach its inputs through later calls that record none of their own, also when chunks fill meanwhile."""

    def run(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            states = model.get_input_embeddings()(tokens(1, 60)).requires_grad_()
            out = model(inputs_embeds=states, use_cache=True)
            cache, loss = out[CACHE_NAME], out.logits[:, -1].square().sum()
            for step in range(8):
                out = model(tokens(1, 1 + 40 * (step == 5), seed=step), **{CACHE_NAME: cache}, use_cache=True)
                loss = loss + out.logits[:, -1].square().sum()
            loss.backward()
            return states.grad
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    same(run)


def test_the_switch_is_turned_back_whoever_leaves_last():
    """Threads overlap: neither may leave cuDNN's attention off for good."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with without_cudnn:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with without_cudnn:
        thread.start()
        assert inside.wait(10)
        assert not enabled()
    assert not enabled()  # the other one is still inside
    leave.set()
    thread.join()
    assert enabled() == before


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_layer_that_follows_the_first_costs_few_operations(monkeypatch):
    """Appending to buffers takes views of them, where transformers' own cache makes longer tensors."""
    monkeypatch.setattr(store_module, "CHECKED_DEVICES", ())  # nor are keys looked at on a GPU

    def of_a_layer(model):
        """Operations of a prompt on an empty cache, and of a step on it."""
        cache, found = model(tokens(1, 2))[CACHE_NAME], []
        cache.reset()
        for ids in (tokens(1, 60), tokens(1, 1)):
            with torch.no_grad(), Operations() as operations:
                model(ids, **{CACHE_NAME: cache})
            found.append(operations.count)
        return torch.tensor(found)

    layers = torch.tensor([2, 6])
    models = [build("Llama", num_hidden_layers=int(count)) for count in layers]
    dense = torch.stack([of_a_layer(model) for model in models])
    for model in models:
        operate(model, OWN, routers={})
    more = torch.stack([of_a_layer(model) for model in models]) - dense
    prompt, step = (more[1] - more[0]).div(4).tolist()
    assert prompt <= 9 and step <= 4


def test_padded_batches_that_see_everything_are_never_laid_out(monkeypatch) -> None:
    """Their keys would have to be put back into order in every step."""

    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a layout was made")

    for room in ("store", "buffers"):
        monkeypatch.setattr(f"llama_surgery.surgery.{room}.build_layout", broken)
    model, width = llama(), 200
    ids, mask = pad([tokens(width - 30), tokens(width, seed=1)], [30, 0], width)
    told = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    dense = model.generate(ids, **told)
    with operated(model, dataclasses.replace(SPARSE, dense_until=1024)):
        assert torch.equal(model.generate(ids, **told), dense)
        logits(model, ids, attention_mask=mask)
