"""Scores of answers: whether the references occur in them. Format does not count."""

from collections.abc import Sequence


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, upper and lower case alike: 0…1."""
    answer = answer.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if any of the references occurs in the answer, else 0."""
    answer = answer.lower()
    return float(any(reference.lower() in answer for reference in references))
