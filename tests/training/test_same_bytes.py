import dataclasses
import json
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from same_bytes import sums


def test_two_runs_of_the_same_code_in_two_places_have_the_same_sums(recipe, pretrain, tmp_path):
    paths = []
    for place in ("here/runs", "there/runs"):
        section = dataclasses.replace(recipe.run, dir=tmp_path / place)
        paths.append(pretrain(dataclasses.replace(recipe, run=section), finishes=True).path)
    first, second = map(sums, paths)
    assert first == second
    assert {"config.yaml", "metrics.jsonl", "final/model.safetensors", "losses.npy", "stats.json"} <= set(first)


def test_another_weight_record_or_recipe_has_another_sum(finished, tmp_path):
    first, second = finished.path, shutil.copytree(finished.path, tmp_path / "copy")
    with (second / "final" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    record = json.loads((second / "stats.json").read_bytes())
    (second / "stats.json").write_text(json.dumps(record | {"tokens": record["tokens"] + 1}))
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("seed: ", "seed: 1"))
    before, after = sums(first), sums(second)
    assert {name for name in before if before[name] != after[name]} == {
        "config.yaml",
        "stats.json",
        "final/model.safetensors",
    }
