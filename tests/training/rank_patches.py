"""What tests of several ranks change in a forked run before its script starts."""

import os
import time
from datetime import timedelta

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


def have_little_patience():
    """A group of processes waits for three seconds."""
    from torch.distributed import distributed_c10d, rendezvous

    from gpt2x.distributed import ranks as agreement

    distributed_c10d.default_pg_timeout = rendezvous.default_pg_timeout = agreement.LIMIT = timedelta(seconds=3)


def have_a_slow_main_process():
    """The main process takes five seconds for its data and for each checkpoint; a group waits for three."""
    from gpt2x.checkpoints import saver as saving
    from gpt2x.distributed import ranks as agreement
    from gpt2x.training import checks

    have_little_patience()
    agreement.SILENT_S = 1.0
    for owner, name in ((checks, "check_before_torch"), (saving, "write_checkpoint")):
        setattr(owner, name, _slow(getattr(owner, name)))


def _slow(function):
    def slow(*arguments, **options):
        time.sleep(5)
        return function(*arguments, **options)

    return slow
