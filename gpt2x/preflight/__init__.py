"""Every check of a training start, in the order in which they are made.

`before_torch` asks what needs neither torch nor transformers, so that a mistake is told at once: of every process its
launch, then of the main one the recipe, the model to start from, and the data, which are prepared and opened.
`before_step_1` tells what is known once the trainer is made: the plan of the run, the room it takes, what it will
learn of conversations. Between the two, whatever makes a part of the trainer refuses what it cannot be made of.
"""
