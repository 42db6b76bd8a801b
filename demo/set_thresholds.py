"""Sets the thresholds in demo/adapters anew, on demo/text/calibration.txt: ``make demo-adapter``.

Learned corrections that an adapter has stay; where it has none, heads get new budgets.
Some minutes of CPU time. The demo itself reads another text.
"""

from llama_surgery.cli.common import Dtype, load_model
from llama_surgery.cli.demo import LENGTH, demo_folder
from llama_surgery.cli.demo_model import Case, cases, fetch
from llama_surgery.surgery.adapter import load_adapter, save_adapter
from llama_surgery.surgery.operate import eject, operate
from llama_surgery.surgery.operation import config_of, routers_of
from llama_surgery.text import encode, read_text

#: Executed far density.
DENSITY = 0.06


def set_thresholds(case: Case) -> None:
    """Operates as the defaults say, at the density."""
    llm, tokenizer = load_model(str(case.model), "cpu", Dtype.float32)
    whole = read_text(demo_folder() / "text" / "calibration.txt")
    text = tokenizer.decode(encode(tokenizer, whole)[: LENGTH + LENGTH // 8])  # one window
    folder = demo_folder() / "adapters" / case.name
    routers = routers_of(load_adapter(llm, folder))
    eject(llm)
    learned = any(router.mean_weight is not None for router in routers.values())
    operate(
        llm,
        routers=routers if learned else None,
        density=DENSITY,
        text=[text],
        tokenizer=tokenizer,
        length=LENGTH,
        measure_speed=False,  # the demo shows what sparse prompts lose
    )
    save_adapter(llm, folder)
    print(f"{case.name}: θ = {config_of(llm).theta:.4f}", flush=True)


if __name__ == "__main__":
    for case in cases(demo_folder()):
        if case.name == "books-26m" or fetch(case):
            set_thresholds(case)
