import pytest

from kd_hf.errors import UserError, is_main_process, nearest, run_command


@pytest.mark.parametrize("name", ["learning_rate", "lerning_rate", "learning_rat", "Learning_Rate", "LEARNING_RATE"])
def test_close_names_are_proposed(name):
    assert nearest(name, ["warmup_lr", "learning_rate", "min_lr"]) == " Did you mean 'learning_rate'?"


def test_the_closest_of_several_is_proposed():
    assert nearest("resnet19", ["resnet18", "resnet191", "vit"]) == " Did you mean 'resnet191'?"


def test_without_a_close_name_all_are_listed_in_order():
    assert nearest("zzz", ["beta", "alpha"]) == " Known: alpha, beta."


def test_a_long_list_keeps_what_is_most_alike():
    hint = nearest("lr", [*(f"unrelated_{i}" for i in range(50)), "warmup_lr_of_the_schedule"])
    assert "warmup_lr_of_the_schedule" in hint
    assert hint.count(",") == 12
    assert hint.endswith(", ….")


def test_nothing_to_choose_from():
    assert nearest("x", []) == ""


@pytest.mark.parametrize(("rank", "main"), [(None, True), ("0", True), ("3", False)])
def test_main_process(monkeypatch, rank, main):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is main


def run(monkeypatch, capsys, main):
    monkeypatch.setattr("sys.argv", ["command", "a", "b"])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    return exit_.value.code, capsys.readouterr().err


def test_exit_code_is_the_commands(monkeypatch, capsys):
    seen = []
    assert run(monkeypatch, capsys, lambda argv: seen.append(argv) or 7) == (7, "")
    assert seen == [["a", "b"]]


def test_a_quoted_message_becomes_one_line(monkeypatch, capsys):
    def main(argv):
        raise UserError("data.path: 'x':\n  first line\n\n  second line")

    assert run(monkeypatch, capsys, main) == (2, "kd_hf: error: data.path: 'x': first line second line\n")


def test_a_defect_keeps_its_traceback(monkeypatch, capsys):
    def main(argv):
        raise ZeroDivisionError

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        run_command(main)
