"""What a command needs: the lists that stand for libraries which are not imported to be asked."""

import configparser
import re
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from gpt2x import prerequisites
from gpt2x.errors import UserError
from gpt2x.prerequisites import TRACKERS, check_chat_template, check_trackers

ROOT = Path(__file__).parents[1]


def test_the_trackers_are_those_of_accelerate():
    assert set(TRACKERS) == {str(name) for name in LOGGER_TYPE_TO_CLASS}


def test_a_tracker_that_is_installed_under_one_of_its_names_is_taken(monkeypatch):
    monkeypatch.setattr(prerequisites, "_is_installed", lambda name: name == "tensorboardX")
    check_trackers(["tensorboard", "all"])
    with pytest.raises(
        UserError, match=r"^run.report_to \(comet_ml\) is not installed; run `.* -m pip install comet_ml`"
    ):
        check_trackers(["tensorboard", "comet_ml"])


def test_the_libraries_of_an_extra_are_those_that_are_asked_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra, modules in prerequisites._EXTRAS.items():
        listed = re.findall(r"^[\w-]+", setup["options.extras_require"][extra], re.MULTILINE)
        assert set(modules) <= {name.replace("-", "_") for name in listed}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "x"),
        ("chat_template.json", "{}"),
        ("additional_chat_templates/tools.jinja", "x"),
        ("tokenizer_config.json", '{"chat_template": "x"}'),
    ],
)
def test_a_chat_template_is_found_wherever_transformers_looks(tmp_path, file, content):
    with pytest.raises(
        UserError, match=r"^my/model has no chat template; fine-tune it by scripts/finetune.py, or leav"
    ):
        check_chat_template(str(tmp_path), name="my/model")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    check_chat_template(str(tmp_path), name="my/model")
