"""Names of models and tokenizers: what is here, what is on the Hub, what is neither, and what is damaged."""

import hashlib
import json
import re
import socket
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.numpy import save_file

from gpt2x.errors import UserError
from gpt2x.locate import base_of, does_not_exist, find_model, find_tokenizer, is_hub_id, place_to_write


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """What the Hub is asked for, by a client that is online and gets an answer."""
    ids = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, **_: ids.append(repo_id))
    return ids


def model_in(directory: Path | str) -> str:
    directory = Path(directory)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"weight": np.ones(64, np.float32)}, directory / "model.safetensors")
    return str(directory)


def checkpoint_in(run: Path | str, step: int) -> Path:
    checkpoint = Path(run, "checkpoints", f"step-{step:06d}")
    model_in(checkpoint / "model")
    files = {
        f"model/{file.name}": {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in (checkpoint / "model").iterdir()
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    return checkpoint


# --- what is here ----------------------------------------------------------------------------------------------------


def test_the_model_of_a_run_is_the_final_one_or_that_of_the_newest_checkpoint():
    checkpoint_in("run", 999_999)
    newest = checkpoint_in("run", 1_000_000)
    model_in("run/checkpoints/step-1000010/model")  # without a manifest: a save that was killed
    model_in("run/checkpoints/step-1000020.tmp-01234567/model")
    model_in("run/checkpoints/step-٠٠٠٠١٣/model")
    assert find_model("run") == str(newest / "model")
    final = model_in("run/final")
    assert find_model("run") == final
    assert find_model(final) == final


def test_a_checkpoint_is_its_model():
    checkpoint = checkpoint_in("run", 10)
    assert find_model(str(checkpoint)) == find_model(str(checkpoint / "model")) == str(checkpoint / "model")


def test_a_checkpoint_without_its_optimizer_is_still_a_model():
    checkpoint = checkpoint_in("run", 10)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state/optimizer.safetensors"] = {"size": 9, "sha256": "0" * 64}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert find_model("run") == str(checkpoint / "model")


def test_the_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model_in("home/mine")
    assert find_model("~/mine") == str(tmp_path / "home" / "mine")
    assert find_tokenizer("~/mine") == tmp_path / "home" / "mine"


def test_what_exists_is_that_whatever_its_name_looks_like():
    model_in("openai-community/gpt2")
    assert not is_hub_id("openai-community/gpt2")
    assert find_model("openai-community/gpt2") == "openai-community/gpt2"


# --- what is damaged -------------------------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(b"abc")


def flip(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (cut, "model.safetensors", r"model/model.safetensors has 3 bytes instead of \d+"),
        (flip, "model.safetensors", "model/model.safetensors differs from its manifest"),
        (Path.unlink, "config.json", "model/config.json is missing"),
        (Path.unlink, "model.safetensors", "model/model.safetensors is missing"),
    ],
)
def test_a_checkpoint_that_is_not_as_its_manifest_says_is_passed_over_with_a_line(damage, file, reason, capsys):
    older, newer = checkpoint_in("run", 10), checkpoint_in("run", 20)
    damage(newer / "model" / file)
    assert find_model("run") == str(older / "model")
    expected = rf"{newer}/model is damaged \({reason}\); taking {older}/model.\n"
    assert re.fullmatch(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model.safetensors", b"abc", r"model.safetensors is cut or damaged \(.*\)"),
        ("config.json", b"", r"config.json is no JSON \(.*\)"),
        (
            "model.safetensors.index.json",
            b"{}",
            r"model\.safetensors\.index\.json is not as .* \(weight_map: Field required\)",
        ),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-2.safetensors"}}',
            "model-2.safetensors is missing",
        ),
    ],
)
def test_a_final_model_that_is_cut_is_passed_over_with_a_line(file, content, reason, capsys):
    model_in("run/final")
    checkpoint = checkpoint_in("run", 10)
    Path("run/final", file).write_bytes(content)
    assert find_model("run") == str(checkpoint / "model")
    assert re.fullmatch(rf"run/final is damaged \({reason}\); taking {checkpoint}/model.\n", capsys.readouterr().err)


