"""The figure of a comparison."""

from xml.etree import ElementTree

from llama_surgery.report.frontier import comparison


def row(form: str, density: float, **changed) -> dict:
    return {
        "form": form,
        "title": f"rule {form}",
        "ahead": form == "b",
        "target_density": density,
        "total_density": density,
        "prefill_density": density,
        "perplexity_ratio": 1.01,
        "ratio_low": 1.0,
        "ratio_high": 1.02,
        "needle_kept": 0.9,
        "needle_kept_low": 0.8,
        "needle_kept_high": 0.95,
    } | changed


def test_every_rule_is_drawn_and_what_was_not_measured_is_left_out() -> None:
    rows = [row(form, density) for form in ("pages", "b", "block-oracle") for density in (0.1, 0.2)]
    rows += [row("c", 0.1, needle_kept=None), row("c", 0.2, perplexity_ratio=None), row("full", 1.0)]
    svg = comparison(rows)
    texts = {element.text for element in ElementTree.fromstring(svg).iter() if element.text}
    assert {"rule pages", "rule b", "rule block-oracle", "rule c"} <= texts
    assert "rule full" not in texts
    assert comparison(rows) == svg
