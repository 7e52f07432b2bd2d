"""Documents packed into sequences, each seeing itself alone."""

import numpy as np


def document_positions(ids_BT: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Position ids that begin again at every document; the model masks what stands before.

    A document begins with the end of text that stands in front of it, from which its first token is predicted, and
    its last token predicts the end of text that begins the next one. So every token is trained on, and none sees
    another document.

    Args:
        ids_BT: token ids, (B, T) integers.
        eos_token_id: the id between documents.

    Returns:
        (B, T) int64.
    """
    places_T = np.arange(ids_BT.shape[1])
    begins_BT = np.where(ids_BT == eos_token_id, places_T, 0)
    return places_T - np.maximum.accumulate(begins_BT, axis=1)
