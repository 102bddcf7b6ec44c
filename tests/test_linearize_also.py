"""What identifies a row: the same row is known again in another comparison."""

from pathlib import Path

from linearize import LinearizeConfig, convert
from linearize.also import row_identities
from tests.tiny_models import make_model


def put(folder: Path, file: str, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / file).write_text(text)
    return folder


def test_rows_of_another_run_are_known_again(tmp_path: Path):
    """A control does not depend on the student that it stands beside; a student as another's row is that student."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, window in zip(runs, (8, 16)):
        put(run / "student", "linearize.json", f"window {window}")
        put(run / "control", "adapter_config.json", "the same")
        put(run / "window", "adapter_config.json", "the same")
    names = ["original", "control", "window + sinks, trained", "student"]
    one, two = (
        row_identities(
            names,
            convert(make_model("llama"), LinearizeConfig(window=window)),
            "original",
            str(run / "student"),
            run,
            [],
        )
        for run, window in zip(runs, (8, 16))
    )
    assert one["control"] == two["control"]
    assert one["window + sinks, trained"] != two["window + sinks, trained"]
    assert one["student"] != two["student"]
    also = [f"first={runs[0] / 'student'}", f"its control={runs[0] / 'control'}"]
    model = convert(make_model("llama"), LinearizeConfig(window=16))
    seen = row_identities(["student", "first", "its control"], model, "original", str(runs[1] / "student"), None, also)
    assert seen == {"student": two["student"], "first": one["student"], "its control": one["control"]}
