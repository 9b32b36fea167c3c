"""``zorba finetune``, end to end on a tiny Llama; the files that it reads, and its losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zorba.apps.finetune.run import FinetuneTrainer
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.apps.finetune.task import Objective, Row, Text, read_data, score
from zorba.hf import LabelWordLoss
from zorba.optim.own import repeated

from tests.apps.finetune.tiny import ROWS, save_tiny_llama
from tests.command import Result, zorba
from tests.kernels.bits import assert_same_bits

Finetune = Callable[..., Result]
TRAINED = ("--lr", 1e-2, "--eps", 1e-2, "--perturbations", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def finetune(model: Path, tmp_path: Path, threads: None) -> Finetune:
    torch.set_num_threads(1)
    train, dev = tmp_path / "train.jsonl", tmp_path / "dev.csv"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4) + "\n")
    dev.write_text("sentence,label\n" + "".join(f"{r['sentence']},{r['label']}\n" for r in ROWS))
    files = ("--data", train, "--eval-data", dev, "--template", "{sentence} It was")

    def run(out: Path, *options: object, base: Path = model) -> Result:
        words = ("--words", " terrible, great")
        return zorba("finetune", base, *files, *words, "--out", out, *options)

    return run


def assert_same_models(mine: Path, theirs: Path) -> None:
    one, other = (AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (mine, theirs))
    assert one.dtype == torch.bfloat16
    for name, p in one.named_parameters():
        assert_same_bits(p, other.get_parameter(name))


def test_it_learns_to_classify_and_saves_both(
    finetune: Finetune, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "[bold]out"  # shown as it is, no markup of rich
    options = ("--steps", 50, "--batch-size", 8, "--eval-every", 20, "--save", "both", "--seed", 1)
    result = finetune(out, *TRAINED, *options)
    assert result.exit_code == 0, result.output
    for said in ("label positive: ' great'", "accuracy", f"wrote {out}", "trajectory.zot"):
        assert said in result.output, said
    metrics = json.loads((out / "metrics.json").read_text())
    first, *_, last = metrics["evaluations"]
    assert [e["step"] for e in metrics["evaluations"]] == [0, 20, 40, 50]
    assert len(metrics["losses"]) == 50
    assert last["loss"] < 0.8 * first["loss"]
    assert last["accuracy"] >= 0.75
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "model" / "tokenizer.json").is_file()
    # The trajectory leads from the base to the saved model, bit for bit.
    again = zorba("replay", model, out / "trajectory.zot", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert_same_models(out / "model", tmp_path / "again")


def test_it_learns_text_and_saves_a_trajectory_alone(finetune: Finetune, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--words", "", "--steps", 25, "--dtype", "float32", "--save", "trajectory")
    result = finetune(out, *TRAINED, *options)
    assert result.exit_code == 0, result.output
    first, last = json.loads((out / "metrics.json").read_text())["evaluations"]
    assert last["loss"] < first["loss"]
    assert first["accuracy"] is None
    assert {path.name for path in out.iterdir()} == {"loss.png", "metrics.json", "trajectory.zot"}


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
@pytest.mark.parametrize("words", [" terrible, great", ""], ids=["words", "text"])
@pytest.mark.parametrize("placement", ["fused", "scratch"])
def test_own_directions(
    finetune: Finetune, model: Path, tmp_path: Path, words: str, placement: str
) -> None:
    out = tmp_path / "out"
    own = ("--directions", "own", "--examples-per-direction", 2, "--placement", placement)
    # Blocks alone: the head of this model is not tied, and label words read a part of it.
    options = ("--blocks", "last:2", "--words", words, "--steps", 40, "--batch-size", 8)
    result = finetune(out, "--lr", 1e-2, "--eps", 1e-2, *own, *options, "--save", "both")
    assert result.exit_code == 0, result.output
    first, last = json.loads((out / "metrics.json").read_text())["evaluations"]
    assert last["loss"] < first["loss"] - 0.05
    again = zorba("replay", model, out / "trajectory.zot", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert_same_models(out / "model", tmp_path / "again")


def test_an_interrupted_run_leaves_its_trajectory(
    finetune: Finetune, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctrl_c = Mock(side_effect=[None, KeyboardInterrupt])  # at the second evaluation
    monkeypatch.setattr(FinetuneTrainer, "score", ctrl_c)
    result = finetune(tmp_path / "out", "--eval-every", 4, "--save", "trajectory")
    assert result.exit_code == 130, result.output
    assert "zorba finetune: interrupted" in result.output
    replayed = zorba("replay", model, tmp_path / "out" / "trajectory.zot", tmp_path / "again")
    assert "4 steps" in replayed.output
    assert "the run was not finished" in replayed.output


def test_idle_blocks_off_the_device_change_no_bit(finetune: Finetune, tmp_path: Path) -> None:
    for out, more in (("resident", []), ("offloaded", ["--offload", tmp_path / "host"])):
        result = finetune(tmp_path / out, *TRAINED, "--steps", 3, "--blocks", "last:1", *more)
        assert result.exit_code == 0, result.output
    assert not list((tmp_path / "host").iterdir())
    assert_same_models(tmp_path / "resident" / "model", tmp_path / "offloaded" / "model")


REFUSED: dict[str, tuple[list[object], int, str]] = {
    "words that do not fit": (["--words", " a, b, c"], 1, "2 labels (negative, positive) but"),
    "unknown labels": (["--labels", "no,yes"], 1, "row 1 has label 'negative'; expected one of no"),
    "a field that is missing": (["--template", "{text} It was"], 1, "line 1: no text; the row has"),
    "a template without fields": (["--template", "It was {mask}"], 1, "has no field"),
    "blocks that are not there": (["--blocks", "last:9"], 1, "last:9"),
    "one word": (["--words", " good"], 2, "leaves nothing to choose"),
    "an in-place trajectory": (["--placement", "inplace", "--save", "both"], 2, "needs placement"),
    "fused noise of another kind": (
        ["--placement", "fused", "--distribution", "gaussian"],
        2,
        "rank1, not gaussian",
    ),
    "directions of no rows": (
        ["--examples-per-direction", "0"],
        2,
        "examples_per_direction is 0",
    ),
    "offloading nothing": (["--offload", "host"], 1, "give blocks last:N"),
    "a batch of nothing": (["--batch-size", "0"], 2, "batch_size is 0; expected at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, finetune: Finetune, tmp_path: Path) -> None:
    options, code, words = REFUSED[case]
    result = finetune(tmp_path / "out", *options)
    assert result.exit_code == code, result.output
    assert words in result.text
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(finetune: Finetune, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no-model" in finetune(out, base=tmp_path / "no-model").output
    (out / "model").mkdir(parents=True)
    result = finetune(out)
    assert result.exit_code == 1
    assert "give another folder" in result.output
    assert [p.name for p in out.iterdir()] == ["model"]


def rows_of(path: Path, content: str, **settings: Any) -> tuple[list[Row], list[str]]:
    path.write_text(content, encoding="utf-8-sig")  # with a mark at the start, as some write it
    rows, _, labels = read_data(FinetuneSettings("model", path, **settings))
    return rows, labels


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
    with pytest.raises(ValueError, match=words):
        rows_of(tmp_path / name, content)


@pytest.mark.parametrize(
    ("kind", "content", "text"),
    [
        ("csv", 'text,label\n"one, ""two""\nthree",1\n', 'one, "two"\nthree'),
        ("tsv", "text\tlabel\nfour, five\t1\n", "four, five"),
        ("csv", f"text,label\n{'word ' * 50_000},1\n", "word " * 50_000),
        ("jsonl", '{"text": "one\u2028two\x85", "label": "1"}\r\n', "one\u2028two\x85"),
    ],
    ids=["quotes", "tabs", "a long field", "separators of lines in a string"],
)
def test_files_of_other_programs(kind: str, content: str, text: str, tmp_path: Path) -> None:
    assert rows_of(tmp_path / f"a.{kind}", content) == ([{"text": text, "label": "1"}], [])


@pytest.mark.parametrize(("values", "labels"), [((10, 9, "-1"), "-1 9 10"), ("cba", "a b c")])
def test_labels_are_ordered_as_numbers_or_words(
    values: tuple[Any, ...], labels: str, tmp_path: Path
) -> None:
    content = "".join(json.dumps({"text": "", "label": value}) + "\n" for value in values)
    rows, found = rows_of(tmp_path / "a.jsonl", content, words=(" x", " y", " z"))
    assert found == labels.split()
    assert [row["label"] for row in rows] == [2, 1, 0]


# --- Losses ---------------------------------------------------------------------------------------

LONG = [{"sentence": row["sentence"], "label": int(row["label"] == "positive")} for row in ROWS]
WORDS = {"words": [" terrible", " great"], "words of two tokens": [" bad film", " great"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Text(model, AutoTokenizer.from_pretrained(folder), "{sentence}", 32)


@pytest.fixture(params=[*WORDS, "text"])
def objective(request: pytest.FixtureRequest, text: Text) -> Objective:
    if request.param == "text":
        return text
    template, words = "{sentence} It was", WORDS[request.param]
    return LabelWordLoss(text.model, text.tokenizer, template, words, max_length=32)


@torch.no_grad()
def test_losses_are_those_of_the_rows_alone(objective: Objective) -> None:
    losses = objective.losses(objective.encode(LONG))
    alone = [objective(objective.encode([row])) for row in LONG]
    assert losses.dtype == torch.float32
    assert len(set(losses.tolist())) > 4
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-5, atol=1e-6)
    if isinstance(objective, Text):  # its loss is a mean over tokens
        losses = objective.losses(objective.encode(LONG), by_tokens=True)
    mean = objective(objective.encode(LONG))
    torch.testing.assert_close(losses.mean(), mean, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_that_are_there_twice_have_the_same_losses(objective: Objective) -> None:
    batch = objective.encode(LONG)
    once = objective.losses(batch)
    twice = objective.losses(repeated(batch, 2))
    torch.testing.assert_close(twice, torch.cat([once, once]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_score_is_that_of_one_batch_however_it_is_cut(objective: Objective) -> None:
    rows = [*LONG[:5], {"sentence": "a fine film", "label": 1}]
    whole = float(objective(objective.encode(rows)))
    accuracy = None
    if isinstance(objective, LabelWordLoss):
        said = objective.predict(objective.encode(rows)).tolist()
        accuracy = sum(a == row["label"] for a, row in zip(said, rows, strict=True)) / len(rows)
    for size in (1, 4, 6):
        found = score(objective, rows, size)
        assert found == {"loss": pytest.approx(whole, rel=1e-5), "accuracy": accuracy}


@torch.no_grad()
def test_row_with_nothing_to_learn_loses_nothing(text: Text) -> None:
    losses = text.losses(text.encode([{"sentence": "a"}, {"sentence": "a film"}]))
    assert losses[0] == 0 < losses[1]
    with pytest.raises(ValueError, match="no row of a batch has two tokens"):
        text.encode([{"sentence": "a"}])
