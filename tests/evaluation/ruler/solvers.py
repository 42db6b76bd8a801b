"""Answers found from the prompt alone, by reading it as a program can: proof that a task can be solved."""

import re
from collections import Counter

from llama_surgery.evaluation.ruler.tasks import RulerSample


def solve(sample: RulerSample) -> set[str]:
    """The references of a sample that is not about questions over documents."""
    if sample.task.startswith("niah"):
        return _needles(sample.text)
    return {"vt": _variables, "cwe": _common, "fwe": _frequent}[sample.task](sample.text)


def _needles(text: str) -> set[str]:
    context, _, question = text.rpartition("Question: ")
    asked = set(re.findall(r"[\w-]+", question))
    facts = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
    return {value for key, value in facts if key in asked}


def _variables(text: str) -> set[str]:
    part = text.rpartition("Variables are assigned")[2]
    value = re.search(r"hold the value (\d+)", part)[1]
    held = {value}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", part):
        if source in held:
            held.add(name)
    return held - {value}


def _common(text: str) -> set[str]:
    part = text.rpartition("Below is a numbered list")[2].rpartition("Question: ")[0]
    return {word for word, _ in Counter(re.findall(r"\d+\. (\w+)", part)).most_common(10)}


def _frequent(text: str) -> set[str]:
    context = text.partition("\n\n")[2].rpartition("\n\nQuestion: ")[0]
    counts = Counter(context.split())
    del counts["..."]
    return {word for word, _ in counts.most_common(3)}
