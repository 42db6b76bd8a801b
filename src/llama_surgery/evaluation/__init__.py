"""Measuring an operated model against the dense model it was made from, in the same run."""
