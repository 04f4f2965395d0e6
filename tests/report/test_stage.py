from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console as RichConsole

from medtrain.console import Console
from medtrain.errors import DataError
from medtrain.files import read_json, write_json, write_jsonl
from medtrain.report.schema import Document
from medtrain.report.screen import screen_of
from medtrain.report.stage import report
from medtrain.run import Run
from tests.report.finished_run import (
    STAND_IN,
    VARIANTS,
    make_config,
    make_rows,
    make_run,
    make_scores,
    write_rows,
)

QUIET = Console(quiet=True)


def contents(run: Run) -> dict[str, bytes]:
    files = (path for path in run.report.rglob("*") if path.is_file())
    return {path.relative_to(run.report).as_posix(): path.read_bytes() for path in files}


def change_scores(run: Run, change: Any) -> None:
    scores = read_json(run.scores)
    change(scores)
    write_json(run.scores, scores)


def test_the_report_has_all_its_files(reported: Run) -> None:
    names = set(contents(reported))
    assert {"index.html", "report.json", "report.md", "MODEL_CARD.md"} <= names
    figures = {name for name in names if name.startswith("figures/")}
    assert {
        "figures/measure-token_f1.svg",
        "figures/pairwise.svg",
        "figures/lengths.svg",
        "figures/sft-loss.svg",
        "figures/dpo-margin.svg",
    } <= figures
    assert not [name for name in names if ".tmp-" in name]


def test_the_same_run_elsewhere_and_at_another_time_gives_the_same_bytes(
    reported: Run, tmp_path: Path
) -> None:
    copy = Run(tmp_path / "copied" / "demo")
    shutil.copytree(reported.root, copy.root)
    for receipt in copy.stages.glob("*.json"):
        write_json(receipt, {**read_json(receipt), "seconds": 99.0, "finished_at": "later"})
    report(copy, make_config(), QUIET)
    assert contents(copy) == contents(reported)


def test_no_directory_of_this_machine_is_in_the_report(reported: Run) -> None:
    for name, data in contents(reported).items():
        assert b"/home/someone" not in data, name
        assert str(reported.root).encode() not in data, name


def test_report_json_is_valid_and_has_the_documented_keys(reported: Run) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (reported.report / "report.json").read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert list(document) == list(Document.model_fields)
    assert Document.model_validate(document)
    f1 = next(m for m in document["measures"] if m["key"] == "token_f1")
    assert set(f1["values"]) == set(VARIANTS)
    assert f1["values"]["base"]["delta"] is None
    assert f1["values"]["sft"]["delta"] == pytest.approx(
        f1["values"]["sft"]["value"] - f1["values"]["base"]["value"]
    )
    assert not f1["judged"]
    judged = [m for m in document["measures"] if m["judged"]]
    assert judged
    assert all(m["stand_in"] for m in judged)
    assert all(pair["stand_in"] for pair in document["pairwise"])


def test_figures_that_depend_on_the_clock_stay_out(reported: Run) -> None:
    stages = read_json(reported.report / "report.json")["lineage"]["stages"]
    counts = {stage["name"]: stage["counts"] for stage in stages}
    assert next(iter(counts)) == "prepare"
    assert "report" not in counts
    assert counts["prepare"]["train"] == 118
    assert "seconds" not in counts["prepare"]
    assert "tokens_per_s" not in counts["sft"]
    assert counts["judge"]["verdicts.tie"] == 4


def test_every_figure_is_xml_with_a_title_and_loads_nothing(reported: Run) -> None:
    for path in (reported.report / "figures").iterdir():
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert root.get("aria-label"), path
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http" not in text
        assert "url(" not in text


def test_markdown_marks_every_judged_number(reported: Run) -> None:
    text = (reported.report / "report.md").read_text(encoding="utf-8")
    for label in ("Correctness", "Clarity", "Safety", "Empathy", "Mean of the four", "Rating"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
        assert row.count("(stand-in)") == len(VARIANTS)
    row = next(line for line in text.splitlines() if line.startswith("| dpo against sft"))
    assert row.count("(stand-in)") == 6
    assert STAND_IN in text
    assert "no judge of medicine" in text or "not a judge of medicine" in text


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=8)
    change_scores(
        run, lambda s: s["skipped"].append({"metric": "a|b", "reason": "not | here\n| at all"})
    )
    report(run, make_config(report={"title": "A | title *with* <b>marks</b>"}), QUIET)
    for name in ("report.md", "MODEL_CARD.md"):
        text = (run.report / name).read_text(encoding="utf-8")
        assert "not \\| here \\| at all" in text
        assert "# A \\| title \\*with\\* &lt;b&gt;marks" in text
        widths = 0
        for line in text.splitlines():
            columns = line.replace("\\|", "").count("|")
            if not line.startswith("|"):
                widths = 0
            elif not widths:
                widths = columns
            assert not line.startswith("|") or columns == widths, line


