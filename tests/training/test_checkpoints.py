"""A checkpoint is whole or nothing, and a stock model for whoever finds it."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gpt2x.checkpoints.format import (
    list_checkpoints,
    newest_checkpoint,
    write_checkpoint,
)
from gpt2x.checkpoints.state import load_optimizer_tensors, optimizer_tensors, parameter_names
from gpt2x.errors import UserError
from gpt2x.files import UnwritableError
from gpt2x.runs.layout import checkpoint_dir

STATE = {"weight/exp_avg": torch.ones(2)}


def write_model(directory):
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights" * 100)


def write(run_dir, step):
    target = checkpoint_dir(run_dir, step)
    write_checkpoint(target, write_model=write_model, optimizer=STATE, trainer={"step": step})
    return target


def remove_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


def tear_manifest(checkpoint):
    content = (checkpoint / "manifest.json").read_bytes()
    (checkpoint / "manifest.json").write_bytes(content[: len(content) // 2])


def flip_manifest(checkpoint):
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"size", b"si\xfae", 1))


def rename_a_key_of_the_manifest(checkpoint):
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"sha256", b"sha257", 1))


def truncate_weights(checkpoint):
    file = checkpoint / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit_of_the_weights(checkpoint):
    file = checkpoint / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove_the_optimizer(checkpoint):
    (checkpoint / "state" / "optimizer.safetensors").unlink()


DAMAGES = {
    remove_manifest: "manifest.json is missing",
    tear_manifest: "manifest.json is no JSON (EOF while parsing a string at line 9 column 9)",
    flip_manifest: "manifest.json is no JSON (invalid unicode code point at line 4 column 10)",
    rename_a_key_of_the_manifest: "manifest.json is not as gpt2x writes it (sha256: Field required)",
    truncate_weights: "model/model.safetensors has 699 bytes instead of 700",
    flip_a_bit_of_the_weights: "model/model.safetensors differs from its manifest",
    remove_the_optimizer: "state/optimizer.safetensors is missing",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path, damage, reason):
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    damage(newer)
    assert newest_checkpoint(tmp_path) == (older, [f"{newer} is damaged ({reason}); looking for an older one."])


def test_of_whole_checkpoints_the_one_of_the_largest_step_is_taken(tmp_path):
    for step in (999_999, 1_000_000, 20):
        write(tmp_path, step)
    assert newest_checkpoint(tmp_path) == (checkpoint_dir(tmp_path, 1_000_000), [])


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, [])


def test_the_manifest_names_every_file_with_its_size_and_sha256(tmp_path):
    checkpoint = write(tmp_path, 10)
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    files = {file.relative_to(checkpoint).as_posix(): file.read_bytes() for file in checkpoint.rglob("*.*")}
    del files["manifest.json"]
    expected = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    assert listed == expected
    assert set(listed) == {"model/model.safetensors", "state/optimizer.safetensors", "state/trainer.json"}


def test_a_save_that_fails_leaves_nothing_and_the_older_checkpoint_whole(tmp_path):
    older = write(tmp_path, 10)

    def fail(directory):
        write_model(directory)
        raise OSError("no space left on device")

    with pytest.raises(UnwritableError, match=r"step-000020 could not be written \(no space left on device\)"):
        write_checkpoint(checkpoint_dir(tmp_path, 20), write_model=fail, optimizer=STATE, trainer={})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]
    assert newest_checkpoint(tmp_path) == (older, [])


def test_what_has_the_name_of_a_checkpoint_being_written_is_none(tmp_path):
    checkpoint = write(tmp_path, 10)
    shutil.copytree(checkpoint, checkpoint.with_name("step-000020.tmp-0a1b2c3d"))
    assert list_checkpoints(tmp_path) == [checkpoint]


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_passes_over_a_damaged_checkpoint_and_writes_it_again(recipe, pretrain, capsys, assert_equal_tensors):
    run = pretrain(recipe)
    expected = run.saved()
    flip_a_bit_of_the_weights(run.path / "checkpoints" / "step-000020")
    again = pretrain(recipe)
    line = "step-000020 is damaged (model/model.safetensors differs from its manifest); looking for an older one."
    assert line in capsys.readouterr().out
    assert_equal_tensors(again.saved(), expected)
    assert newest_checkpoint(again.path) == (again.path / "checkpoints" / "step-000020", [])


def test_a_run_keeps_as_many_checkpoints_as_it_is_told(recipe, changed, pretrain):
    run = pretrain(changed(recipe, train={"save_steps": 4, "save_total_limit": 3}))
    assert [path.name for path in list_checkpoints(run.path)] == ["step-000012", "step-000016", "step-000020"]


def test_a_run_directory_holds_nothing_pickled(finished):
    files = [file for file in finished.path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".jsonl", ".npy", ".png", ".safetensors", ".yaml"}
    # pickle.dumps starts with its protocol, torch.save with that of a zip archive
    assert [file for file in files if file.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")] == []


STRANGER = """
import json, sys
import torch
from safetensors.torch import save_file
for name in ("gpt2x", "modeling_gpt2x"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported, so this shows nothing")
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([tokenizer("def return (self) naïve")["input_ids"]])
save_file({"ids": ids, "logits": model(ids).logits.detach()}, sys.argv[2])
print(json.dumps([type(model).__name__, str(model.dtype), tokenizer.decode(ids[0])]))
"""


def test_the_model_of_a_checkpoint_loads_where_gpt2x_is_not_installed(finished, tmp_path):
    directory = finished.path / "checkpoints" / "step-000020" / "model"
    # -I keeps PYTHONPATH and the working directory out; an editable install of gpt2x is kept out by -S and a path.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path += {packages}\n{STRANGER}"
    command = [sys.executable, "-I", "-S", "-c", code, str(directory), str(tmp_path / "found.safetensors")]
    stranger = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert stranger.returncode == 0, stranger.stderr
    assert json.loads(stranger.stdout) == ["GPT2LMHeadModel", "torch.float32", "def return (self) naïve"]
    found = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        expected = finished.job.plain_model.eval()(found["ids"], use_cache=False).logits
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    assert "auto_map" not in json.loads((directory / "config.json").read_text())


# --- the optimizer's state -------------------------------------------------------------------------------------------


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_the_optimizers_state_comes_back_by_name_whatever_the_order_of_the_parameters():
    model = torch.nn.Linear(3, 2)
    names = parameter_names(model)
    tensors = optimizer_tensors([trained(model)], names)
    assert set(tensors) == {
        f"{name}/{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    other = torch.optim.AdamW([model.bias, model.weight], lr=0.1)
    load_optimizer_tensors([other], names, tensors)
    assert torch.equal(other.state[model.weight]["exp_avg_sq"], tensors["weight/exp_avg_sq"])
    assert torch.equal(other.state[model.bias]["exp_avg"], tensors["bias/exp_avg"])


def test_state_that_is_missing_for_a_parameter_is_refused():
    model = torch.nn.Linear(3, 2)
    tensors = optimizer_tensors([trained(model)], parameter_names(model))
    kept = {key: value for key, value in tensors.items() if not key.startswith("bias")}
    message = "the checkpoint has no optimizer state for bias; resume with the recipe that made it."
    with pytest.raises(UserError, match=message):
        load_optimizer_tensors([torch.optim.AdamW(model.parameters())], parameter_names(model), kept)


def test_state_of_a_parameter_that_is_not_trained_is_refused():
    model = torch.nn.Linear(3, 2)
    tensors = optimizer_tensors([trained(model)], parameter_names(model))
    message = "the checkpoint has optimizer state for bias, which this run does not train; resume with the recipe"
    with pytest.raises(UserError, match=message):
        load_optimizer_tensors([torch.optim.AdamW([model.weight])], parameter_names(model), tensors)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_another_optimizer_is_refused_even_where_resuming_is_forced(recipe, changed, pretrain, name):
    other = {"adamw": "muon", "muon": "adamw"}[name]
    pretrain(changed(recipe, optimizer={"name": name}), stop_after=2)
    with pytest.raises(UserError, match=rf"optimizer.name \({other}\) must be that of .*step-000002, {name}, whose"):
        pretrain(changed(recipe, optimizer={"name": other}, resume=True))


def test_other_token_shards_are_refused(recipe, pretrain):
    stopped = pretrain(recipe, stop_after=2)
    trainer = stopped.path / "checkpoints" / "step-000002" / "state" / "trainer.json"
    (source,) = stopped.job.batches.batches.sources.values()
    content = trainer.read_text().replace(source.fingerprint, "0" * 64)
    trainer.write_text(content)
    manifest = trainer.parents[1] / "manifest.json"
    files = json.loads(manifest.read_text())
    files["files"]["state/trainer.json"]["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    manifest.write_text(json.dumps(files))
    message = (
        r"data of source 'train' has changed since the .* was made \(fingerprint 000000000000, now \w{12}\); restore"
    )
    with pytest.raises(UserError, match=message):
        pretrain(recipe)
