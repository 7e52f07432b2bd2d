"""The process that reads a model of gpt2x's form by transformers and the code beside it:
`python -I reference_process.py DIRECTORY SCRATCH`.

SCRATCH holds tokens.npz, the inputs of one forward pass, and gets logits.npy. Nothing of gpt2x is imported here, so
that what an export is compared with owes nothing to the program that made it.
"""

import os
import sys
from pathlib import Path


def main(directory: str, scratch: Path) -> None:
    """Writes the logits (B, T, V) of the tokens in `scratch`, in float32."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(scratch / "modules")  # where transformers copies the code to

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    tokens = {name: torch.from_numpy(array) for name, array in np.load(scratch / "tokens.npz").items()}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True)
    assert "modeling_gpt2x" not in sys.modules
    with torch.no_grad():
        logits_BTV = model.eval()(**tokens, use_cache=False).logits
    np.save(scratch / "logits.npy", logits_BTV.float().numpy())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
