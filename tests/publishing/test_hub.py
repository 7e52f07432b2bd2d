"""The Hub: the real client against a server on loopback, what arrives there, and one line where it does not."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hub_server import children_of, running_hub
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from gpt2x.config import HubSection
from gpt2x.errors import UserError
from gpt2x.manifest import write_manifest
from gpt2x.publishing.hub import COMMAND, Push, files_to_push, push_run
from gpt2x.tokenizers.bpe import load_tokenizer
from gpt2x.training.finish import push
from gpt2x.training.recording import Failures

ROOT = Path(__file__).parents[2]
TOKEN = "hf_PlantedTokenThatNobodyMaySee"
PUSH = Push(repo_id="user/tiny")


@pytest.fixture
def hub():
    with running_hub(TOKEN) as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path, hub):
    """What the client's process inherits: the server, a token, a home without other tokens, no Xet."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf_home")}
    for name, value in {**settings, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def run_dir(tmp_path, saved):
    """The directory of a finished run."""
    directory = tmp_path / "runs" / "tiny"
    (directory / "plots").mkdir(parents=True)
    saved("llama").rename(directory / "final")
    recipe = {
        "data": {"path": None, "preparation": {"output_dir": "data/python-stdlib"}, "sequence_length": 128},
        "train": {"max_steps": 10, "mixed_precision": "bf16"},
        "optimizer": {"name": "muon", "lr_scheduler_type": "wsd"},
        "init_from": None,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(recipe))
    stats = {"tokens": 40960, "parameters": 27000, "val/loss": 3.25, "val/bits_per_byte": 1.5}
    (directory / "stats.json").write_text(json.dumps(stats))
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 10, "train/loss": 3.0}) + "\n")
    (directory / "plots" / "loss.png").write_bytes(b"\x89PNG a picture")
    return directory


def test_a_pushed_run_is_one_private_commit_of_model_card_and_plots(hub, run_dir):
    assert push_run(run_dir, PUSH) == f"{hub.url}/user/tiny"
    repository = hub.repositories["user/tiny"]
    assert repository["private"]
    assert repository["commits"] == 1
    model_files = {file.name for file in (run_dir / "final").iterdir()}
    assert set(repository["files"]) == model_files | {"README.md", "plots/loss.png"}
    for file in (run_dir / "final").iterdir():
        assert repository["files"][file.name] == file.read_bytes()
    assert b"![loss](plots/loss.png)" in repository["files"]["README.md"]


def test_a_second_push_updates_the_same_repository_and_leaves_it_as_visible_as_it_is(hub, run_dir):
    push_run(run_dir, Push(repo_id="user/tiny", is_public=True))
    (run_dir / "plots" / "loss.png").write_bytes(b"another picture")
    push_run(run_dir, PUSH)
    repository = hub.repositories["user/tiny"]
    assert (repository["private"], repository["commits"]) == (False, 2)
    assert repository["files"]["plots/loss.png"] == b"another picture"


def test_of_a_run_that_is_not_finished_the_newest_whole_checkpoint_is_pushed_with_a_line(run_dir, capsys):
    whole = run_dir / "checkpoints" / "step-000010"
    whole.mkdir(parents=True)
    (run_dir / "final").rename(whole / "model")
    write_manifest(whole)
    shutil.copytree(whole / "model", run_dir / "checkpoints" / "step-000020" / "model")  # is being saved
    assert files_to_push(run_dir)["config.json"] == whole / "model" / "config.json"
    line = f"{run_dir} has no final model: its newest whole checkpoint is pushed, step-000010\n"
    assert line in capsys.readouterr().err