def test_weights_are_what_a_final_models_own_manifest_says_and_settings_may_be_edited(capsys):
    final, checkpoint = Path(model_in("run/final")), checkpoint_in("run", 10)
    (final / "manifest.json").write_text((checkpoint / "manifest.json").read_text().replace("model/", ""))
    (final / "config.json").write_text('{"model_type": "gpt2", "n_ctx": 4}')
    assert find_model("run") == str(final)
    flip(final / "model.safetensors")
    assert find_model("run") == str(checkpoint / "model")
    assert "run/final is damaged (model.safetensors differs from its manifest); taking" in capsys.readouterr().err
    (final / "model.safetensors").unlink()
    find_model("run")
    assert "run/final is damaged (model.safetensors is missing); taking" in capsys.readouterr().err


def test_a_damaged_model_that_was_asked_for_is_refused():
    cut(Path(model_in("mine"), "model.safetensors"))
    with pytest.raises(
        UserError, match=r"^mine is damaged \(model.safetensors is cut .*\); restore it, or give another"
    ):
        find_model("mine")


def test_a_run_without_a_whole_model_is_refused_with_what_is_wrong_with_each():
    cut(Path(model_in("run/final"), "model.safetensors"))
    cut(checkpoint_in("run", 10) / "model" / "config.json")
    message = (
        r"^run holds no whole model: run/final is damaged \(.*\); run/checkpoints/step-000010/model is damaged \(.*\)"
    )
    with pytest.raises(UserError, match=message):
        find_model("run")


def test_a_directory_without_a_model_is_refused():
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"holds no model: no config.json in it, in final/ or in checkpoints/; train"):
        find_model("empty")


# --- what is neither here nor on the Hub -----------------------------------------------------------------------------

LOCAL = ["runs/quickstart", "data/tok", "./openai-community/gpt2", "../x/y", "~/x", "/no/where", "nowhere", "a/b/c"]
LOCAL += ["models/llama", "final/model", "a/", "here/typo", "-a/b", "a/../b"]


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("find", [find_model, find_tokenizer])
def test_what_looks_local_is_never_asked_for_on_the_hub(name, find, asked):
    Path("here").mkdir()
    with pytest.raises(UserError, match=re.escape(f"{name} does not exist; ")) as refused:
        find(name)
    assert asked == []
    assert "\n" not in str(refused.value)


def test_a_run_that_is_not_there_is_refused_with_those_that_are_the_most_similar_first():
    for name in ("chat", "quickstart", "wikitext"):
        Path("runs", name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"^runs/quikstart does not exist; runs here: quickstart, wikitext, chat.$"):
        find_model("runs/quikstart")


def test_before_the_first_run_the_script_is_named_that_makes_one():
    with pytest.raises(
        UserError,
        match=r"^runs/quickstart does not exist; there are no runs here yet, `.*/pretrain.py` makes",
    ):
        find_model("runs/quickstart")


def test_of_many_neighbours_some_are_named():
    for number in range(12):
        Path("models", f"m{number}").mkdir(parents=True)
    complaint = str(does_not_exist("models/x", "a model"))
    assert re.fullmatch(r"models/x does not exist; in models there are: (m\d+, ){7}m\d+ and 4 more.", complaint)


def test_a_file_is_no_model_whatever_its_name_looks_like():
    Path("runs").mkdir()
    Path("runs/model.gguf").write_text("")
    with pytest.raises(UserError, match=r"^runs/model.gguf is a file; give a model's directory, a run's, or a Hub id"):
        find_model("runs/model.gguf")


@pytest.mark.parametrize(
    ("name", "is_right"),
    [
        ("data/tok", True),
        ("runs/tok", True),
        ("here/tok", True),
        ("./there/tok", True),
        ("tok", True),
        ("a/b/c", True),
        ("openai-community/gpt2", False),
        ("models/tok", False),
    ],
)
def test_what_looks_like_a_hub_id_is_not_written_to(name, is_right):
    Path("here").mkdir()
    if is_right:
        assert place_to_write(name, field="path") == Path(name)
    else:
        with pytest.raises(UserError, match=rf"^path \({name}\) looks like a Hub id, .*; write ./{name} for a folder"):
            place_to_write(name, field="path")


