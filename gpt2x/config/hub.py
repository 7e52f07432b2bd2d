"""Whether and where a finished run is uploaded."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HubSection:
    """The upload of a finished run: model, card and plots in one commit, as the user of HF_TOKEN or `hf auth login`.

    A push that fails is told in one line with the command that tries again; the run has ended well all the same.
    """

    push: bool = False
    """Whether the run is uploaded when it is finished."""
    repo_id: str | None = None
    """The repository, USER/NAME; made where it is not there."""
    public: bool = False
    """Whether a new repository is visible to everyone."""
    license: str | None = None
    """The model's licence, an identifier that the Hub knows; needed where it is public, else it may be left open."""

    def __post_init__(self) -> None:
        if self.push and self.repo_id is None:
            raise ValueError("hub.push needs hub.repo_id: USER/NAME.")
        if self.push and self.public and self.license is None:
            raise ValueError(
                "hub.public needs hub.license, an identifier that the Hub knows: mit, apache-2.0, other ..."
            )
