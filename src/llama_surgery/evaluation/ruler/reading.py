"""Question answering: the documents that hold the answer, among others."""

import random

from llama_surgery.errors import TextError
from llama_surgery.evaluation.ruler.draft import Draft, Request
from llama_surgery.evaluation.ruler.materials import Materials
from llama_surgery.evaluation.ruler.questions import QuestionSet

_INSTRUCTION = (
    "Answer the question from the documents{place}. Give the answer alone, in as few words as it takes."
)


def questions_for(task: str, materials: Materials, count: int) -> QuestionSet:
    """The question set of a task, if it holds questions for ``count`` samples.

    Raises:
        TextError: None was given, or it holds fewer: a question is asked once.
    """
    chosen = materials.questions.get(task)
    if chosen is None:
        raise TextError(
            f"{task} needs a question file: none was given. Give the path of one in the format of SQuAD or "
            f"HotpotQA for {task}, or leave the task out."
        )
    if count > len(chosen.questions):
        raise TextError(
            f"{task}: {count} samples were asked for, but the question file has {len(chosen.questions)} "
            "questions that can be answered. Ask for fewer samples or leave the task out."
        )
    return chosen


def question_answering(request: Request, *, task: str) -> Draft:
    """A question of the set that is given for ``task``. ``size`` counts documents."""
    chosen = questions_for(task, request.materials, request.index + 1)
    order = random.Random(f"{request.seed} {task}").sample(
        range(len(chosen.questions)), len(chosen.questions)
    )
    question = chosen.questions[order[request.index]]
    numbers = list(question.gold)
    taken = {*question.gold, *question.related}
    others = [number for number in range(len(chosen.documents)) if number not in taken]
    request.rng.shuffle(others)
    distractors = [*question.related, *others]
    missing = request.size - len(numbers)
    if missing > 0:
        if not distractors:
            raise TextError(f"{task}: the question file has no document beside that of the question.")
        # A file with little text is read round and round; the gold documents stay single.
        rounds = -(-missing // len(distractors))
        numbers += (distractors * rounds)[:missing]
    request.rng.shuffle(numbers)
    documents = [f"Document {i}:\n{chosen.documents[n]}" for i, n in enumerate(numbers, start=1)]
    prompt = "\n\n".join(
        [
            _INSTRUCTION.format(place=" below"),
            *documents,
            _INSTRUCTION.format(place=" above"),
            f"Question: {question.text}",
        ]
    )
    return Draft(prompt, "Answer:", question.answers)
