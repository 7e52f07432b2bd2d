"""scripts/push_to_hub.py: the address where it worked, one line without a traceback where it did not."""

import importlib.util
from pathlib import Path

import pytest

from gpt2x.command_line import parse_recipe
from gpt2x.config import PushRecipe
from gpt2x.errors import UserError
from gpt2x.publishing import hub

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "push_to_hub.py"


def recipe(*argv):
    return parse_recipe(PushRecipe, list(argv), script="push_to_hub.py", positional="model")[0]


def test_its_options_reach_the_upload(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(hub, "push_run", lambda *arguments: calls.append(arguments) or "https://the.hub/user/name")
    spec = importlib.util.spec_from_file_location("push_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(recipe("runs/x", "--repo_id", "user/name", "--public", "true", "--license", "mit", "--time_limit_s=9"))
    push = hub.Push(repo_id="user/name", is_public=True, license="mit", time_limit_s=9.0)
    assert calls == [(Path("runs/x"), push)]
    assert capsys.readouterr().out == "https://the.hub/user/name\n"


def test_a_repository_is_private_unless_told():
    assert not recipe("runs/x", "--repo_id=user/name").public


def test_a_public_model_needs_a_licence_that_its_owner_gave(capsys):
    with pytest.raises(SystemExit):
        recipe("runs/x", "--repo_id=user/name", "--public", "true")
    assert "public needs license, an identifier that the Hub knows: mit, apache-2.0" in capsys.readouterr().err
    assert recipe("runs/x", "--repo_id=user/name").license is None


def test_a_time_limit_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        recipe("runs/x", "--repo_id=user/name", "--time_limit_s=0")
    assert "time_limit_s (0) must be a number above 0 and at most 1,000,000." in capsys.readouterr().err


def test_there_is_no_way_to_pass_a_token(capsys):
    with pytest.raises(SystemExit):
        recipe("runs/x", "--repo_id=user/name", "--token=hf_x")
    assert "token" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    with pytest.raises(UserError, match=r"nowhere does not exist; give the directory of a run or of a model"):
        hub.push_run(tmp_path / "nowhere", hub.Push(repo_id="user/name"))


def test_a_model_of_three_bytes_is_not_pushed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(
        UserError, match=r"is damaged \(model.safetensors is cut or damaged \(.*\)\); restore it, or give"
    ):
        hub.push_run(tmp_path, hub.Push(repo_id="user/name"))
