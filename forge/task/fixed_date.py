"""Lets chat templates write a fixed date for today's, so that a resumed run reads the same text on any day."""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import chat_template_utils

DATE = datetime.date(2024, 7, 26)  # the date in Llama's templates if none is given
NOW = "strftime_now"  # the function by which a template asks for today's date

_compile_template: Any = chat_template_utils._compile_jinja_template  # cached: the one that renders the template


@contextmanager
def fixed_date(template: str) -> Iterator[None]:
    """Let a template write DATE, whatever way it asks for today's. Raises jinja2.TemplateSyntaxError."""
    functions = _compile_template(template).environment.globals
    own = functions[NOW]
    functions[NOW] = DATE.strftime
    try:
        yield
    finally:
        functions[NOW] = own
