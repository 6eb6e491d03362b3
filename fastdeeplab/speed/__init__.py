"""The parts of a comparison of speed, which ``fastdeeplab.bench`` puts together."""
