import io
import json
import math

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from kd_hf.errors import UserError
from kd_hf.layout import LOG
from kd_hf.recipe.config import TrainConfig
from kd_hf.run.log import JsonLines, read_log
from kd_hf.text.terminal import Progress
from kd_hf.train.callbacks import CallbackList, TrainerControl, TrainerState


class Recorder(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((args, state.global_step, kwargs))
        control.should_save = True


def test_a_callback_gets_arguments_state_and_control():
    recorder, state, control = Recorder(), TrainerState(global_step=3), TrainerControl()
    callbacks = CallbackList("arguments", [recorder])
    callbacks.call("on_step_end", state, control, extra=1)
    assert recorder.seen == [("arguments", 3, {"extra": 1})]
    assert control.should_save


def test_classes_are_made_into_instances_and_can_be_removed():
    callbacks = CallbackList(None, [Recorder])
    callbacks.add(Recorder)
    mine = Recorder()
    callbacks.add(mine)
    assert [type(callback) for callback in callbacks.callbacks] == [Recorder] * 3
    callbacks.remove(mine)
    assert mine not in callbacks.callbacks
    callbacks.remove(Recorder)
    assert callbacks.callbacks == []


def test_events_a_callback_does_not_know_are_passed_over():
    class Plain:
        called = 0

        def on_log(self, args, state, control, logs):
            self.called += 1

    plain = Plain()
    callbacks = CallbackList(None, [plain, TrainerCallback])
    for event in ("on_train_begin", "on_log"):
        callbacks.call(event, TrainerState(), TrainerControl(), **({"logs": {}} if event == "on_log" else {}))
    assert plain.called == 1


def test_early_stopping_of_transformers_reads_our_state_and_settings():
    args = TrainConfig(
        output_dir="x", metric_for_best_model="top1", greater_is_better=True, load_best_model_at_end=True
    )
    callbacks = CallbackList(args, [EarlyStoppingCallback(early_stopping_patience=2)])
    state, control = TrainerState(), TrainerControl()
    callbacks.call("on_train_begin", state, control)
    stopped = []
    for value in (50.0, 60.0, 55.0, 58.0):
        callbacks.call("on_evaluate", state, control, metrics={"eval_top1": value})
        state.best_metric = max(value, state.best_metric or 0.0)
        stopped.append(control.should_training_stop)
    assert stopped == [False, False, False, True]


# --- the log


def test_a_log_is_read_as_it_was_written(tmp_path):
    log = JsonLines(tmp_path, keep_until=0)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "text": "zwölf\nlines", "list": [1, None]}]
    for line in lines:
        log.write(line)
    assert read_log(tmp_path) == lines


def test_every_line_is_plain_json(tmp_path):
    JsonLines(tmp_path, 0).write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})

    def refuse(name):
        raise AssertionError(name)

    line = (tmp_path / LOG).read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": None, "d": 1.5}


def test_a_new_run_forgets_the_old_log_and_a_resumed_one_what_came_later(tmp_path):
    log = JsonLines(tmp_path, 0)
    for step in (0, 10, 20, 30):
        log.write({"step": step})
    assert [line["step"] for line in read_log(tmp_path)] == [0, 10, 20, 30]
    JsonLines(tmp_path, keep_until=20).write({"step": 25})
    assert [line["step"] for line in read_log(tmp_path)] == [0, 10, 20, 25]
    JsonLines(tmp_path, keep_until=0)
    assert read_log(tmp_path) == []


def test_a_line_cut_off_by_a_kill_is_left_out_and_overwritten(tmp_path):
    log = JsonLines(tmp_path, 0)
    log.write({"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1}]
    JsonLines(tmp_path, keep_until=2).write({"step": 3})
    assert read_log(tmp_path) == [{"step": 1}, {"step": 3}]


def test_no_log_is_an_empty_log(tmp_path):
    assert read_log(tmp_path / "missing") == []


def test_a_log_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "run").mkdir()
    log = JsonLines(tmp_path / "run", 0)
    log.path.unlink()
    log.path.parent.rmdir()
    log.path.parent.write_text("a file now")
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl"):
        log.write({"step": 1})


# --- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def replace(stream):
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return replace


def test_without_a_terminal_progress_is_lines(stderr, capsys):
    stderr(io.StringIO())
    progress = Progress(total=100, start=0, images_per_step=8, enabled=True)
    progress.advance()
    values = {"loss": 1.23456, "kd/soft": 0.5, "lr": 1e-3, "weight/kd": 1.0, "images_per_second": 8.0}
    progress.show(values, step=40, total=100)
    progress.close()
    assert capsys.readouterr().out == "step 40/100  loss 1.235  kd/soft 0.5  lr 0.001  images_per_second 8  1:00 left\n"


def test_long_times_have_hours(stderr, capsys):
    stderr(io.StringIO())
    Progress(total=10, start=0, images_per_step=3600, enabled=True).show({"images_per_second": 1.0}, 8, 10)
    assert "2:00:00 left" in capsys.readouterr().out


def test_on_a_terminal_progress_is_a_bar(stderr, capsys):
    out = stderr(Terminal())
    progress = Progress(total=10, start=4, images_per_step=8, enabled=True)
    progress.advance()
    progress.show({"loss": 2.0}, step=5, total=10)
    progress.say("a line above")
    progress.close()
    assert "5/10" in out.getvalue()
    assert "loss=2" in out.getvalue()
    assert capsys.readouterr().out == "a line above\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_without_a_bar_only_what_is_said_is_shown(stderr, stream, capsys):
    out = stderr(stream())
    progress = Progress(total=10, start=0, images_per_step=8, enabled=False)
    progress.advance()
    progress.show({"loss": 2.0}, step=1, total=10)
    progress.say("text")
    progress.close()
    assert out.getvalue() == ""
    assert capsys.readouterr().out == "text\n"


def test_rate_counts_images_since_the_last_call(stderr, monkeypatch):
    stderr(io.StringIO())
    clock = iter([0.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr("kd_hf.text.terminal.time.perf_counter", lambda: next(clock))
    progress = Progress(total=10, start=4, images_per_step=8, enabled=False)
    rates = [progress.rate(6), progress.rate(6), progress.rate(9)]
    assert rates == [8.0, 0.0, 24.0]
