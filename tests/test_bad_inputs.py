"""The page of unusual inputs is that of the tests, and is as long as it should be."""

import re
import subprocess
import sys

from bad_inputs import AREAS, PAGE, _words


def test_the_page_is_up_to_date(tmp_path):
    # In a process of its own: collecting inside of a collected session would register every mark twice.
    code = f"import sys; sys.path.insert(0, {str(PAGE.parents[1] / 'tests')!r}); import bad_inputs; "
    code += "sys.stdout.write(bad_inputs.make_page())"
    made = subprocess.run([sys.executable, "-c", code], cwd=PAGE.parents[1], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert PAGE.read_text() == made.stdout, "run `python tests/bad_inputs.py` and commit docs/bad-inputs.md"
    assert int(re.search(r"(\d+) inputs are tried", made.stdout)[1]) >= 100
    assert all(f"## {area}" in made.stdout for area in AREAS)


def test_words_of_a_mark():
    assert _words({"match": r"is not .* \(a b\)", "x": 3}, "Own data", "{x} rows") == (
        "Own data", "3 rows", "error: is not  …  (a b)",
    )  # fmt: skip
    assert _words({"x": 3}, "Own data", "{x} rows", "{x} lines") == ("Own data", "3 rows", "3 lines")
