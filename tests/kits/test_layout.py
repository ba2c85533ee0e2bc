"""A JSON text with another content, in its own layout."""

from __future__ import annotations

import json

import pytest

from nvflare_rdma.kits.layout import changed

TEXT = """{
  "a": 1,   "b": {"x":  [1,2]},
  "list": [ "p",
     "q"
  ],
  "c": "end"
}"""


@pytest.mark.parametrize(
    ("text", "values", "after"),
    [
        (TEXT, {}, TEXT),
        (TEXT, {"a": 2}, TEXT.replace('"a": 1', '"a": 2')),
        (TEXT, {"a": None}, TEXT.replace('\n  "a": 1,', "")),
        (TEXT, {"b": None}, TEXT.replace(',   "b": {"x":  [1,2]}', "")),
        (TEXT, {"c": None}, TEXT.replace(',\n  "c": "end"', "")),
        (TEXT, {"d": True}, TEXT.replace('"end"', '"end",\n  "d": true')),
        (TEXT, {"d": [1]}, TEXT.replace('"end"', '"end",\n  "d": [\n    1\n  ]')),
        (TEXT, {"list": ["p", "q", "r"]}, TEXT.replace('"q"', '"q", "r"')),
        ('{"l": [\n  "p"\n]}', {"l": ["p", {"x": 1}]}, '{"l": [\n  "p",\n  {\n    "x": 1\n  }\n]}'),
        ('{"l": ["p", "q"]}', {"l": ["p", "q", "r"]}, '{"l": ["p", "q", "r"]}'),
        ('{"l": []}', {"l": ["r"]}, '{"l": [\n    "r"\n  ]}'),
        ('{"l": ["p", "q"]}', {"l": ["q"]}, '{"l": [\n    "q"\n  ]}'),
        ("{}", {"a": 1}, '{\n    "a": 1\n}'),
        ('{"a": 1}\n', {"a": None}, "{}\n"),
        ('{"a": 1}', {"b": 2}, '{"a": 1, "b": 2}'),
        ('{ "{\\":,}": "}{,:" }', {"b": 2}, '{ "{\\":,}": "}{,:", "b": 2 }'),
        ('\n {"ü": 1}', {"b": "ä"}, '\n {"ü": 1, "b": "\\u00e4"}'),
        ('{"a": 1, "a": 2}', {"b": 1}, '{"a": 1, "a": 2, "b": 1}'),
    ],
)
def test_only_what_changes_changes(text, values, after):
    content = {name: value for name, value in {**json.loads(text), **values}.items() if value is not None}
    made = changed(text, content, "  ")
    assert json.loads(made) == content
    assert made == after
