"""Uploads a model: `python scripts/push_to_hub.py RUN_OR_MODEL --repo_id USER/NAME [--public]`.

It uploads the model, its card and its plots in one commit, to a private repository unless told otherwise, as the user
of the environment's HF_TOKEN or of `hf auth login`.
"""

import sys

from gpt2x.command_line import parse_recipe
from gpt2x.config import PushRecipe
from gpt2x.locate import local_path
from gpt2x.terminal import command


def main(recipe: PushRecipe) -> None:
    """Uploads and prints the address."""
    # What imports torch waits until there is something to push, a place for it and a token.
    from gpt2x.publishing.hub import Push, push_run

    push = Push(
        repo_id=recipe.repo_id,
        is_public=recipe.public,
        license=recipe.license,
        time_limit_s=recipe.time_limit_s,
    )
    print(push_run(local_path(recipe.model), push))


if __name__ == "__main__":
    with command(if_stopped="stopped before the Hub had said that it has the model; the same command tries again"):
        parsed, _ = parse_recipe(PushRecipe, sys.argv[1:], script="push_to_hub.py", positional="model")
        main(parsed)
