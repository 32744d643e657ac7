import pytest

from kd_hf.data.classes import check_labels
from kd_hf.data.reading import library_errors, plain_reason
from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig

SIGNED = "https://cdn-lfs.hf.co/repos/ab/cd?X-Amz-Signature=00ff&X-Amz-Expires=60#part"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (
            f"Server error '500' for url '{SIGNED}'\nMore",
            "Server error '500' for url 'https://cdn-lfs.hf.co/repos/ab/cd' More",
        ),
        (f"({SIGNED}) gone.", "(https://cdn-lfs.hf.co/repos/ab/cd gone"),
        ("see http://ann:secret@host:80/a/b?c", "see http://host:80/a/b"),
        ("see https://host.", "see https://host"),
        ("is it? https://a/b and http://c?d=e here", "is it? https://a/b and http://c here"),
        ("cannot read hf://datasets/org/x@main/a.parquet", "cannot read hf://datasets/org/x@main/a.parquet"),
        ("", "OSError"),
    ],
)
def test_reasons_are_one_line_without_signatures(text, plain):
    assert plain_reason(OSError(text)) == plain


def test_library_errors():
    cfg = DataConfig(path="org/x")
    with (
        pytest.raises(UserError, match=r"^data.path: 'org/x': for url https://cdn/a\. Check `data.path`"),
        library_errors(cfg),
    ):
        raise FileNotFoundError("for url https://cdn/a?Signature=1")
    with pytest.raises(UserError, match=r"^as it was$"), library_errors(cfg):
        raise UserError("as it was")


def test_labels_are_class_numbers():
    check_labels(-1, 2, "abc", "here")
    check_labels(-1, 99, None, "here")
    with pytest.raises(UserError, match=r"here has the label 3, but only 3 classes"):
        check_labels(0, 3, "abc", "here")
    with pytest.raises(UserError, match=r"here has the label -2; expected 0, 1"):
        check_labels(-2, 0, None, "here")
