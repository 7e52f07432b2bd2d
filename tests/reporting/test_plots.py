"""Run directory in, PNGs out."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt2x.errors import UserError
from gpt2x.reporting import column, read_metrics, write_plots
from gpt2x.reporting.plots import PLOTS, draw, smooth


def write_metrics(run_dir: Path, metrics: list[dict[str, float]], torn: bytes = b"") -> Path:
    run_dir.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in metrics)
    (run_dir / "metrics.jsonl").write_bytes(lines.encode() + torn)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    metrics = []
    for step in range(1, 61):
        record = {
            "step": step,
            "train/loss": 8 / step + 3,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 2e4,
        }
        if step % 20 == 0:
            record |= {"val/loss": 8 / step + 3.1, "val/bits_per_byte": 1.5, "val/token_accuracy": 0.3}
        metrics.append(record)
    return write_metrics(tmp_path / "quickstart", metrics)


def test_a_column_holds_the_steps_that_know_its_key(run_dir):
    steps, values = column(read_metrics(run_dir), "val/loss")
    assert steps.tolist() == [20, 40, 60]
    np.testing.assert_allclose(values, [3.5, 3.3, 8 / 60 + 3.1])


def test_a_column_of_an_unknown_key_is_empty(run_dir):
    steps, values = column(read_metrics(run_dir), "val/hellaswag")
    assert steps.size == values.size == 0


def test_a_column_takes_the_later_record_of_a_step_that_was_run_twice(tmp_path):
    metrics = [{"step": 1, "train/loss": 5}, {"step": 2, "train/loss": 9}, {"step": 2, "train/loss": 4}]
    steps, values = column(read_metrics(write_metrics(tmp_path, metrics)), "train/loss")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [5, 4]


def test_a_column_joins_records_of_one_step_that_know_different_keys(tmp_path):
    metrics = [{"step": 1, "train/loss": 5}, {"step": 1, "val/loss": 6}]
    records = read_metrics(write_metrics(tmp_path, metrics))
    assert column(records, "train/loss")[1].tolist() == [5]
    assert column(records, "val/loss")[1].tolist() == [6]


@pytest.mark.parametrize("torn", [b'{"step": 2, "train/l', '{"step": 2, "é'.encode()[:-1]])
def test_a_torn_last_line_is_ignored_with_a_warning(tmp_path, caplog, torn):
    write_metrics(tmp_path, [{"step": 1, "train/loss": 5}], torn=torn)
    with caplog.at_level(logging.WARNING):
        assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 5}]
    (message,) = caplog.messages
    assert message.startswith(f"passed over a damaged record: {tmp_path / 'metrics.jsonl'}:2 is no JSON (EOF while")


def test_damaged_lines_are_passed_over_and_their_number_is_told(tmp_path, caplog):
    lines = ['{"step": 1}', '{"step": ', '[["deep"]]', '{"step": "2"}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
    assert caplog.messages[0].endswith(", and 2 more")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_of_records_is_refused_in_a_line(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl (is no regular file|cannot be read).*; give the"):
        read_metrics(tmp_path)


def test_a_value_that_is_no_number_is_left_out_of_a_curve():
    values = [1, "2", None, [3], 10**400, 4.5]
    metrics = [{"step": step, "train/loss": value} for step, value in enumerate(values)]
    assert [part.tolist() for part in column(metrics, "train/loss")] == [[0, 5], [1.0, 4.5]]


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist; give the directory of a run, runs/NAME\."):
        write_plots(tmp_path)


def test_every_plot_is_a_png_of_the_same_size_and_nothing_is_left_beside_it(run_dir):
    files = write_plots(run_dir)
    assert sorted(file.stem for file in files) == sorted(plot.name for plot in PLOTS)
    assert sorted(run_dir.joinpath("plots").iterdir()) == sorted(files)
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size) == ("PNG", (1200, 675))


def test_a_plot_without_records_is_left_out(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "train/loss": 5.0}])
    assert [file.name for file in write_plots(tmp_path)] == ["loss.png"]


def test_plots_are_replaced_by_newer_ones(run_dir):
    before = write_plots(run_dir)[0].read_bytes()
    write_metrics(run_dir, [{"step": 1, "train/loss": 5.0}])
    assert write_plots(run_dir)[0].read_bytes() != before


def test_the_loss_plot_shows_raw_smoothed_and_validation_loss_over_labelled_axes(run_dir):
    axes = draw(PLOTS[0], read_metrics(run_dir), "quickstart").axes[0]
    raw, smoothed, validation = axes.lines
    assert raw.get_alpha() < 1
    assert raw.get_ydata()[9] == pytest.approx(3.8)
    assert smoothed.get_label().startswith("training, smoothed (last 3.")
    assert validation.get_label() == "validation (last 3.233)"
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "cross-entropy (nats per token)"
    assert axes.get_title("right") == "quickstart"


def test_the_validation_plots_show_the_sources_of_a_mixture_beside_the_whole(tmp_path):
    metrics = []
    for step in (20, 40, 60):
        record = {"step": step, "train/loss": 8 / step + 3}
        for number, name in enumerate(("", "web/", "chat/en/")):
            record |= {f"val/{name}loss": 4.0 + number, f"val/{name}token_accuracy": 0.3 + number / 10}
        metrics.append(record)
    records = read_metrics(write_metrics(tmp_path / "mixture", metrics))
    plots = {plot.name: plot for plot in PLOTS}
    labels = {
        name: [line.get_label() for line in draw(plots[name], records, "mixture").axes[0].lines]
        for name in ("loss", "token_accuracy")
    }
    assert labels["loss"][2:] == ["validation (last 4)", "web (last 5)", "chat/en (last 6)"]
    assert labels["token_accuracy"] == ["validation (last 30.0%)", "web (last 40.0%)", "chat/en (last 50.0%)"]
    lines = draw(plots["loss"], records, "mixture").axes[0].lines
    assert len({line.get_color() for line in lines[1:]}) == 4


def test_smoothing_follows_a_level_and_passes_over_what_is_not_finite():
    values = np.full(100, 4.0)
    values[[0, 50]] = np.nan, np.inf
    smoothed = smooth(values)
    assert np.isnan(smoothed[0])
    np.testing.assert_allclose(smoothed[1:], 4.0)


def test_smoothing_narrows_noise_without_lagging_behind_a_steep_start():
    steps = np.arange(1, 1001)
    level = 3 + 8 / np.sqrt(steps)
    noise = np.random.default_rng(0).normal(0, 0.1, len(steps))
    distance = smooth(level + noise) - level
    assert np.std(distance[200:]) < 0.25 * np.std(noise)
    assert np.abs(distance[20:]).max() < 0.25


def test_reporting_imports_neither_torch_nor_transformers():
    code = "import sys, gpt2x.reporting; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