def test_the_model_card_opens_with_metadata_and_states_its_limits(reported: Run) -> None:
    text = (reported.report / "MODEL_CARD.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "someone/TinyBase-1M"
    assert metadata["datasets"] == ["lavita/MedQuAD"]
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"qlora", "sft", "dpo"} <= set(metadata["tags"])
    for wanted in ("Not medical advice", "stand-in", "| learning rate |", "| beta |", "Held-out"):
        assert wanted in body


@pytest.mark.parametrize(
    ("method", "name", "tag", "unread"),
    [
        ("orpo", "odds ratio preference optimisation", "orpo", ("loss type", "label smoothing")),
        ("kto", "Kahneman-Tversky optimisation", "kto", ("loss type",)),
        ("rejection", "fine-tuning on the judge's best answers", "rejection-sampling", ("beta",)),
    ],
)
def test_the_model_card_says_how_preferences_were_learnt(
    tmp_path: Path, method: str, name: str, tag: str, unread: tuple[str, ...]
) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    report(run, make_config(dpo={"method": method}), QUIET)
    _, front, body = (run.report / "MODEL_CARD.md").read_text(encoding="utf-8").split("---\n", 2)
    assert f"supervised fine-tuning and {name} (QLoRA)" in body
    assert f"| {method} |" in body
    assert "direct preference" not in body
    assert tag in yaml.safe_load(front)["tags"]
    assert "dpo" not in yaml.safe_load(front)["tags"]
    assert not [setting for setting in unread if f"| {setting} |" in body]