@pytest.mark.trial
def test_from_pretrained_loads_what_was_pushed(hub, run_dir):
    push_run(run_dir, PUSH)
    code = (
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('user/tiny').eval()\n"
        "ids = AutoTokenizer.from_pretrained('user/tiny')('import torch', return_tensors='pt')['input_ids']\n"
        "print(ids.tolist(), round(model(ids).logits.double().sum().item(), 2), sep='|')"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    ids = load_tokenizer(run_dir / "final")("import torch", return_tensors="pt")["input_ids"]
    expected = LlamaForCausalLM.from_pretrained(run_dir / "final").eval()(ids).logits.double().sum().item()
    assert loaded.stdout == f"{ids.tolist()}|{round(expected, 2)}\n", loaded.stderr


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("repos/create", 401, r"the Hub does not accept the token \(401\); set HF_TOKEN to a valid one or run"),
        ("repos/create", 403, r"the token may not write there \(403\); use one with write access"),
        ("/lfs/", 413, r"the Hub refuses a file as too large \(413\); export a smaller dtype"),
        ("/commit/", 500, r"the Hub has a failure of its own \(500\); wait some minutes"),
        ("validate-yaml", "html", "the Hub's answer is not what its client expects; it may be down"),
    ],
)
def test_a_refusal_is_one_line_that_says_how_to_retry(hub, run_dir, path, status, reason):
    hub.faults[path] = status
    remedy = rf"; then `.*python .*scripts/push_to_hub\.py {run_dir} --repo_id user/tiny` tries again\."
    with pytest.raises(UserError, match=rf"^user/tiny was not updated: {reason}.*{remedy}$"):
        push_run(run_dir, PUSH)


def test_the_command_that_tries_again_has_visibility_and_licence(hub, run_dir):
    hub.faults["repos/create"] = 401
    with pytest.raises(UserError, match=r"--repo_id user/tiny --public --license mit` tries again"):
        push_run(run_dir, Push(repo_id="user/tiny", is_public=True, license="mit"))


def test_a_server_that_does_not_answer_is_given_up_after_the_time_limit(hub, run_dir):
    hub.faults["/commit/"] = "hang"
    with pytest.raises(UserError, match=r"user/tiny was not updated: the Hub did not answer within 2 s .*tries again"):
        push_run(run_dir, Push(repo_id="user/tiny", time_limit_s=2))


def wait_for_request(hub, part):
    deadline = time.monotonic() + 30
    while not any(part in path for _, path, _ in hub.requests):
        assert time.monotonic() < deadline, hub.requests
        time.sleep(0.02)


def test_the_upload_ends_when_what_started_it_is_gone(hub):
    hub.faults["repos/create"] = "hang"
    request = {"repo_id": "user/tiny", "private": True, "message": "m", "files": {}, "texts": {}}
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE) as process:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        wait_for_request(hub, "repos/create")
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(5) == 1


@pytest.mark.skipif(not Path("/proc").exists(), reason="children are listed in /proc, which Linux has")
def test_whatever_ends_a_push_ends_its_upload(hub, run_dir):
    hub.faults["repos/create"] = "hang"

    def leave(*_):
        sys.exit(143)

    def end_when_it_hangs():
        wait_for_request(hub, "repos/create")
        children.update(children_of(os.getpid()))
        os.kill(os.getpid(), signal.SIGTERM)

    children = set()
    before = signal.signal(signal.SIGTERM, leave)
    try:
        threading.Thread(target=end_when_it_hangs).start()
        with pytest.raises(SystemExit):
            push_run(run_dir, PUSH)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert children
    assert not children & children_of(os.getpid())


@pytest.mark.trial
@pytest.mark.skipif(not Path("/proc").exists(), reason="children are listed in /proc, which Linux has")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_signal_to_the_script_ends_script_and_upload_and_nothing_is_half_there(hub, run_dir, number, code):
    hub.faults["/commit/"] = "hang"
    command = [sys.executable, ROOT / "scripts" / "push_to_hub.py", run_dir, "--repo_id", "user/tiny"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_request(hub, "/commit/")
        children = children_of(process.pid)
        assert children
        process.send_signal(number)
        assert process.wait(5) == code  # a shell says 143 of -15
        assert "Traceback" not in process.stderr.read()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (hub.repositories["user/tiny"]["commits"], hub.repositories["user/tiny"]["files"]) == (0, {})


def test_a_server_that_is_not_there_is_one_line(hub, run_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"^user/tiny was not updated: .*refused.*; then `.*python .*$"):
        push_run(run_dir, PUSH)


def test_without_a_token_nothing_is_sent(hub, run_dir, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"user/tiny cannot be pushed to, as there is no token; set HF_TOKEN or run"):
        push_run(run_dir, PUSH)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["tiny", "user/a/b", "user/ti ny"])
