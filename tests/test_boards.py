"""TensorBoard: what it shows, and that it ends no run."""

import builtins
import shutil
import threading

import pytest
from script_runs import MLP

from startsparse.boards import Boards


def shown(folder):
    """name -> steps of the scalars in a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_numbers_are_shown(tmp_path):
    boards = Boards(tmp_path)
    for step in (1, 2):
        boards.show("", {"epoch": step, "loss": 0.5, "phase": "a", "none": float("nan")}, step)
    boards.show("levels", {"kept": 3}, 7)
    boards.close()
    assert shown(tmp_path) == {"loss": [1, 2]}
    assert shown(tmp_path / "levels") == {"kept": [7]}


@pytest.mark.filterwarnings("error")  # of a thread that has failed
@pytest.mark.parametrize("fault", ["not there", "broken", "deleted", "full", "below a file"])
def test_a_failure_is_one_line(fault, tmp_path, caplog, monkeypatch, capfd):
    folder = tmp_path / "tensorboard"
    if fault in ("not there", "broken"):
        error = ImportError("No module\nnamed x") if fault == "not there" else TypeError("x")
        original = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name == "torch.utils.tensorboard":
                raise error
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
    elif fault == "below a file":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "tensorboard"
    boards = Boards(folder)
    if fault in ("deleted", "full"):
        boards.show("", {"loss": 1.0}, 1)
        (events,) = folder.iterdir()
        shutil.rmtree(folder) if fault == "deleted" else events.unlink()
        if fault == "full":
            events.symlink_to("/dev/full")
    for step in range(2, 5):
        boards.show("", {f"loss{i}": 1.0 for i in range(50)}, step)
    boards.close()
    (line,) = caplog.messages
    assert line.startswith("warning: TensorBoard shows nothing more of this run (")
    assert line.isprintable()
    assert "Traceback" not in capfd.readouterr().err


def test_threads_of_others_still_say_what_they_raise(tmp_path):
    before, seen = threading.excepthook, []
    threading.excepthook = seen.append
    try:
        boards = Boards(tmp_path)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        boards.close()
        assert [raised.exc_type for raised in seen] == [ZeroDivisionError]
        assert threading.excepthook == seen.append
    finally:
        threading.excepthook = before


def test_a_run_without_tensorboard_has_its_result(run, few_images, monkeypatch, caplog):
    def missing(*_args, **_kwargs):
        raise ImportError("No module named 'tensorboard'")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", missing)
    folder = run(*MLP)
    assert (folder / "summary.json").exists()
    lines = [line for line in caplog.messages if "TensorBoard" in line]
    assert lines == [
        "warning: TensorBoard shows nothing more of this run (No module named 'tensorboard')"
    ]
