"""Writes a model in another form: `python scripts/export.py MODEL --to native|onnx|gguf [--FIELD VALUE ...]`.

MODEL is the directory of a run or of a model, or a Hub id. What is written has been loaded back and compared with the
model before this script says so; a killed export leaves nothing that looks like a model.
"""

import sys

from gpt2x.command_line import parse_recipe
from gpt2x.config.publishing import ExportRecipe
from gpt2x.publishing.output import check_export
from gpt2x.terminal import command


def main(recipe: ExportRecipe) -> None:
    """Exports the model and prints what came out."""
    check_export(recipe)
    from transformers.utils import logging  # seconds, which a mistake need not wait for

    from gpt2x.publishing.export import export_model

    logging.disable_progress_bar()
    export = export_model(recipe)
    print(f"{export.path}: {export.num_bytes / 1e6:.1f} MB; compared with the model, {export.difference}")
    if export.note is not None:
        print(f"note: {export.note}")


if __name__ == "__main__":
    with command():
        parsed, _ = parse_recipe(ExportRecipe, sys.argv[1:], script="export.py", positional="model")
        main(parsed)
