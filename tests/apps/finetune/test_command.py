"""``zorba finetune``, end to end on a tiny Llama and files of both kinds."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from zorba.apps.finetune.data import fields_of, index_labels, read_rows, values_of

from tests.apps.finetune.tiny import ROWS, save_tiny_llama
from tests.command import Result, zorba


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    train, dev = tmp_path / "train.jsonl", tmp_path / "dev.csv"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4) + "\n")
    with dev.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    return train, dev


def classify(model: Path, files: tuple[Path, Path], out: Path, *more: object) -> Result:
    train, dev = files
    return zorba(
        "finetune", model, "--data", train, "--eval-data", dev, "--template", "{sentence} It was",
        "--words", " terrible, great", "--out", out, "--seed", 1, *more,
    )  # fmt: skip


def test_it_learns_to_classify_and_saves_both(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "[bold]out"  # shown as it is, no markup of rich
    result = classify(
        model, files, out, "--steps", 50, "--lr", 1e-2, "--eps", 1e-2, "--perturbations", 4,
        "--batch-size", 8, "--eval-every", 20, "--save", "both",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for said in (
        "negative = ' terrible', positive = ' great'",
        "accuracy",
        "trajectory",
        f"wrote {out}",
    ):
        assert said in result.output, said
    metrics = json.loads((out / "metrics.json").read_text())
    assert [e["step"] for e in metrics["evaluations"]] == [0, 20, 40, 50]
    assert len(metrics["losses"]) == 50
    assert metrics["evaluations"][-1]["loss"] < 0.8 * metrics["evaluations"][0]["loss"]
    assert metrics["evaluations"][-1]["accuracy"] >= 0.75
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    trained = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert trained.dtype == torch.bfloat16
    assert (out / "model" / "tokenizer.json").is_file()
    # The trajectory leads from the base to the saved model, bit for bit.
    again = zorba("replay", model, out / "trajectory.zot", tmp_path / "again")
    assert again.exit_code == 0, again.output
    replayed = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    for name, p in trained.named_parameters():
        assert torch.equal(p.view(torch.int16), replayed.get_parameter(name).view(torch.int16))


def test_it_learns_text_and_saves_a_trajectory_alone(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = zorba(
        "finetune", model, "--data", files[0], "--eval-data", files[1], "--template", "{sentence}",
        "--steps", 25, "--lr", 1e-2, "--eps", 1e-2, "--perturbations", 4, "--dtype", "float32",
        "--out", out, "--save", "trajectory",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    first, last = metrics["evaluations"]
    assert last["loss"] < first["loss"]
    assert first["accuracy"] is None
    assert not (out / "model").exists()
    assert (out / "trajectory.zot").stat().st_size == metrics["trajectory_bytes"]


def test_an_interrupted_run_leaves_its_trajectory(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    log = tmp_path / "out" / "trajectory.zot"

    def press_ctrl_c() -> None:
        header = 0
        while not header or log.stat().st_size < header + 100:  # until steps are in it
            time.sleep(0.01)
            header = header or (log.exists() and log.stat().st_size)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c, daemon=True)
    thread.start()
    result = classify(model, files, log.parent, "--steps", 10**6, "--save", "trajectory")
    thread.join()
    assert result.exit_code == 130, result.output
    assert "zorba finetune: interrupted" in result.output
    replayed = zorba("replay", model, log, tmp_path / "again")
    assert replayed.exit_code == 0, replayed.output
    assert "the run was not finished" in replayed.output


def test_idle_blocks_off_the_device_change_no_bit(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    options = ["--steps", 3, "--lr", 1e-2, "--eps", 1e-2, "--blocks", "last:1"]
    for out, more in (("resident", []), ("offloaded", ["--offload", tmp_path / "host"])):
        result = classify(model, files, tmp_path / out, *options, *more)
        assert result.exit_code == 0, result.output
    assert not list((tmp_path / "host").iterdir())
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / out / "model", dtype="auto")
        for out in ("resident", "offloaded")
    )
    for name, p in mine.named_parameters():
        assert torch.equal(p.view(torch.int16), theirs.get_parameter(name).view(torch.int16))


REFUSED: dict[str, tuple[list[object], int, str]] = {
    "words that do not fit": (["--words", " a, b, c"], 1, "2 labels (negative, positive) but"),
    "unknown labels": (["--labels", "no,yes"], 1, "row 1 has label 'negative'; expected one of no"),
    "a field that is missing": (["--template", "{text} It was"], 1, "line 1: no text; the row has"),
    "a template without fields": (["--template", "It was"], 1, "has no field"),
    "blocks that are not there": (["--blocks", "last:9"], 1, "last:9"),
    "a model": ([], 1, "nothing-here"),
    "one word": (["--words", " good"], 2, "leaves nothing to choose"),
    "an in-place trajectory": (
        ["--placement", "inplace", "--save", "trajectory"],
        2,
        "needs placement scratch",
    ),
    "offloading nothing": (["--offload", "host"], 1, "give blocks last:N"),
    "a batch of nothing": (["--batch-size", "0"], 2, "batch_size is 0; expected at least 1"),
    "a kind of saving": (["--save", "all"], 2, "('model', 'trajectory', 'both')"),
    "a dtype": (["--dtype", "int8"], 2, "('auto', 'float32',"),
    "a distribution": (["--distribution", "cauchy"], 2, "rademacher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    """In one sentence that says what was wrong; nothing is written."""
    options, code, words = REFUSED[case]
    out = tmp_path / "out"
    base = tmp_path / "nothing-here" if case == "a model" else model
    result = classify(base, files, out, "--steps", 1, *options)
    assert result.exit_code == code, result.output
    assert words in result.text
    assert not out.exists()


def test_a_folder_in_use_is_left_alone(
    model: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    result = classify(model, files, out, "--steps", 1)
    assert result.exit_code == 1
    assert "give another folder" in result.output
    assert [p.name for p in out.iterdir()] == ["model"]


# --- Data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": 1}\nnot json\n', "line 2"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "label\n1\n", "line 2: no text"),
        ("a.xlsx", "", "expected .jsonl, .csv or .tsv"),
    ],
)
def test_bad_files(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_rows(tmp_path / name, ["text"])


def test_tables_with_quotes_and_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""\nthree",1\n')
    (tmp_path / "a.tsv").write_text("text\tlabel\nfour, five\t0\n")
    assert read_rows(tmp_path / "a.csv", ["text"]) == [{"text": 'one, "two"\nthree', "label": "1"}]
    assert read_rows(tmp_path / "a.tsv", ["text"]) == [{"text": "four, five", "label": "0"}]


def test_files_as_other_programs_write_them(tmp_path: Path) -> None:
    """Separators of lines inside of strings, a mark at the start, and a long field."""
    text = "one\u2028two\u0085three"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n")
    assert read_rows(tmp_path / "a.jsonl", ["text"]) == [{"text": text}]
    long = "word " * 50_000
    (tmp_path / "a.csv").write_text(f"text\n{long}\n", encoding="utf-8-sig")
    assert read_rows(tmp_path / "a.csv", ["text"]) == [{"text": long}]


def test_labels_are_ordered_as_numbers_or_words() -> None:
    rows: list[dict[str, Any]] = [{"label": value} for value in (10, 9, "-1", 10)]
    assert values_of(rows, "label") == ["-1", "9", "10"]
    assert [r["label"] for r in index_labels(rows, "label", ["-1", "9", "10"])] == [2, 1, 0, 2]
    assert values_of([{"label": "b"}, {"label": "a"}], "label") == ["a", "b"]


def test_fields_of_a_template() -> None:
    assert fields_of("{a} and {b}: {a} {mask}") == ["a", "b"]
