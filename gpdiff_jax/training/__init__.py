"""In: what is to be optimised. Out: it, trained: the step, the loop over steps, and its checkpoints."""
