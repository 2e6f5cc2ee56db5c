"""In: what a file fills with words without end. Out: a message that is one line, and not a long one."""

from gpdiff_jax.errors import InputError


def test_a_message_is_a_line_that_is_cut_where_it_is_long():
    assert str(InputError("`a` is\n5\n\nnot 6")) == "`a` is 5  not 6"
    word = str(InputError(f"city {'x' * 5000!r} is none"))
    assert word.endswith("' (5002 characters) is none") and len(word) < 150
    # Also where no word is long.
    whole = f"leaf {'x/' * 3000} is none; make it again"
    path = str(InputError(whole))
    assert path.startswith("leaf x/x/") and len(path) < 1500
    assert path.endswith(f"x/ is none; make it again ({len(whole)} characters)")
