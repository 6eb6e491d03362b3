"""The parts of a training run, which ``fastdeeplab.train`` puts together."""
