"""Question files: both formats, and clear words about what is wrong with one."""

import json

import pytest
from tests.evaluation.ruler.conftest import FIXTURES

from llama_surgery.errors import TextError
from llama_surgery.evaluation.ruler.materials import Materials, read_questions
from llama_surgery.evaluation.ruler.tasks import Sampler

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "Rome  is old.",
                    "qas": [
                        {"question": "How is Rome? ", "answers": [{"text": "old"}, {"text": "old"}]},
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Bari is new.", "qas": []},
            ]
        }
    ]
}
HOTPOT = [
    {
        "question": "Who?",
        "answer": "Ann",
        "context": [["Ann", ["Ann rows.", "Ann sings."]], ["Bob", ["Bob rows."]]],
    }
]


def test_squad_keeps_what_can_be_answered(tmp_path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD), encoding="utf-8")
    read = read_questions(path)
    assert read.documents == ("Rome is old.", "Bari is new.")
    (question,) = read.questions
    assert (question.text, question.answers) == ("How is Rome?", ("old",))
    assert (question.gold, question.related) == ((0,), (1,))


def test_hotpot_keeps_the_paragraphs_of_a_question_together(tmp_path) -> None:
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(HOTPOT), encoding="utf-8")
    read = read_questions(path)
    assert read.documents == ("Ann: Ann rows. Ann sings.", "Bob: Bob rows.")
    assert read.questions[0].gold == (0, 1) and read.questions[0].answers == ("Ann",)


def test_gold_documents_are_in_every_prompt_once(tokenizer, materials) -> None:
    for task in ("qa_1", "qa_2"):
        chosen = materials.questions[task]
        for sample in Sampler(tokenizer, materials).samples(task, 4096, range(4)):
            asked = sample.text.rpartition("Question: ")[2].partition("\n")[0]
            (question,) = [q for q in chosen.questions if q.text == asked]
            assert all(sample.text.count(chosen.documents[number]) == 1 for number in question.gold)
            assert question.answers == sample.references


def test_few_documents_are_read_round_and_round(tokenizer, tmp_path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD), encoding="utf-8")
    few = Materials.of(questions={"qa_1": read_questions(path)})
    (sample,) = Sampler(tokenizer, few).samples("qa_1", 1024, [0])
    assert sample.text.count("Bari is new.") > 20 and sample.text.count("Rome is old.") == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON"),
        ('"text"', "unexpected shape"),
        ('{"questions": []}', r"unexpected shape \(KeyError\('data'\)\)"),
        ('{"data": []}', "no question with an answer"),
        ('[{"question": "Who?"}]', r"KeyError\('context'\)"),
    ],
)
def test_other_files_are_refused_with_the_formats_that_are_read(content, told, tmp_path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=f"questions.json: .*{told}.*SQuAD .*HotpotQA"):
        read_questions(path)


def test_a_mark_before_the_file_is_no_part_of_it(tmp_path) -> None:
    path = tmp_path / "hotpot.json"
    for codec in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(HOTPOT), encoding=codec)
        assert read_questions(path).questions
    path.write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(TextError, match=r"gzip file.*SQuAD"):
        read_questions(path)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(TextError, match=r"nowhere.json: cannot be read \(No such file"):
        read_questions(tmp_path / "nowhere.json")


def test_one_document_is_no_haystack(tokenizer, tmp_path) -> None:
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(HOTPOT), encoding="utf-8")
    alone = Materials.of(questions={"qa_2": read_questions(path)})
    with pytest.raises(TextError, match="no document beside"):
        Sampler(tokenizer, alone).samples("qa_2", 1024, [0])


def test_fixtures_are_of_both_formats() -> None:
    assert len(read_questions(FIXTURES / "squad.json").questions) == 80
    assert len(read_questions(FIXTURES / "hotpot.json").questions) == 60