def test_a_repository_must_be_named_by_user_and_name(run_dir, repo_id):
    with pytest.raises(UserError, match=r"repo_id \(.*\) must be USER/NAME"):
        push_run(run_dir, Push(repo_id=repo_id))


def test_what_is_no_part_of_a_model_is_not_pushed_and_named(saved, capsys):
    directory = saved("gpt2x")
    (directory / "conversion_gpt2x.py").touch()  # as of a model that an older gpt2x saved
    model_files = {file.name for file in directory.iterdir()}
    write_manifest(directory)
    shutil.copy(directory / "model.safetensors", directory / "optimizer.safetensors")
    others = ["exports/onnx/model.onnx", ".cache/x", ".env", "id_rsa", "my_gpt2x.py", "notes.json"]
    others += ["model.safetensors.tmp", "optimizer.pt", "onnx/notes.txt", "onnx/a/b.onnx"]
    for name in others:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x")
    (directory / "passwords").symlink_to("/etc/hostname")
    assert {"config.json", "modeling_gpt2x.py", "tokenizer.json", "model.safetensors"} <= model_files
    assert set(files_to_push(directory)) == model_files
    line = f"not pushed, since no part of a model: .cache, .env, exports and 9 more, in {directory}\n"
    assert capsys.readouterr().err.endswith(line)


@pytest.mark.parametrize("form", ["gpt2x", "nanochat"])
def test_nothing_that_a_chat_model_is_saved_as_is_left_out(saved, tokenizer, form):
    directory = saved(form)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(directory)
    every = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= every
    assert set(files_to_push(directory)) == every


@pytest.mark.parametrize("name", ["README.md", "onnx/model.onnx"])
def test_a_link_by_the_name_of_a_models_file_is_refused(saved, tmp_path, name):
    directory = saved("llama")
    (tmp_path / "secret").write_text("hush")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=rf"^{directory / name} is a link or no regular file; put a copy of the file"):
        files_to_push(directory)


def test_a_folder_that_is_a_link_is_not_followed(saved, tmp_path):
    directory = saved("llama")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.onnx").write_text("hush")
    (directory / "onnx").symlink_to(tmp_path / "elsewhere")
    assert not any("onnx" in name for name in files_to_push(directory))


def test_weights_in_several_files_are_pushed_whatever_their_names(saved):
    directory = saved("llama")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "weights_1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights_1.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {"weights_1.safetensors", "model.safetensors.index.json"} <= set(files_to_push(directory))


def test_an_index_makes_nothing_but_weights_part_of_a_model(saved):
    directory = saved("llama")
    (directory / "model.safetensors").unlink()
    (directory / "onnx").mkdir()
    for name in ("onnx/model.onnx", "id_rsa"):
        (directory / name).write_text("x")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "id_rsa"}}')
    pushed = set(files_to_push(directory))
    assert "onnx/model.onnx" in pushed
    assert "id_rsa" not in pushed


def cut_weights(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"abc")