def test_a_local_base_is_not_claimed_to_be_on_the_hub(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    report(run, make_config(model={"base": "/home/someone/models/private"}), QUIET)
    card = (run.report / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "base_model" not in card
    assert "private" in card
    assert "/home/someone" not in card


def test_a_worse_dpo_is_called_worse(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=12)

    def spoil(scores: dict[str, Any]) -> None:
        _, sft, dpo = scores["variants"]
        for key, metric in dpo["metrics"].items():
            factor = 0.9 if metric["higher_is_better"] else 1.1
            metric["value"] = sft["metrics"][key]["value"] * factor

    change_scores(run, spoil)
    report(run, make_config(), QUIET)
    step = read_json(run.report / "report.json")["summary"][1]
    assert step["verdict"] == "worse"
    assert step["headline"] == "dpo is worse than sft."
    assert not step["better"]
    assert "dpo is worse than sft." in (run.report / "index.html").read_text(encoding="utf-8")


def test_differences_that_do_not_show_are_no_improvement(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=12)

    def level(scores: dict[str, Any]) -> None:
        base, sft, _ = scores["variants"]
        for key, metric in base["metrics"].items():
            sft["metrics"][key] = {**metric, "value": metric["value"] + 1e-9}

    change_scores(run, level)
    report(run, make_config(), QUIET)
    assert read_json(run.report / "report.json")["summary"][0]["verdict"] == "same"


def test_a_real_judge_gets_no_stand_in_label(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=14)
    change_scores(
        run, lambda s: s.update(judge={"kind": "openai", "label": "gpt-4o-mini", "stand_in": False})
    )
    receipt = read_json(run.stages / "judge.json")
    receipt["counts"] |= {"judge": "gpt-4o-mini", "stand_in": False}
    write_json(run.stages / "judge.json", receipt)
    report(run, make_config(judge={"kind": "openai"}), QUIET)
    for name in ("report.md", "MODEL_CARD.md"):
        assert "stand-in" not in (run.report / name).read_text(encoding="utf-8")
    page = (run.report / "index.html").read_text(encoding="utf-8")
    assert 'class="badge"' not in page.split("<script", 1)[0]
    assert "gpt-4o-mini" in page


def test_a_stand_in_that_only_chose_the_pairs_is_named_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=6, judge=False)
    report(run, make_config(), QUIET)
    page = (run.report / "index.html").read_text(encoding="utf-8")
    assert 'class="banner"' in page
    stages = page.split('id="lineage"', 1)[1]
    assert re.search(r'kept <b>21</b>\s*<abbr class="badge"', stages)
    card = (run.report / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "its verdicts chose the preference pairs" in card


def test_an_evaluation_alone_is_enough(tmp_path: Path) -> None:
    run = Run(tmp_path / "bare")
    run.create()
    scores = make_scores(make_rows(5, judge=False), judge=False)
    for variant in scores["variants"]:
        variant["decisions"] = None
    scores["variants"] = scores["variants"][:1]
    write_json(run.scores, scores)
    report(run, make_config(), QUIET)
    page = (run.report / "index.html").read_text(encoding="utf-8")
    for absent in ('id="summary"', 'id="training"', 'id="questions"', 'id="data"', "report-data"):
        assert absent not in page
    assert 'id="scores"' in page
    assert "stand-in" not in (run.report / "report.md").read_text(encoding="utf-8")
    assert "## Training" not in (run.report / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_log_with_gaps_and_a_torn_end_still_draws(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    run.metrics("sft").write_text(
        '{"step": 1, "kind": "train", "loss": 3.5}\n'
        '{"step": 2, "kind": "train", "loss": NaN}\n'
        '{"step": 2, "kind": "train", "loss": 3.1}\n'
        '{"step": 3, "kind": "eval", "loss": 3.0}\n'
        '{"step": 4, "kind": "tr',
        encoding="utf-8",
    )
    report(run, make_config(), QUIET)
    curves = read_json(run.report / "report.json")["training"]["sft"]
    assert [point["loss"] for point in curves["train"]] == [3.5, 3.1]
    assert [point["step"] for point in curves["eval"]] == [3]


def test_intervals_are_shown_where_they_are_given(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    change_scores(
        run,
        lambda s: s["variants"][1]["metrics"]["token_f1"].update(interval=[0.301, 0.402]),
    )
    report(run, make_config(), QUIET)
    assert "[0.301, 0.402]" in (run.report / "index.html").read_text(encoding="utf-8")
    assert "[0.301, 0.402]" in (run.report / "report.md").read_text(encoding="utf-8").replace(
        "\\", ""
    )
    figure = (run.report / "figures" / "measure-token_f1.svg").read_text(encoding="utf-8")
    assert 'class="whisker"' in figure


@pytest.mark.parametrize(("limit", "shown"), [(0, 0), (5, 5), (500, 40)])
def test_max_examples(tmp_path: Path, limit: int, shown: int) -> None:
    run = make_run(tmp_path / "demo")
    counts = report(run, make_config(report={"max_examples": limit}), QUIET)
    assert counts["questions_shown"] == shown


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    report(run, make_config(), QUIET)
    (run.report / "figures" / "left-over.svg").write_text("old", encoding="utf-8")
    (run.root / ".tmp-report" / "half").mkdir(parents=True)
    report(run, make_config(), QUIET)
    assert not (run.report / "figures" / "left-over.svg").exists()
    assert [p.name for p in run.root.iterdir() if p.name.startswith(".tmp")] == []


def test_without_an_evaluation_there_is_one_clear_message(tmp_path: Path) -> None:
    run = Run(tmp_path / "demo")
    run.create()
    with pytest.raises(DataError, match="nothing to report on") as caught:
        report(run, make_config(), QUIET)
    assert "evaluate" in caught.value.fix


def test_scores_of_another_shape_are_a_data_error_and_keep_the_old_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    report(run, make_config(), QUIET)
    before = contents(run)
    write_json(run.scores, {"variants": [{"name": "base"}]})
    with pytest.raises(DataError, match="expected form"):
        report(run, make_config(), QUIET)
    assert contents(run) == before


def test_the_terminal_shows_a_table_and_where_the_page_is(reported: Run) -> None:
    document = Document.model_validate(read_json(reported.report / "report.json"))
    screen = RichConsole(file=io.StringIO(), width=100)
    screen.print(screen_of(document, reported.report / "index.html"))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "Token F1" in text
    assert STAND_IN in text
    assert "index.html" in text
    row = next(line for line in text.splitlines() if line.startswith("Safety"))
    assert row.count("*") == len(VARIANTS)


def test_the_data_section_accounts_for_sources_licences_and_drops(reported: Run) -> None:
    data = read_json(reported.report / "report.json")["data"]
    hub, local = data["sources"]
    assert (hub["path"], hub["commit"], hub["license"]) == ("lavita/MedQuAD", "a" * 40, "CC BY 4.0")
    assert (local["path"], local["files"]) == ("pqal.json.xz", {"pqal.json.xz": "b" * 64})
    assert hub["not_used"] == {"empty answer": 2, "duplicates": 5, "near_duplicates": 3}
    assert data["splits"]["train"] == 118
    page = (reported.report / "index.html").read_text(encoding="utf-8")
    assert "MIT | &lt;b&gt;see&lt;/b&gt; file" in page
    for name in ("report.md", "MODEL_CARD.md"):
        text = (reported.report / name).read_text(encoding="utf-8")
        assert "MIT \\| &lt;b&gt;see&lt;/b&gt; file" in text
        assert "empty answer 4" in text


def test_questions_an_engine_failed_on_are_shown_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    rows = make_rows(4)
    rows[0]["variants"]["sft"] = {"error": "HTTP 500", "metrics": {}}
    write_rows(run, rows)
    change_scores(run, lambda s: s["variants"][1]["answers"].update(failed=1))
    report(run, make_config(), QUIET)
    page = (run.report / "index.html").read_text(encoding="utf-8")
    assert "sft has no answer to 1 question" in page


def test_a_long_log_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=4)
    lines = ({"step": n, "kind": "train", "loss": 3 - n / 9000} for n in range(1, 9002))
    write_jsonl(run.metrics("sft"), lines)
    report(run, make_config(), QUIET)
    train = read_json(run.report / "report.json")["training"]["sft"]["train"]
    assert 1000 < len(train) <= 2000
    assert train[-1]["step"] == 9001
    assert (run.report / "figures" / "sft-loss.svg").stat().st_size < 20_000
