"""The tables of docs/models.md are those of the code."""

from models_table import PAGE, replaced


def test_the_page_of_models_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert page == replaced(page), "run: python tests/models_table.py"
    assert "griffin" in page