def lose_a_tensor(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("form", ["llama", "gpt2x"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_weights, r"final is damaged \(model\.safetensors is cut or damaged \(.*header too small"),
        (lose_a_tensor, r"lacks model\.norm\.weight, which a \w+ model needs; use a complete checkpoint"),
        (
            lambda model_dir: (model_dir / "model.safetensors").unlink(),
            "no file named model.safetensors",
        ),
        (lambda model_dir: (model_dir / "config.json").write_text("{"), r"config\.json is no JSON"),
    ],
    ids=["cut", "tensor", "no weights", "config"],
)
def test_a_damaged_model_is_refused_before_anything_is_sent(hub, run_dir, saved, form, damage, reason):
    if form == "gpt2x":
        shutil.rmtree(run_dir / "final")
        saved("gpt2x").rename(run_dir / "final")
    damage(run_dir / "final")
    with pytest.raises(UserError, match=rf"^[^\n]*{reason}[^\n]*$"):
        push_run(run_dir, PUSH)
    assert hub.requests == []


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": 3}'])
def test_damaged_settings_of_adapters_are_refused_in_one_line(saved, content):
    directory = saved("llama")
    (directory / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*adapter_config\.json is (no JSON|not as gpt2x writes it)[^\n]*$"):
        files_to_push(directory)


@pytest.mark.parametrize("base", ["base", "runs/x/final", "/models/base", "here/base"])
def test_adapters_of_a_model_that_only_this_machine_has_are_not_pushed(saved, monkeypatch, tmp_path, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    directory = saved("llama")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    message = rf"^the adapters of {directory} belong to {base}, which is no Hub id; push that model and train on its H"
    with pytest.raises(UserError, match=message):
        files_to_push(directory)


def test_adapters_of_a_model_on_the_hub_are_pushed(saved):
    directory = saved("llama")
    settings = {"base_model_name_or_path": "openai-community/gpt2"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    assert "adapter_config.json" in files_to_push(directory)


def test_a_card_of_the_users_own_is_kept(hub, saved):
    directory = saved("gpt2")
    (directory / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push_run(directory, PUSH)
    assert hub.repositories["user/tiny"]["files"]["README.md"] == (directory / "README.md").read_bytes()


@pytest.mark.parametrize("fault", [None, 401, 500])
def test_the_token_is_in_no_file_no_log_and_no_traceback(hub, run_dir, tmp_path, capfd, monkeypatch, fault):
    monkeypatch.setenv("HF_DEBUG", "1")
    said = ""
    if fault is None:
        push_run(run_dir, PUSH)
    else:
        hub.faults["/commit/"] = fault
        with pytest.raises(UserError) as caught:
            push_run(run_dir, PUSH)
        said = "".join(traceback.format_exception(caught.value))
    assert f"Bearer {TOKEN}" in {authorization for _, _, authorization in hub.requests}
    assert TOKEN not in said + "".join(capfd.readouterr())
    sent = b"".join(b"".join(repository["files"].values()) for repository in hub.repositories.values())
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert TOKEN.encode() not in sent + kept


def test_a_message_of_the_client_that_quotes_the_token_is_cut(monkeypatch, run_dir):
    crash = [sys.executable, "-c", f"raise RuntimeError('bad header: {TOKEN}')"]
    monkeypatch.setattr("gpt2x.publishing.hub.COMMAND", crash)
    with pytest.raises(UserError, match=r"was not updated: RuntimeError: bad header: <token>; then"):
        push_run(run_dir, PUSH)


@pytest.fixture
def finished_job(run_dir):
    """As much of a finished run's trainer as its push looks at."""
    hub_section = HubSection(push=True, repo_id="user/tiny")
    accelerator = SimpleNamespace(is_main_process=True, print=print)
    recipe, run = SimpleNamespace(hub=hub_section), SimpleNamespace(path=run_dir)
    recorder = SimpleNamespace(failures=Failures(print))
    return SimpleNamespace(recipe=recipe, run=run, accelerator=accelerator, recorder=recorder)


def test_a_run_that_is_to_be_pushed_is_pushed_at_its_end(hub, finished_job, capsys):
    push(finished_job)
    assert capsys.readouterr().out == f"published:      {hub.url}/user/tiny\n"
    assert hub.repositories["user/tiny"]["commits"] == 1


def test_a_push_that_is_refused_leaves_the_run_alive_with_one_line_that_says_how_to_retry(
    hub, finished_job, run_dir, capsys
):
    hub.faults["repos/create"] = 401
    push(finished_job)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "push failed (UserError: user/tiny was not updated: the Hub does not accept the token (401)"
    )
    assert f"scripts/push_to_hub.py {run_dir} --repo_id user/tiny` tries again" in line
    assert TOKEN not in line
    assert finished_job.recorder.failures.summary()[0].startswith("push failed 1 x")