# --- what is on the Hub ----------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_said_to_be_fetched_before_it_is(asked, capsys):
    assert find_model("openai-community/gpt2") == "openai-community/gpt2"
    assert find_model("openai-community/gpt2") == "openai-community/gpt2"
    assert asked == ["openai-community/gpt2"]
    assert capsys.readouterr().err == "fetching openai-community/gpt2 from the Hub, as far as it is not in its cache\n"


def test_a_tokenizer_of_the_hub_is_fetched_without_the_model(asked, monkeypatch, tmp_path):
    wanted = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, **options: wanted.update(options) or str(tmp_path)
    )
    assert find_tokenizer("owner/name") == tmp_path
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
    files += ["merges.txt", "tokenizer.model", "chat_template.jinja", "config.json"]
    assert huggingface_hub.utils.filter_repo_objects(files, allow_patterns=wanted["allow_patterns"])
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=wanted["allow_patterns"]))
    assert kept == files
    weights = ["model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "modeling_x.py"]
    assert not list(huggingface_hub.utils.filter_repo_objects(weights, allow_patterns=wanted["allow_patterns"]))


def no_connection(self, repo_id, **_):
    raise ConnectionError("name resolution failed")


def in_cache(repo_id, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / "1").mkdir(parents=True)


@pytest.mark.parametrize("is_offline", [True, False])
def test_without_a_connection_what_is_not_in_the_cache_is_refused_at_once(is_offline, asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_connection)
    reason = "HF_HUB_OFFLINE is set" if is_offline else r"the Hub cannot be reached \(name resolution failed\)"
    message = f"^owner/name is neither here nor in the Hub's cache, and {reason}; connect, or give a directory"
    with pytest.raises(UserError, match=message):
        find_model("owner/name")


@pytest.mark.parametrize("is_silent", [True, False])
def test_the_real_client_gives_up_a_hub_that_is_not_there_or_silent_in_one_try(is_silent, asked, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("gpt2x.locate.PROBE_S", 0.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if is_silent:
            listening.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"nor in the Hub's cache, and the Hub cannot be reached \(.+\); connect, or"
        ):
            find_model("owner/name")
    assert time.monotonic() - began < 5


def test_without_a_connection_the_cache_serves_from_then_on_without_another_try(asked, monkeypatch, tmp_path, capsys):
    in_cache("owner/name", monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_connection)
    assert find_model("owner/name") == "owner/name"
    line = "taking owner/name from the Hub's cache: the Hub cannot be reached (name resolution failed)\n"
    assert capsys.readouterr().err == line
    assert huggingface_hub.is_offline_mode()


def test_what_the_hub_does_not_have_is_refused(asked, monkeypatch):
    def not_found(self, repo_id, **_):
        response = type("Response", (), {"status_code": 404, "headers": {}, "request": None})()
        raise RepositoryNotFoundError("no", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", not_found)
    with pytest.raises(
        UserError, match=r"^owner/name is not on the Hub, or your token may not see it \(404\); correct"
    ):
        find_model("owner/name")


# --- adapters --------------------------------------------------------------------------------------------------------


def adapters_of(base) -> Path:
    Path("adapters").mkdir()
    Path("adapters/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return Path("adapters")


def test_the_base_of_adapters_is_found_as_any_model_is(asked, capsys):
    adapters = adapters_of("owner/base")
    assert base_of(adapters) == "owner/base"
    assert capsys.readouterr().err == "fetching owner/base from the Hub, as far as it is not in its cache\n"
    base = model_in("owner/base")
    assert base_of(adapters) == base


def test_the_base_of_adapters_may_lie_beside_them():
    adapters = adapters_of("../base/final")
    model_in("base/final")
    assert Path(base_of(adapters)).resolve() == Path("base/final").resolve()


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        (
            "runs/gone",
            "the adapters of adapters belong to runs/gone, which does not exist; put that model there, or correct",
        ),
        (None, "adapters/adapter_config.json names no base_model_name_or_path; write the model there"),
    ],
)
def test_adapters_without_their_base_are_refused_and_nothing_is_fetched(base, complaint, asked):
    with pytest.raises(UserError, match=f"^{complaint}"):
        base_of(adapters_of(base))
    assert asked == []
