"""HTML pages out of templates: one file each, nothing loaded from elsewhere, texts escaped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STYLE = Path(__file__).parent / "report_page" / "style.css"


def render(template: Path, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """A page; its template finds the common style as `style`, and a missing value is an error."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters
    style = Markup(STYLE.read_text(encoding="utf-8"))  # our own file
    return environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)
