"""What tests of several ranks change in a forked run before its script starts."""

import os

from gpt2x.errors import UserError


def end_the_data_of_rank_one():
    """In the sixth step rank 1 alone finds that its data has ended, as where its machine has lost the network."""
    from gpt2x.batches.read_ahead import ReadAhead

    original = ReadAhead.step

    def ending(self, step, **options):
        if step == 5 and os.environ["RANK"] == "1":
            raise UserError("the stream of this machine has ended.")
        return original(self, step, **options)

    ReadAhead.step = ending
    ReadAhead.can_fail = property(lambda self: True)
